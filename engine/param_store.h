// The parameter arenas in a backend's memory, and tensors in and out of them, one at a time.
#pragma once

#include <array>
#include <memory>
#include <vector>

#include "engine/executor.h"
#include "engine/params.h"

namespace ddpm {

// What checkpoints are written from.
class ParamReader {
 public:
  virtual ~ParamReader() = default;
  virtual const Params& params() const = 0;
  // A checkpoint tensor in PyTorch's layout.
  virtual void read(Arena arena, const CheckpointTensor& t, std::vector<float>& values) const = 0;
};

class ParamStore final : public ParamReader {
 public:
  // Allocates the named arenas, filled with zeros.
  ParamStore(Backend& backend, const Params& params, const std::vector<Arena>& arenas);

  const Params& params() const override { return params_; }
  ParamArenas arenas() const;
  size_t bytes() const;

  // Initial weights; the EMA, where there is one, starts as their copy.
  void initialize(uint64_t seed);
  // A whole arena in its own layout, and its XXH3-64.
  std::vector<float> read(Arena arena) const;
  void read(Arena arena, std::vector<float>& values) const;  // which it allocates once
  void write(Arena arena, const std::vector<float>& values);
  uint64_t hash(Arena arena) const;
  void read(Arena arena, const CheckpointTensor& t, std::vector<float>& values) const override;
  void write(Arena arena, const CheckpointTensor& t, const std::vector<float>& values);

 private:
  const Memory& memory(Arena arena) const;
  char* address(Arena arena, int param, int row) const;

  Backend& backend_;
  Params params_;
  std::array<std::unique_ptr<Memory>, kArenas> memory_;
};

// What a checkpoint holds, as it was in the store when it was taken: weights, moments, average, in
// the host's memory.
class ParamSnapshot final : public ParamReader {
 public:
  explicit ParamSnapshot(const ParamStore& store) : store_(store) {}
  void take();

  const Params& params() const override { return store_.params(); }
  void read(Arena arena, const CheckpointTensor& t, std::vector<float>& values) const override;

 private:
  const ParamStore& store_;
  std::array<std::vector<float>, kArenas> arenas_;
};

}  // namespace ddpm
