// The bound of a data set, as `ddpm eval` and `ddpm paper` want it.
#pragma once

#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>

#include "model/bound_sums.h"
#include "tools/commands.h"
#include "tools/ranks.h"
#include "tools/stop_signal.h"

namespace ddpm::tools {

// The device for a bound: its result must not hang on --batch-size.
DeviceOptions bound_device(const DeviceOptions&);

// All ranks, of such a device: the sums, the same on each. What is there of args' model and data in
// `file` is gone on from, and kept there, now and then and when a signal comes ("": neither);
// nothing where one has. Of args, metric, out, device and ranks are not read.
std::optional<BoundSums> evaluate_bound(const EvalArgs&, const std::string& file,
                                        const StopSignal* stop, Ranks&);

// "bits_per_dim", "ci95", "prior", "decoder", "terms".
nlohmann::ordered_json nll_json(const BoundSums&);
// "rows" of the paper's table 4, "prior", "rate", "distortion".
nlohmann::ordered_json rd_json(const BoundSums&);

}  // namespace ddpm::tools
