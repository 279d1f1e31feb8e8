// The bound of a data set, as `ddpm eval` and `ddpm paper` want it.
#pragma once

#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>

#include "model/bound_sums.h"
#include "tools/commands.h"
#include "tools/stop_signal.h"

namespace ddpm::tools {

// What is there of args' model and data in `file` is gone on from, and kept there, now and then and
// when a signal comes ("": neither); nothing where one has. Of args, metric and out are not read.
std::optional<BoundSums> evaluate_bound(const EvalArgs&, const std::string& file,
                                        const StopSignal* stop);

// "bits_per_dim", "ci95", "prior", "decoder", "terms".
nlohmann::ordered_json nll_json(const BoundSums&);
// "rows" of the paper's table 4, "prior", "rate", "distortion".
nlohmann::ordered_json rd_json(const BoundSums&);

}  // namespace ddpm::tools
