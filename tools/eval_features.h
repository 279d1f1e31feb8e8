// `ddpm eval --metric fid|is`.
#pragma once

#include "engine/safetensors.h"
#include "tools/commands.h"

namespace ddpm::tools {

// The weights of Inception-v3; Error(kConfig) unless the file is there.
SafetensorsReader open_inception(const std::string& path);

Status run_eval_features(const EvalArgs&);

}  // namespace ddpm::tools
