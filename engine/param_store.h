// The parameter arenas in a backend's memory, and tensors in and out of them, one at a time.
#pragma once

#include <array>
#include <memory>
#include <vector>

#include "engine/executor.h"
#include "engine/params.h"

namespace ddpm {

class ParamStore {
 public:
  // Allocates the named arenas, filled with zeros.
  ParamStore(Backend& backend, const Params& params, const std::vector<Arena>& arenas);

  const Params& params() const { return params_; }
  ParamArenas arenas() const;
  size_t bytes() const;

  // Initial weights; the EMA, where there is one, starts as their copy.
  void initialize(uint64_t seed);
  // A whole arena in its own layout, and its XXH3-64.
  std::vector<float> read(Arena arena) const;
  void write(Arena arena, const std::vector<float>& values);
  uint64_t hash(Arena arena) const;
  // A checkpoint tensor in PyTorch's layout.
  void read(Arena arena, const CheckpointTensor& t, std::vector<float>& values) const;
  void write(Arena arena, const CheckpointTensor& t, const std::vector<float>& values);

 private:
  const Memory& memory(Arena arena) const;
  char* address(Arena arena, int param, int row) const;

  Backend& backend_;
  Params params_;
  std::array<std::unique_ptr<Memory>, kArenas> memory_;
};

}  // namespace ddpm
