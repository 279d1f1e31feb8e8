#include "engine/param_store.h"

namespace ddpm {

ParamStore::ParamStore(Backend& backend, const Params& params, const std::vector<Arena>& arenas)
    : backend_(backend), params_(params) {
  for (Arena a : arenas)
    memory_[static_cast<size_t>(a)] =
        backend.allocate(static_cast<size_t>(params.arena_size()) * sizeof(float));
}

ParamArenas ParamStore::arenas() const {
  ParamArenas all;
  for (size_t i = 0; i < memory_.size(); ++i)
    all.data[i] = memory_[i] ? memory_[i]->data() : nullptr;
  return all;
}

size_t ParamStore::bytes() const {
  size_t total = 0;
  for (const auto& m : memory_) total += m ? m->size() : 0;
  return total;
}

char* ParamStore::address(Arena arena, int param, int row) const {
  const auto& memory = memory_[static_cast<size_t>(arena)];
  DDPM_CHECK(memory != nullptr, "arena %d is not there", static_cast<int>(arena));
  const Param& p = params_[param];
  return static_cast<char*>(memory->data()) + (p.offset + row * p.row_size()) * sizeof(float);
}

void ParamStore::initialize(uint64_t seed) {
  for (int i = 0; i < static_cast<int>(params_.all().size()); ++i) {
    const std::vector<float> values = params_.initial_values(seed, i);
    for (Arena a : {Arena::kWeights, Arena::kEma})
      if (memory_[static_cast<size_t>(a)])
        backend_.upload(address(a, i, 0), values.data(), values.size() * sizeof(float));
  }
}

void ParamStore::read(Arena arena, const CheckpointTensor& t, std::vector<float>& values) const {
  std::vector<float> rows(static_cast<size_t>(t.count()));
  values.resize(rows.size());
  backend_.download(rows.data(), address(arena, t.param, t.row), rows.size() * sizeof(float));
  to_checkpoint(params_, t, rows.data(), values.data());
}

void ParamStore::write(Arena arena, const CheckpointTensor& t, const std::vector<float>& values) {
  std::vector<float> rows(static_cast<size_t>(t.count()));
  DDPM_CHECK(values.size() == rows.size(), "%s: %zu values for %zu", t.key.c_str(), values.size(),
             rows.size());
  from_checkpoint(params_, t, values.data(), rows.data());
  backend_.upload(address(arena, t.param, t.row), rows.data(), rows.size() * sizeof(float));
}

}  // namespace ddpm
