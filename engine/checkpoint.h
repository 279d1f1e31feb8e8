// Weights and training state in files. The weights file is diffusers' own; the training state holds
// the rest of what a run needs to go on: raw weights and Adam's moments.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "engine/file_io.h"
#include "engine/param_store.h"
#include "engine/safetensors.h"

namespace ddpm {

// Writes one arena under the checkpoint's keys; returns each tensor's XXH3-64.
std::map<std::string, std::string> write_weights(OutputFile& file, const ParamReader& store,
                                                 Arena arena);
// Raw weights, m and v, as "weights.KEY", "adam_m.KEY", "adam_v.KEY"; and, unless it is empty,
// "loss_history" (timesteps, kLossHistoryRow).
std::map<std::string, std::string> write_training_state(OutputFile& file, const ParamReader& store,
                                                        const std::vector<float>& loss_history);

// Values that are not finite: an error, or what a bundle of a failed step holds.
enum class NonFiniteValues { kRefused, kAllowed };

// Loads every tensor of the parameters from a diffusers weights file, old attention names
// (query, key, value, proj_attn) and 1x1-convolution shapes included. Error(kConfig) where the file
// holds other tensors or shapes than the config says, Error(kFile) where a value is not finite.
void load_weights(const SafetensorsReader& file, ParamStore& store, Arena arena,
                  NonFiniteValues nonfinite = NonFiniteValues::kRefused);
// Returns the loss history, empty where the file has none; Error(kFile) where it is not one.
std::vector<float> load_training_state(const SafetensorsReader& file, ParamStore& store,
                                       NonFiniteValues nonfinite = NonFiniteValues::kRefused);

// Error(kFile) naming the tensor whose stored bytes no longer have the hash.
void check_hashes(const SafetensorsReader& file, const std::map<std::string, std::string>& hashes);

}  // namespace ddpm
