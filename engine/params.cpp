#include "engine/params.h"

#include <cmath>
#include <numbers>

#include "kernels/philox.h"

namespace ddpm {
namespace {

constexpr int64_t kAlignment = 16;  // elements: 64 bytes

int64_t aligned(int64_t count) { return (count + kAlignment - 1) / kAlignment * kAlignment; }

// Limit of Glorot's uniform distribution: sqrt(3 scale / n), n = (fan_in + fan_out) / 2.
double glorot_limit(const Param& p, const ParamPiece& piece) {
  const double taps = static_cast<double>(p.shape.h) * p.shape.w;
  const double fan_in = taps * p.shape.c, fan_out = taps * piece.rows;
  const double scale = piece.init == Init::kNearZero ? 1e-10 : 1.0;
  return std::sqrt(3.0 * scale / ((fan_in + fan_out) / 2));
}

float initial_value(const Param& p, const ParamPiece& piece, const Philox4& words, int lane) {
  switch (piece.init) {
    case Init::kZeros:
      return 0;
    case Init::kOnes:
      return 1;
    case Init::kGlorot:
    case Init::kNearZero: {
      const double u = static_cast<double>(words[static_cast<size_t>(lane)]) * 0x1p-31 - 1.0;
      return static_cast<float>(u * glorot_limit(p, piece));
    }
    case Init::kNormal: {
      const size_t pair = static_cast<size_t>(lane / 2 * 2);
      const double radius = std::sqrt(-2.0 * std::log(double{uniform_open(words[pair])}));
      const double angle = 2 * std::numbers::pi * double{uniform_open(words[pair + 1])};
      return static_cast<float>(radius * (lane % 2 == 0 ? std::cos(angle) : std::sin(angle)));
    }
  }
  return 0;
}

}  // namespace

int Params::add(Param param) {
  int rows = 0;
  for (const ParamPiece& piece : param.pieces) rows += piece.rows;
  DDPM_CHECK(rows == param.rows(), "parameter %s: pieces cover %d of %d rows", param.name.c_str(),
             rows, param.rows());
  for (const Param& p : params_)
    DDPM_CHECK(p.name != param.name, "parameter %s is defined twice", param.name.c_str());
  params_.push_back(std::move(param));
  return static_cast<int>(params_.size()) - 1;
}

void Params::lay_out() {
  arena_size_ = 0;
  for (auto p = params_.rbegin(); p != params_.rend(); ++p) {
    p->offset = arena_size_;
    arena_size_ += aligned(p->shape.count());
  }
}

int64_t Params::count() const {
  int64_t total = 0;
  for (const Param& p : params_) total += p.shape.count();
  return total;
}

std::vector<float> Params::initial_values(uint64_t seed, int param) const {
  uint16_t layer = 0;  // pieces are numbered through all parameters, in definition order
  for (int i = 0; i < param; ++i) layer += static_cast<uint16_t>((*this)[i].pieces.size());
  const Param& p = (*this)[param];
  std::vector<float> all(static_cast<size_t>(p.shape.count()));
  float* values = all.data();
  for (const ParamPiece& piece : p.pieces) {
    const RandomStream stream{.seed = seed, .purpose = Purpose::kWeights, .layer = layer++};
    const int64_t count = piece.rows * p.row_size();
    for (int64_t i = 0; i < count; i += 4) {
      const Philox4 words = stream.block(static_cast<uint32_t>(i / 4));
      for (int lane = 0; lane < 4 && i + lane < count; ++lane)
        values[i + lane] = initial_value(p, piece, words, lane);
    }
    values += count;
  }
  return all;
}

void Params::activate_zero_layers() {
  for (Param& p : params_)
    for (ParamPiece& piece : p.pieces)
      if (piece.init == Init::kNearZero) piece.init = Init::kGlorot;
}

int64_t CheckpointTensor::count() const {
  int64_t total = 1;
  for (uint64_t extent : shape) total *= static_cast<int64_t>(extent);
  return total;
}

std::vector<CheckpointTensor> checkpoint_tensors(const Params& params) {
  std::vector<CheckpointTensor> tensors;
  for (size_t i = 0; i < params.all().size(); ++i) {
    const Param& p = params.all()[i];
    int row = 0;
    for (const ParamPiece& piece : p.pieces) {
      std::vector<uint64_t> shape{static_cast<uint64_t>(piece.rows)};
      if (p.rank >= 2) shape.push_back(static_cast<uint64_t>(p.shape.c));
      if (p.rank == 4) {
        shape.push_back(static_cast<uint64_t>(p.shape.h));
        shape.push_back(static_cast<uint64_t>(p.shape.w));
      }
      tensors.push_back({piece.key, std::move(shape), static_cast<int>(i), row, piece.rows});
      row += piece.rows;
    }
  }
  return tensors;
}

namespace {

// Calls f(index in the arena's rows, index in the checkpoint tensor) for every element.
template <typename F>
void for_each_element(const Params& params, const CheckpointTensor& t, const F& f) {
  const Param& p = params[t.param];
  const int64_t taps = int64_t{p.shape.h} * p.shape.w, channels = p.rank == 1 ? 1 : p.shape.c;
  for (int64_t k = 0; k < t.rows; ++k)
    for (int64_t tap = 0; tap < taps; ++tap)
      for (int64_t c = 0; c < channels; ++c)
        f((k * taps + tap) * channels + c, (k * channels + c) * taps + tap);
}

}  // namespace

void to_checkpoint(const Params& params, const CheckpointTensor& t, const float* rows,
                   float* tensor) {
  for_each_element(params, t, [&](int64_t a, int64_t b) { tensor[b] = rows[a]; });
}

void from_checkpoint(const Params& params, const CheckpointTensor& t, const float* tensor,
                     float* rows) {
  for_each_element(params, t, [&](int64_t a, int64_t b) { rows[a] = tensor[b]; });
}

}  // namespace ddpm
