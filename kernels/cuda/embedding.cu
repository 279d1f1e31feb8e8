// Rows of tables: embeddings of classes, of the timestep, and the row of a sampler's step. All
// fp32.
//
// embedding and step_row write N dim elements and read as many, fewer where images share a row;
// embedding_backward writes rows dim and reads N dim. At N = 128 and a few thousand columns that
// is 5 MB at most: a microsecond or two of memory time, so a launch's latency is what they cost.
// time_embedding writes N dim from N integers, some 60 double-precision operations a pair.
#include <bit>
#include <cmath>
#include <initializer_list>

#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/divisor.h"
#include "kernels/cuda/vec.h"

namespace ddpm::cuda {
namespace {

// What an image gets whose row is not in the table: the check for values that are not finite finds
// it, and nothing outside is read.
constexpr uint32_t kNaN = 0x7FC00000u;

template <int V, typename From>
__device__ __forceinline__ void load_row(const From& table, int64_t row, int rows, int dim, int c,
                                         float (&v)[V]) {
  if (row >= 0 && row < rows) {
    load_floats<float>(table + (row * dim + c), v);
  } else {
#pragma unroll
    for (int j = 0; j < V; ++j) v[j] = std::bit_cast<float>(kNaN);
  }
}

// Thread i has run i of V columns of y, `per_row` of them an image.
template <int V>
__global__ void embedding_kernel(Global<const float> table, Global<const int32_t> index,
                                 Global<float> y, uint32_t runs, Divisor per_row, int rows, int dim,
                                 bool add) {
  const uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= runs) return;
  uint32_t run;
  const uint32_t image = per_row.divide(i, run);
  float v[V];
  load_row(table, index[image], rows, dim, static_cast<int>(run) * V, v);
  if (add) {
    float old[V];
    load_floats<float>(y + int64_t{i} * V, old);
#pragma unroll
    for (int j = 0; j < V; ++j) v[j] += old[j];
  }
  store_floats<float>(y + int64_t{i} * V, v);
}

template <int V>
__global__ void step_row_kernel(Global<const float> table, Global<const StepState> state,
                                Global<float> y, uint32_t runs, Divisor per_row, int rows,
                                int dim) {
  const uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= runs) return;
  uint32_t run;
  per_row.divide(i, run);
  const StepState s = state[0];
  float v[V];
  load_row(table, static_cast<int64_t>(s.step), rows, dim, static_cast<int>(run) * V, v);
  store_floats<float>(y + int64_t{i} * V, v);
}

// A block has a row of the table and a tile of its columns, and adds its images in order.
template <int V>
__global__ void embedding_backward_kernel(Global<const int32_t> index, Global<const float> dy,
                                          Global<float> dtable, int n, int dim, bool add) {
  const int c = static_cast<int>(blockIdx.y * blockDim.x + threadIdx.x) * V;
  if (c >= dim) return;
  const int row = static_cast<int>(blockIdx.x);
  const int64_t at = int64_t{row} * dim + c;
  float sum[V] = {};
  if (add) load_floats<float>(dtable + at, sum);
#pragma unroll 4
  for (int i = 0; i < n; ++i) {
    if (index[i] != row) continue;
    float v[V];
    load_floats<float>(dy + (int64_t{i} * dim + c), v);
#pragma unroll
    for (int j = 0; j < V; ++j) sum[j] += v[j];
  }
  store_floats<float>(dtable + at, sum);
}

// 1 - x/(k (k+1)) (1 - x/((k+2) (k+3)) (1 - ...)), k from First to Last: of x = r^2 it is cos r
// from 1 on, and sin r / r from 2 on. For |r| <= pi/4 what is left out is below 1e-14.
template <int First, int Last>
__device__ __forceinline__ double series(double x) {
  double sum = 1;
#pragma unroll
  for (int k = Last; k >= First; k -= 2) sum = 1 - x * (1.0 / (k * (k + 1))) * sum;
  return sum;
}

// Thread i has a pair (sin, cos) of an image: all in double, since angles reach 999 rad and more.
__global__ void time_embedding_kernel(Global<const int32_t> t, Global<float> y, uint32_t pairs,
                                      Divisor per_image, int timesteps, int half, int dim,
                                      double rate, bool flip) {
  const uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= pairs) return;
  uint32_t k;
  const uint32_t image = per_image.divide(i, k);
  const int step = t[image];
  const double angle = step * exp(rate * k);
  // angle = quarter pi/2 + r; the product's rounding is below 1e-16 of the angle.
  const double quarter = rint(angle * 0.63661977236758134308),
               r = angle - quarter * 1.57079632679489661923;
  const int turn = static_cast<int>(quarter) & 3;
  const double s = r * series<2, 14>(r * r), c = series<1, 15>(r * r);
  float sine = static_cast<float>(turn % 2 == 0 ? s : c);
  float cosine = static_cast<float>(turn % 2 == 0 ? c : s);
  if (turn >= 2) sine = -sine;
  if (turn == 1 || turn == 2) cosine = -cosine;
  if (step < 0 || step >= timesteps) sine = cosine = std::bit_cast<float>(kNaN);
  const Global<float> row = y + int64_t{image} * dim;
  row[static_cast<int>(k)] = flip ? cosine : sine;
  row[half + static_cast<int>(k)] = flip ? sine : cosine;
  if (k == 0 && dim > 2 * half) row[2 * half] = 0.0f;
}

void check(const char* op, int n, int rows, int dim, std::initializer_list<int> slots) {
  DDPM_CHECK(n > 0 && rows > 0 && dim > 0 && int64_t{n} * dim < int64_t{1} << 31,
             "%s: %d images, a table of %d rows of %d", op, n, rows, dim);
  for (const int slot : slots)
    DDPM_CHECK(slot >= 0, "%s: %d images of %d: a tensor is absent", op, n, dim);
}

// f.template operator()<V>(), V columns being 16 bytes where rows are multiples of that.
template <typename F>
Call by_width(int dim, F f) {
  return dim % 4 == 0 ? f.template operator()<4>() : f.template operator()<1>();
}

}  // namespace

Call CudaBackend::embedding(int n, int rows, int dim, In table, In index, Out y, Write write) {
  check("embedding", n, rows, dim, {table.slot, index.slot, y.slot});
  return by_width(dim, [=]<int V>() -> Call {
    const auto runs = static_cast<uint32_t>(int64_t{n} * dim / V);
    return {"embedding", {table, index}, {y}, 0, [=, per_row = Divisor(dim / V)](const Run& r) {
              launch<embedding_kernel<V>>({.grid_x = blocks_for(runs, 1)}, r.stream,
                                          r.in<float>(table), r.in<int32_t>(index), r.out<float>(y),
                                          runs, per_row, rows, dim, write == Write::kAccumulate);
            }};
  });
}

Call CudaBackend::embedding_backward(int n, int rows, int dim, In index, In dy, Out dtable,
                                     Write write) {
  check("embedding_backward", n, rows, dim, {index.slot, dy.slot, dtable.slot});
  return by_width(dim, [=]<int V>() -> Call {
    constexpr unsigned kBlock = 128;
    const LaunchShape shape{.grid_x = static_cast<unsigned>(rows),
                            .grid_y = blocks_for(dim, V, kBlock),
                            .block = kBlock};
    return {"embedding_backward", {index, dy}, {dtable}, 0, [=](const Run& r) {
              launch<embedding_backward_kernel<V>>(shape, r.stream, r.in<int32_t>(index),
                                                   r.in<float>(dy), r.out<float>(dtable), n, dim,
                                                   write == Write::kAccumulate);
            }};
  });
}

Call CudaBackend::time_embedding(const TimeEmbeddingDesc& d, In t, Out y) {
  check("time_embedding", d.n, d.timesteps, d.dim, {t.slot, y.slot});
  const int half = d.dim / 2;
  const float intervals = static_cast<float>(half) - d.freq_shift;
  if (!(intervals > 0))
    fail(Status::kConfig, "time_embedding: %d channels with freq_shift %g; use more channels",
         d.dim, static_cast<double>(d.freq_shift));
  const double rate = -std::log(10000.0) / static_cast<double>(intervals);
  const auto pairs = static_cast<uint32_t>(int64_t{d.n} * half);
  return {"time_embedding", {t}, {y}, 0, [=, per_image = Divisor(half)](const Run& r) {
            launch<time_embedding_kernel>({.grid_x = blocks_for(pairs, 1, 128), .block = 128},
                                          r.stream, r.in<int32_t>(t), r.out<float>(y), pairs,
                                          per_image, d.timesteps, half, d.dim, rate,
                                          d.flip_sin_to_cos);
          }};
}

Call CudaBackend::step_row(int n, int rows, int dim, In table, In state, Out y) {
  check("step_row", n, rows, dim, {table.slot, state.slot, y.slot});
  return by_width(dim, [=]<int V>() -> Call {
    const auto runs = static_cast<uint32_t>(int64_t{n} * dim / V);
    return {"step_row", {table, state}, {y}, 0, [=, per_row = Divisor(dim / V)](const Run& r) {
              launch<step_row_kernel<V>>({.grid_x = blocks_for(runs, 1)}, r.stream,
                                         r.in<float>(table), r.in<StepState>(state),
                                         r.out<float>(y), runs, per_row, rows, dim);
            }};
  });
}

}  // namespace ddpm::cuda
