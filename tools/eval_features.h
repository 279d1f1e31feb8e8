// `ddpm eval --metric fid|is`.
#pragma once

#include "tools/commands.h"

namespace ddpm::tools {

Status run_eval_features(const EvalArgs&);

}  // namespace ddpm::tools
