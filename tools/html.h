// Pieces of one self-contained HTML page: text, tables, pictures and line charts as SVG. The page
// follows the reader's light or dark setting and loads nothing.
#pragma once

#include <string>
#include <vector>

namespace ddpm::tools::html {

std::string escaped(const std::string& text);
std::string heading(const std::string& text);
std::string paragraph(const std::string& text);
// The first column is text, the others are set right.
std::string table(const std::vector<std::string>& head,
                  const std::vector<std::vector<std::string>>& rows);
// A PNG file, within the page. `alt` says what it shows.
std::string picture(const std::string& path, const std::string& alt);

struct Series {
  std::string name;
  std::vector<double> x, y;  // values that are not finite leave a gap
  bool points = false;       // marks instead of a line
};
struct Chart {
  std::string title, x_label, y_label;
  std::vector<Series> series;  // at most four
};
std::string chart(const Chart&);

std::string page(const std::string& title, const std::string& body);

}  // namespace ddpm::tools::html
