// Choices made once and kept: which engine, with which settings, computes what. Part of a run's
// manifest, so that a second start neither measures nor decides again, and computes the same bits.
#pragma once

#include <cstdint>
#include <map>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <utility>
#include <vector>

#include "kernels/cuda/cudnn.h"

namespace ddpm::cuda {

struct PlanChoice {
  std::string variant;  // which of the graphs that compute it
  CudnnEngine engine;
  friend bool operator==(const PlanChoice&, const PlanChoice&) = default;
};

struct PlanTable {
  std::string library;  // what the engines' numbers mean something to, and the device
  std::map<std::string, PlanChoice> choices;
  friend bool operator==(const PlanTable&, const PlanTable&) = default;
};

// {"library": "cuDNN 9.19.0, NVIDIA H100", "plans": {KEY: {"variant": "plain", "engine": 62,
// "knobs": [[TYPE, VALUE], ...]}, ...}}
nlohmann::ordered_json to_json(const PlanTable& table);
// Error(kConfig) naming `name` and what is wrong in it.
PlanTable plan_table_from_json(const nlohmann::json& value, const std::string& name);

}  // namespace ddpm::cuda
