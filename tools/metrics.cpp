#include "tools/metrics.h"

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <nlohmann/json.hpp>
#include <vector>

namespace ddpm::tools {
namespace {

double seconds_since_1970() {
  const auto now = std::chrono::system_clock::now().time_since_epoch();
  return std::chrono::duration<double>(now).count();
}

constexpr size_t kMostBytes = size_t{1} << 30;

// Tells `each` the lines up to `step`, as they stand and parsed.
template <typename F>
void for_lines(const std::string& text, uint64_t step, F each) {
  for (size_t at = 0; at < text.size();) {
    const size_t end = std::min(text.find('\n', at), text.size());
    const std::string line = text.substr(at, end - at);
    at = end + 1;
    const auto json = nlohmann::json::parse(line, nullptr, false);
    if (json.is_object() && json.contains("step") && json["step"].is_number_unsigned() &&
        json["step"].get<uint64_t>() <= step)
      each(line, json);
  }
}

// Leaves the lines up to `step` in the file of that path.
std::string kept_lines(const std::string& path, uint64_t step) {
  if (!file_exists(path)) return path;
  const std::string text = read_small_file(path, kMostBytes);
  std::string kept;
  for_lines(text, step, [&](const std::string& line, const auto&) { kept += line + "\n"; });
  if (kept != text) write_file(path, kept);
  return path;
}

// A new one for each start.
std::string event_path(const std::string& out, double now) {
  make_folders(out + "/tensorboard");
  return format("%s/tensorboard/events.out.tfevents.%.0f.%d", out.c_str(), now,
                static_cast<int>(::getpid()));
}

}  // namespace

std::optional<double> last_step_seconds(const std::string& out, uint64_t step, int batch_size,
                                        int ranks) {
  const std::string path = out + "/metrics.jsonl";
  if (!file_exists(path)) return std::nullopt;
  nlohmann::json last;
  for_lines(read_small_file(path, kMostBytes), step,
            [&](const std::string&, const auto& json) { last = json; });
  const auto number = [&](const char* key) {
    return last.contains(key) && last[key].is_number() ? last[key].get<double>() : 0.0;
  };
  const double rate = number("images_per_second");
  if (rate <= 0 || std::max(number("ranks"), 1.0) != ranks) return std::nullopt;
  return batch_size / rate;
}

Metrics::Metrics(const std::string& out, uint64_t step)
    : lines_(kept_lines(out + "/metrics.jsonl", step)),
      events_(event_path(out, seconds_since_1970()), seconds_since_1970(), step + 1) {}

void Metrics::add(const nlohmann::ordered_json& line) {
  lines_.append_line(line.dump());
  std::vector<EventFile::Scalar> scalars;
  for (const auto& [key, value] : line.items())
    if (key != "step" && value.is_number()) scalars.push_back({key.c_str(), value.get<double>()});
  events_.add(seconds_since_1970(), line["step"].get<uint64_t>(), scalars);
}

}  // namespace ddpm::tools
