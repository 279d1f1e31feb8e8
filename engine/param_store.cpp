#include "engine/param_store.h"

#define XXH_INLINE_ALL
#include <xxhash.h>

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

const Memory& ParamStore::memory(Arena arena) const {
  const auto& memory = memory_[static_cast<size_t>(arena)];
  DDPM_CHECK(memory != nullptr, "arena %d is not there", static_cast<int>(arena));
  return *memory;
}

std::vector<float> ParamStore::read(Arena arena) const {
  std::vector<float> values;
  read(arena, values);
  return values;
}

void ParamStore::read(Arena arena, std::vector<float>& values) const {
  values.resize(static_cast<size_t>(params_.arena_size()));
  backend_.download(values.data(), memory(arena).data(), values.size() * sizeof(float));
}

void ParamStore::write(Arena arena, const std::vector<float>& values) {
  DDPM_CHECK(values.size() == static_cast<size_t>(params_.arena_size()), "%zu values for %lld",
             values.size(), static_cast<long long>(params_.arena_size()));
  backend_.upload(memory(arena).data(), values.data(), values.size() * sizeof(float));
}

uint64_t ParamStore::hash(Arena arena) const {
  const std::vector<float> values = read(arena);
  return XXH3_64bits(values.data(), values.size() * sizeof(float));
}

char* ParamStore::address(Arena arena, int param, int row) const {
  const Param& p = params_[param];
  return static_cast<char*>(memory(arena).data()) + (p.offset + row * p.row_size()) * sizeof(float);
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

void ParamSnapshot::take() {
  for (Arena a : {Arena::kWeights, Arena::kM, Arena::kV, Arena::kEma})
    store_.read(a, arenas_[static_cast<size_t>(a)]);
}

void ParamSnapshot::read(Arena arena, const CheckpointTensor& t, std::vector<float>& values) const {
  const Param& p = params()[t.param];
  values.resize(static_cast<size_t>(t.count()));
  to_checkpoint(params(), t,
                arenas_[static_cast<size_t>(arena)].data() + p.offset + t.row * p.row_size(),
                values.data());
}

}  // namespace ddpm
