// `ddpm eval --metric fid|is`.
#pragma once

#include "engine/safetensors.h"
#include "tools/commands.h"
#include "tools/ranks.h"
#include "tools/stop_signal.h"

namespace ddpm::tools {

// The weights of Inception-v3; Error(kConfig) unless the file is there.
SafetensorsReader open_inception(const std::string& path);

// All ranks. `stop` is null where there is nothing to keep.
Status run_eval_features(const EvalArgs&, Ranks&, const StopSignal* stop);

}  // namespace ddpm::tools
