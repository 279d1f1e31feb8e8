// The trainer of a run's config and the data it names, for whatever runs its steps.
#pragma once

#include <memory>

#include "model/run_config.h"
#include "model/trainer.h"

namespace ddpm::tools {

// The data set, checked against the model and the batch; Error(kConfig) where it does not fit.
Dataset load_run_data(const RunConfig&);
// Its weights are zero until it is initialized or loads a checkpoint.
std::unique_ptr<Trainer> make_trainer(Backend&, const RunConfig&, Dataset data,
                                      const Parts& parts = {});

}  // namespace ddpm::tools
