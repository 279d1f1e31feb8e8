// What a run logs: metrics.jsonl, and the same numbers for TensorBoard in tensorboard/.
#pragma once

#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>

#include "tools/event_file.h"

namespace ddpm::tools {

// Seconds of a step by the last line of the run in `out` up to `step`, which is of so many images
// and ranks; nothing where it is of others, or there is none.
std::optional<double> last_step_seconds(const std::string& out, uint64_t step, int batch_size,
                                        int ranks);

class Metrics {
 public:
  // Of the run in `out`, which is at `step`: lines of later steps are dropped, since they will be
  // made again.
  Metrics(const std::string& out, uint64_t step);

  // A line with "step"; its numbers, lists left out, go to TensorBoard as well.
  void add(const nlohmann::ordered_json& line);

 private:
  AppendFile lines_;
  EventFile events_;
};

}  // namespace ddpm::tools
