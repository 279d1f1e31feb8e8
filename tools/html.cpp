#include "tools/html.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "engine/file_io.h"

namespace ddpm::tools::html {
namespace {

constexpr size_t kMaxPicture = size_t{64} << 20;

std::string base64(const std::string& bytes) {
  static constexpr char kDigits[] =
      "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  std::string text;
  for (size_t at = 0; at < bytes.size(); at += 3) {
    uint32_t group = 0;
    for (size_t i = 0; i < 3; ++i)
      group = group << 8 | (at + i < bytes.size() ? static_cast<uint8_t>(bytes[at + i]) : 0u);
    for (size_t i = 0; i < 4; ++i)
      text += at + i <= bytes.size() ? kDigits[group >> (18 - 6 * i) & 63] : '=';
  }
  return text;
}

// What values lie between, and the steps of its scale: 1, 2 or 5 times a power of ten.
struct Scale {
  double low = 0, high = 1, step = 0.2;

  Scale(const Chart& c, std::vector<double> Series::*values) {
    double least = std::numeric_limits<double>::infinity(), most = -least;
    for (const Series& s : c.series)
      for (double v : s.*values)
        if (std::isfinite(v)) {
          least = std::min(least, v);
          most = std::max(most, v);
        }
    if (least > most) return;
    if (least > 0 && least < 0.5 * most) least = 0;
    if (least == most) most = least + 1;
    const double rough = (most - least) / 5, power = std::pow(10, std::floor(std::log10(rough)));
    step = power * (rough / power > 5 ? 10 : rough / power > 2 ? 5 : rough / power > 1 ? 2 : 1);
    low = std::floor(least / step) * step;
    high = std::ceil(most / step) * step;
  }
  double part(double v) const { return (v - low) / (high - low); }
  int steps() const { return static_cast<int>(std::lround((high - low) / step)); }
};

// The drawing's size, and the plot's place in it.
constexpr double kWidth = 640, kHeight = 340, kLeft = 70, kRight = 620, kTop = 34, kBottom = 286;

std::string text_at(double x, double y, const char* anchor, const std::string& text,
                    const char* more = "") {
  return format("<text x='%.1f' y='%.1f' text-anchor='%s' %s>", x, y, anchor, more) +
         escaped(text) + "</text>\n";
}

std::string axes(const Chart& c, const Scale& x, const Scale& y) {
  std::string svg;
  for (int i = 0; i <= y.steps(); ++i) {
    const double v = y.low + i * y.step, at = kBottom - y.part(v) * (kBottom - kTop);
    svg += format("<line class='grid' x1='%.1f' y1='%.1f' x2='%.1f' y2='%.1f'/>\n", kLeft, at,
                  kRight, at);
    svg += text_at(kLeft - 8, at + 4, "end", format("%.4g", v));
  }
  for (int i = 0; i <= x.steps(); ++i) {
    const double v = x.low + i * x.step, at = kLeft + x.part(v) * (kRight - kLeft);
    svg += text_at(at, kBottom + 18, "middle", format("%.4g", v));
  }
  svg += format("<line class='axis' x1='%.1f' y1='%.1f' x2='%.1f' y2='%.1f'/>\n", kLeft, kBottom,
                kRight, kBottom);
  svg += text_at((kLeft + kRight) / 2, kHeight - 14, "middle", c.x_label);
  svg +=
      text_at(0, 0, "middle", c.y_label,
              format("transform='translate(16 %.1f) rotate(-90)'", (kTop + kBottom) / 2).c_str());
  return svg;
}

std::string drawn(const Series& s, size_t number, const Scale& x, const Scale& y) {
  std::string marks, path;
  bool pen_down = false;
  for (size_t i = 0; i < s.x.size(); ++i) {
    if (!std::isfinite(s.x[i]) || !std::isfinite(s.y[i])) {
      pen_down = false;
      continue;
    }
    const double h = kLeft + x.part(s.x[i]) * (kRight - kLeft);
    const double v = kBottom - y.part(s.y[i]) * (kBottom - kTop);
    if (s.points)
      marks += format("<circle class='p%zu' cx='%.1f' cy='%.1f' r='3.5'/>\n", number, h, v);
    else
      path += format("%c%.1f %.1f", pen_down ? 'L' : 'M', h, v);
    pen_down = true;
  }
  return s.points ? marks : format("<path class='l%zu' d='%s'/>\n", number, path.c_str());
}

constexpr const char* kStyle =
    R"(:root{color-scheme:light dark;--ink:#1c1e21;--dim:#5b616b;--paper:#fff;--line:#d9dce1;--head:#f3f4f6;
--c0:#1f6feb;--c1:#c2410c;--c2:#15803d;--c3:#7e22ce}
@media(prefers-color-scheme:dark){:root{--ink:#e6e8eb;--dim:#9aa1ac;--paper:#15171a;--line:#33373d;
--head:#1f2226;--c0:#6ea8ff;--c1:#ff9a5c;--c2:#5fd38a;--c3:#c792ff}}
body{margin:0 auto;max-width:60rem;padding:2rem 1.2rem 4rem;background:var(--paper);color:var(--ink);
font:16px/1.55 system-ui,sans-serif}
h1{font-size:1.7rem;line-height:1.25}h2{font-size:1.2rem;margin:2.6rem 0 .6rem}
p{max-width:46rem;color:var(--dim);margin:.4rem 0 1rem}
.wide{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:.35rem .8rem;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap}
th{background:var(--head);font-weight:600}th:first-child,td:first-child{text-align:left}
img{max-width:100%;height:auto;image-rendering:pixelated;border-radius:4px;display:block;margin:.6rem 0}
svg{max-width:100%;height:auto;display:block}svg text{fill:var(--dim);font-size:12px}
svg .title{fill:var(--ink);font-size:14px;font-weight:600}.grid{stroke:var(--line)}
.axis{stroke:var(--dim)}path{fill:none;stroke-width:2}
.l0{stroke:var(--c0)}.l1{stroke:var(--c1)}.l2{stroke:var(--c2)}.l3{stroke:var(--c3)}
.p0{fill:var(--c0)}.p1{fill:var(--c1)}.p2{fill:var(--c2)}.p3{fill:var(--c3)})";

}  // namespace

std::string escaped(const std::string& text) {
  std::string out;
  for (char c : text) switch (c) {
      case '&':
        out += "&amp;";
        break;
      case '<':
        out += "&lt;";
        break;
      case '>':
        out += "&gt;";
        break;
      case '"':
        out += "&quot;";
        break;
      default:
        out += c;
    }
  return out;
}

std::string heading(const std::string& text) { return "<h2>" + escaped(text) + "</h2>\n"; }
std::string paragraph(const std::string& text) { return "<p>" + escaped(text) + "</p>\n"; }

std::string table(const std::vector<std::string>& head,
                  const std::vector<std::vector<std::string>>& rows) {
  const auto row = [](const std::vector<std::string>& cells, const char* tag) {
    std::string text = "<tr>";
    for (const std::string& cell : cells)
      text += format("<%s>", tag) + escaped(cell) + format("</%s>", tag);
    return text + "</tr>\n";
  };
  std::string text = "<div class='wide'><table>\n" + row(head, "th");
  for (const auto& cells : rows) text += row(cells, "td");
  return text + "</table></div>\n";
}

std::string picture(const std::string& path, const std::string& alt) {
  return "<img alt=\"" + escaped(alt) + "\" src=\"data:image/png;base64," +
         base64(read_small_file(path, kMaxPicture)) + "\">\n";
}

std::string chart(const Chart& c) {
  const Scale x(c, &Series::x), y(c, &Series::y);
  std::string svg = format("<svg viewBox='0 0 %.0f %.0f' width='%.0f' role='img' aria-label=\"",
                           kWidth, kHeight, kWidth) +
                    escaped(c.title) + "\">\n";
  svg += text_at(kLeft, 18, "start", c.title, "class='title'") + axes(c, x, y);
  for (size_t i = 0; i < c.series.size(); ++i) {
    svg += drawn(c.series[i], i, x, y);
    if (c.series[i].name.empty()) continue;
    const double at = kTop + 12 + 18 * static_cast<double>(i);
    svg += format("<circle class='p%zu' cx='%.1f' cy='%.1f' r='4'/>\n", i, kRight - 8, at - 4);
    svg += text_at(kRight - 18, at, "end", c.series[i].name);
  }
  return svg + "</svg>\n";
}

std::string page(const std::string& title, const std::string& body) {
  return "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n"
         "<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n<title>" +
         escaped(title) + "</title>\n<style>\n" + kStyle + "\n</style>\n</head>\n<body>\n<h1>" +
         escaped(title) + "</h1>\n" + body + "</body>\n</html>\n";
}

}  // namespace ddpm::tools::html
