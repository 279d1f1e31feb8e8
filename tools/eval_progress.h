// What `ddpm eval` has added up so far, in a file beside its result.
#pragma once

#include <map>
#include <string>

#include "model/bound_sums.h"

namespace ddpm::tools {

// What the sums are of, by name: "model" -> its hash, ...
using Evaluation = std::map<std::string, std::string>;

// Error(kConfig) where the file at `path` is of another evaluation, naming what differs.
void require_evaluation(const std::string& path, const Evaluation& then, const Evaluation& now);

// The same in a line, with the batch: what ranks must have in common.
std::string settings_of(const Evaluation&, int batch_size);

struct EvalProgress {
  Evaluation of;
  std::string numerics;  // Backend::numerics()
  BoundSums sums;
};

void write_eval_progress(const std::string& path, const EvalProgress&);
// Error(kConfig) where the file is of another evaluation, naming what differs, and Error(kFile)
// where it is none. `timesteps`: of the model.
EvalProgress read_eval_progress(const std::string& path, const Evaluation& of, int timesteps);

// The file's text, and what it says: for other ranks than the one that reads it.
std::string eval_text(const EvalProgress&);
EvalProgress parse_eval_progress(const std::string& text, const std::string& path,
                                 const Evaluation& of, int timesteps);

}  // namespace ddpm::tools
