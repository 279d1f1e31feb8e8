// A model on disk: a diffusers pipeline folder, which is also this program's checkpoint.
//
//   model_index.json  unet/config.json  unet/diffusion_pytorch_model.safetensors (EMA weights)
//   scheduler/scheduler_config.json     and, in a checkpoint,
//   training_state.safetensors (raw weights, Adam's moments, losses by timestep where timesteps are
//   drawn by them)  manifest.json (step, seed, hashes)
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>

#include "engine/checkpoint.h"
#include "engine/param_store.h"
#include "engine/safetensors.h"
#include "model/config.h"

namespace ddpm {

inline constexpr const char* kVersion = "0.1.0";  // as the build's and ddpm.h's

struct Pipeline {
  std::string folder;   // what was found
  std::string weights;  // path of the weights file
  UNetConfig unet;
  SchedulerConfig scheduler;
};

// From a pipeline folder, a folder with config.json and weights at its root, or a run folder (its
// last checkpoint). Error(kConfig) if it is none of them.
Pipeline open_pipeline(const std::string& path);

// 16 hex digits of the network's configuration and weights: what it computes hangs on nothing else.
std::string model_hash(const Pipeline&);

// The weights of a pipeline or of an open weights file, in an arena laid out for `params`.
std::unique_ptr<ParamStore> load_store(Backend&, const Pipeline&, const Params& params);
std::unique_ptr<ParamStore> load_store(Backend&, const SafetensorsReader&, const Params& params);

struct Manifest {
  uint64_t step = 0, seed = 0;
  int batch_size = 0;
  std::string numerics;               // Backend::numerics() of the run
  std::string plans{};                // Backend::plans(), which a resumed run makes again
  std::vector<float> loss_history{};  // Trainer::loss_history(); stands in the training state
  std::map<std::string, std::map<std::string, std::string>> hashes{};  // by file, by tensor
  std::map<std::string, std::string> files{};                          // of whole text files
};

// Writes a checkpoint folder, complete or not at all; manifest.hashes and files are filled in.
void save_checkpoint(const std::string& folder, const UNetConfig&, const SchedulerConfig&,
                     const ParamReader&, Manifest manifest, FileSystem& fs = FileSystem::real());
// Loads weights, EMA and moments of a checkpoint this program wrote, and checks every hash.
Manifest load_checkpoint(const std::string& folder, ParamStore&,
                         NonFiniteValues nonfinite = NonFiniteValues::kRefused);
Manifest read_manifest(const std::string& folder);

// runs/NAME/checkpoints/step-00001000
std::string checkpoint_folder(const std::string& run, uint64_t step);
// The checkpoints of a run by step, ascending.
std::map<uint64_t, std::string> list_checkpoints(const std::string& run);

}  // namespace ddpm
