// The page of `ddpm paper`: its pieces, and a whole one of a small model.
#include <catch2/catch.hpp>

#include <filesystem>
#include <limits>
#include <nlohmann/json.hpp>
#include <regex>

#include "tests/child.h"
#include "tests/small_model.h"
#include "tests/temp_folder.h"
#include "tools/html.h"

using namespace ddpm;
using namespace ddpm::test;
namespace html = ddpm::tools::html;

TEST_CASE("paper: text is escaped, pictures are within", "[paper]") {
  CHECK(html::escaped("a<b> & \"c\"") == "a&lt;b&gt; &amp; &quot;c&quot;");
  CHECK(html::table({"x", "y"}, {{"<1>", "2"}}).find("<td>&lt;1&gt;</td><td>2</td>") !=
        std::string::npos);
  const TempFolder tmp;
  // RFC 4648, section 10.
  for (const auto& [bytes, text] : std::map<std::string, std::string>{{"f", "Zg=="},
                                                                      {"fo", "Zm8="},
                                                                      {"foo", "Zm9v"},
                                                                      {"foobar", "Zm9vYmFy"},
                                                                      {"\xff\xfe", "//4="}}) {
    put_bytes(tmp / "p.png", bytes);
    CHECK(html::picture(tmp / "p.png", "p") ==
          "<img alt=\"p\" src=\"data:image/png;base64," + text + "\">\n");
  }
}

namespace {

// The points of a chart's first line.
std::vector<std::pair<double, double>> line_of(const std::string& svg) {
  const size_t begin = svg.find("d='") + 3;
  const std::string path = svg.substr(begin, svg.find('\'', begin) - begin);
  std::vector<std::pair<double, double>> points;
  const std::regex point("[ML]([-0-9.]+) ([-0-9.]+)");
  for (std::sregex_iterator at(path.begin(), path.end(), point), end; at != end; ++at)
    points.emplace_back(std::stod((*at)[1]), std::stod((*at)[2]));
  return points;
}

}  // namespace

TEST_CASE("paper: a chart's line goes where its values are", "[paper]") {
  // The scale goes from 0 to 10 and from -4 to 4; the plot from 70 to 620 and 286 to 34.
  const std::string svg = html::chart({"a < b", "x", "y", {{"one", {0, 5, 10}, {-4, 0, 4}}}});
  CHECK(line_of(svg) == std::vector<std::pair<double, double>>{{70, 286}, {345, 160}, {620, 34}});
  CHECK(svg.find("a &lt; b") != std::string::npos);
  CHECK(svg.find(">10</text>") != std::string::npos);
  CHECK(svg.find(">-4</text>") != std::string::npos);
  // What is not finite is a gap, and changes no scale.
  const double nan = std::numeric_limits<double>::quiet_NaN();
  const std::string gap = html::chart({"", "", "", {{"", {0, 4, 5, 10}, {-4, nan, -nan, 4}}}});
  CHECK(line_of(gap) == std::vector<std::pair<double, double>>{{70, 286}, {620, 34}});
  CHECK(gap.find("M70.0 286.0M620.0 34.0") != std::string::npos);
  // One value, none, and points.
  CHECK(line_of(html::chart({"", "", "", {{"", {3}, {3}}}})).size() == 1);
  const std::string none = html::chart({"", "", "", {}});
  CHECK(none.find("<svg") == 0);
  CHECK(none.find("nan") == std::string::npos);
  const std::string points = html::chart({"", "", "", {{"", {0, 1}, {0, 1}, true}}});
  CHECK(points.find("<path") == std::string::npos);
  CHECK(points.find("cx='620.0' cy='34.0'") != std::string::npos);
}

TEST_CASE("paper: a whole page holds everything it shows, and eval's numbers", "[paper]") {
  const TempFolder tmp;
  UNetConfig unet = small_unet();
  SchedulerConfig scheduler;
  scheduler.num_train_timesteps = 20;
  save_small_model(tmp / "model", unet, scheduler);
  const std::string out = tmp / "page.html", log = tmp / "log";
  const std::string common = " --model " + (tmp / "model") + " --data shapes --num 3 --threads 1";
  REQUIRE(Child("paper" + common + " --steps 10 --out " + out, log).wait() == 0);
  const std::string page = get_bytes(out);
  CHECK(page.find("<!doctype html>") == 0);
  CHECK(page.find("http") == std::string::npos);  // loads nothing
  size_t pictures = 0;
  for (size_t at = 0; (at = page.find("src=", at)) != std::string::npos; ++at, ++pictures)
    CHECK(page.substr(at, 27) == "src=\"data:image/png;base64,");
  CHECK(pictures == 4);
  CHECK_FALSE(std::filesystem::exists(out + ".pieces"));

  const std::string json = tmp / "nll.json";
  REQUIRE(Child("eval" + common + " --out " + json, log).wait() == 0);
  const auto nll = nlohmann::json::parse(get_bytes(json));
  const double bits = nll["bits_per_dim"];
  CHECK(page.find(format("<td>this model</td><td>%.3f</td><td>+- %.3f</td>", bits,
                         nll["ci95"].get<double>())) != std::string::npos);
  const double prior = nll["prior"], decoder = nll["decoder"];
  CHECK(page.find(format("<td>%.2g</td><td>%.3f</td><td>%.3f</td>", prior, bits - prior - decoder,
                         decoder)) != std::string::npos);
  REQUIRE(Child("eval --metric rd" + common + " --out " + json, log).wait() == 0);
  const auto rd = nlohmann::json::parse(get_bytes(json));
  for (const auto& row : rd["rows"])
    CHECK(page.find(format("<tr><td>%d</td><td>%.5f</td><td>%.5f</td><td>-</td>",
                           row["reverse_time"].get<int>(), row["rate"].get<double>(),
                           row["distortion"].get<double>())) != std::string::npos);
}

TEST_CASE("paper: what a signal stops goes on, to the same page", "[paper]") {
  const TempFolder tmp;
  SchedulerConfig scheduler;
  scheduler.num_train_timesteps = 100;
  save_small_model(tmp / "model", small_unet(), scheduler);
  const std::vector<std::string> words{
      "paper", "--model",   tmp / "model", "--data",  "shapes",      "--num",
      "40",    "--sampler", "ddim",        "--steps", "5",           "--batch-size",
      "1",     "--threads", "1",           "--out",   tmp / "a.html"};
  std::string command;
  for (size_t i = 0; i + 1 < words.size(); ++i) command += words[i] + " ";
  REQUIRE(Child(command + (tmp / "b.html"), tmp / "log").wait() == 0);
  CHECK(stopped_program(words, tmp / "log", "images  ") == 75);
  CHECK(std::filesystem::exists(tmp / "a.html.pieces/bound"));
  CHECK_FALSE(std::filesystem::exists(tmp / "a.html"));
  REQUIRE(Child(command + (tmp / "a.html"), tmp / "log").wait() == 0);
  CHECK(get_bytes(tmp / "log").find("resumed") != std::string::npos);
  CHECK((get_bytes(tmp / "a.html") == get_bytes(tmp / "b.html")));
}

TEST_CASE("paper: what it cannot use is named", "[paper]") {
  const TempFolder tmp;
  save_small_model(tmp / "model", small_unet(), SchedulerConfig{});
  const std::string model = "paper --data shapes --model " + (tmp / "model");
  const auto run = [&](const std::string& command) {
    const int code = Child(command, tmp / "log").wait();
    return std::pair(code, get_bytes(tmp / "log"));
  };
  CHECK(run(model + " --out page.pdf").first == 2);
  CHECK(run(model + " --fid-num 10").first == 2);
  CHECK(run("paper --data shapes --model " + (tmp / "none")).first == 3);
  const auto [code, text] =
      run(model + " --inception " + (tmp / "none") + " --num 1 --out " + (tmp / "p.html"));
  CHECK(code == 3);
  CHECK(text.find("convert_inception.py") != std::string::npos);
  CHECK_FALSE(std::filesystem::exists(tmp / "p.html.pieces"));  // said before hours of work
}
