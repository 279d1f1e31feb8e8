// The ends of the diffusion graph. Bytes an element, each moved once, which is the least:
//   gather_images  1 read, 4 written (x0 is fp32); a flipped image is read byte by byte
//   q_sample       8 read, 4 or 2 written
//   noisy_batch    1 read, 4 or 2 written: neither x0 nor noise is stored
//   sampler_update 4 + out's + 4 where the row uses `previous`, 8 written; z is not stored
//   image_to_uint8 4 read, 1 written
// CIFAR's batches are limited by latency: a launch, then the twelve dependent Philox rounds that
// find an image, which one thread of a block makes while the others draw noise. Large images are
// limited by memory, except noisy_batch, which draws more than it moves.
#include <algorithm>
#include <cmath>

#include "kernels/cuda/block.h"
#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/image_run.h"
#include "kernels/cuda/normals.h"

namespace ddpm::cuda {
namespace {

constexpr unsigned kBlock = 128;
constexpr int kMaxParts = 32;  // of an image in noisy_batch: finding it again costs a block 1-2 us

// What a slot of the batch holds.
struct Slot {
  int64_t image;
  int32_t flip, t;
};

__device__ Slot find_slot(const GatherDesc& d, const StepState& s, int slot) {
  const auto count = static_cast<uint64_t>(d.count);
  const uint64_t position =
      s.step * d.images_per_step() + s.first_image + static_cast<uint64_t>(slot);
  const uint64_t image =
      permute(position % count, count, s.seed, static_cast<uint32_t>(position / count));
  const uint32_t coin = training_stream(s, Purpose::kFlip, slot).block(0)[0] & 1;
  return {static_cast<int64_t>(image), d.flip && coin != 0 ? 1 : 0, 0};
}

// b / 127.5 - 1, correctly rounded: a quotient, and its remainder's.
__device__ __forceinline__ float decode(uint32_t byte) {
  constexpr float kInverse = 1.0f / 255;
  const float numerator = fmaf(2.0f, static_cast<float>(byte), -255.0f);
  const float quotient = numerator * kInverse;
  return fmaf(fmaf(-255.0f, quotient, numerator), kInverse, quotient);
}

// The run of x0 in `image`, mirrored if the slot says so.
__device__ __forceinline__ void load_pixels(const Global<const uint8_t>& image, const Shape& s,
                                            bool flip, const ImageRun& run, float (&x0)[kRun]) {
  if (!flip && run.whole) {
    const Words<2> words = load_words<2>(image + run.begin);
#pragma unroll
    for (int i = 0; i < kRun; ++i) x0[i] = decode(words.w[i / 4] >> (8 * (i % 4)) & 0xFFu);
    return;
  }
  int w = run.begin / s.c % s.w, c = run.begin % s.c;
#pragma unroll
  for (int i = 0; i < kRun; ++i) {
    const int from = run.begin + i + (flip ? (s.w - 1 - 2 * w) * s.c : 0);
    x0[i] = i < run.count ? decode(image[from]) : 0.0f;
    if (++c < s.c) continue;
    c = 0;
    if (++w == s.w) w = 0;
  }
}

// The label that the slot's image is trained with.
__device__ int32_t slot_label(const GatherDesc& d, const StepState& s, int slot,
                              const Global<const int32_t>& labels, int64_t image) {
  return d.label(labels[image], training_stream(s, Purpose::kLabel, slot).block(0)[0]);
}

__global__ void gather_images_kernel(GatherDesc d, int size, int parts,
                                     Global<const uint8_t> images, Global<const int32_t> labels,
                                     Global<const StepState> state, Global<float> x0,
                                     Global<int32_t> batch_labels) {
  SharedMemory shared;
  const Smem<Slot> found = shared.take<Slot>(1);
  const int slot = static_cast<int>(blockIdx.x) / parts;
  const int part = static_cast<int>(blockIdx.x) % parts;
  if (threadIdx.x == 0) {
    const StepState s = state[0];
    const Slot f = find_slot(d, s, slot);
    found[0] = f;
    if (part == 0 && labels != nullptr)
      batch_labels[slot] = slot_label(d, s, slot, labels, f.image);
  }
  block_sync();
  const ImageRun run = image_run(size, slot, part);
  if (run.count == 0) return;
  const Slot f = found[0];
  float v[kRun];
  load_pixels(images + f.image * size, d.batch, f.flip != 0, run, v);
  store_run<float>(x0, run, v);
}

// Both factors of a timestep; NaN outside the table.
__device__ __forceinline__ void load_factors(const Global<const float>& table, int timesteps, int t,
                                             float (&ab)[2]) {
  ab[0] = ab[1] = std::bit_cast<float>(0x7FC00000u);
  if (t >= 0 && t < timesteps) load_floats<float>(table + 2 * t, ab);
}
__device__ __forceinline__ float add_noise(const float (&ab)[2], float x0, float z) {
  return fmaf(ab[1], z, ab[0] * x0);
}

template <typename T>
__global__ void q_sample_kernel(int size, int parts, int timesteps, Global<const float> x0,
                                Global<const int32_t> t, Global<const float> noise,
                                Global<const float> table, Global<T> x_t) {
  const int slot = static_cast<int>(blockIdx.x) / parts;
  const ImageRun run = image_run(size, slot, static_cast<int>(blockIdx.x) % parts);
  if (run.count == 0) return;
  float ab[2], x[kRun], z[kRun];
  load_factors(table, timesteps, t[slot], ab);
  load_run<float>(x0, run, x);
  load_run<float>(noise, run, z);
#pragma unroll
  for (int i = 0; i < kRun; ++i) x[i] = add_noise(ab, x[i], z[i]);
  store_run<T>(x_t, run, x);
}

// A block takes every parts-th part of its image.
template <typename T>
__global__ void noisy_batch_kernel(NoisyBatchDesc d, int size, int parts,
                                   Global<const uint8_t> images, Global<const int32_t> labels,
                                   Global<const StepState> state, Global<const float> table,
                                   Global<T> x_t, Global<int32_t> t, Global<int32_t> batch_labels) {
  SharedMemory shared;
  const Smem<Slot> found = shared.take<Slot>(1);
  const StepState s = state[0];
  const int slot = static_cast<int>(blockIdx.x) / parts;
  const int first = static_cast<int>(blockIdx.x) % parts;
  if (threadIdx.x == 0) {
    Slot f = find_slot(d.gather, s, slot);
    f.t = draw_timestep(s, slot, d.timesteps);
    found[0] = f;
    if (first == 0) {
      t[slot] = f.t;
      if (labels != nullptr) batch_labels[slot] = slot_label(d.gather, s, slot, labels, f.image);
    }
  }
  const RandomStream stream = training_stream(s, Purpose::kNoise, slot);
  const int all_parts =
      (size + static_cast<int>(blockDim.x) * kRun - 1) / (static_cast<int>(blockDim.x) * kRun);
  for (int part = first; part < all_parts; part += parts) {
    const ImageRun run = image_run(size, slot, part);
    float z[kRun], x[kRun], ab[2];
    if (run.count > 0) draw_normals(stream, run.begin, z);
    if (part == first) block_sync();  // the noise does not wait for the image
    if (run.count == 0) continue;
    const Slot f = found[0];
    load_factors(table, d.timesteps, f.t, ab);
    load_pixels(images + f.image * size, d.gather.batch, f.flip != 0, run, x);
#pragma unroll
    for (int i = 0; i < kRun; ++i) x[i] = add_noise(ab, x[i], z[i]);
    store_run<T>(x_t, run, x);
  }
}

__global__ void sampler_timestep_kernel(int n, Global<const SamplerRow> rows,
                                        Global<const ChainSlot> slots,
                                        Global<const StepState> state, Global<int32_t> t) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= n) return;
  const StepState s = state[0];
  const ChainSlot slot = slots[i];
  const int64_t index = slot.row(s.step);
  int32_t told = 0;
  if (index >= 0) {
    const SamplerRow row = rows[index];
    told = row.t;
  }
  t[i] = told;
}

// x' of one element and its x0; previous and z are zero where the row does not use them. Terms in x
// and out are added even where their factor is zero: 0 * inf is NaN, so an infinite network output
// shows, which the clamp would have hidden.
__device__ __forceinline__ float sample_row(const SamplerRow& row, float out, float x,
                                            float previous, float z, float& x0) {
  const float raw = fmaf(row.x0_out, out, row.x0_x * x);
  const float clamped = fminf(fmaxf(raw, -row.clip), row.clip);
  x0 = raw != raw ? raw : clamped;
  float sum = fmaf(row.x_x0, x0, row.x_x * x);
  sum = fmaf(row.x_out, out, sum);
  sum = fmaf(row.x_previous, previous, sum);
  return fmaf(row.x_z, z, sum);
}

// The run of the network's output, guided and without its second half.
template <typename T>
__device__ __forceinline__ void load_output(const SamplerDesc& d, float guidance, int size,
                                            const Global<const T>& out, const ImageRun& run,
                                            float (&o)[kRun]) {
  const auto load = [&](const ImageRun& from, float(&v)[kRun]) {
    if (d.variance)
      load_half<T>(out, from, d.x.c, 0, v);
    else
      load_run<T>(out, from, v);
  };
  load(run, o);
  if (!d.guided || guidance == 1) return;
  ImageRun other = run;
  other.offset += int64_t{d.x.n} * size;
  float u[kRun];
  load(other, u);
#pragma unroll
  for (int j = 0; j < kRun; ++j) o[j] = fmaf(guidance, o[j] - u[j], u[j]);
}

// bad[block], where it is wanted: how many threads of it met a value that is not finite. Plain: the
// output is (N,H,W,C).
template <typename T, bool Plain>
__global__ void sampler_update_kernel(SamplerDesc d, int size, int parts,
                                      Global<const SamplerRow> rows, Global<const ChainSlot> slots,
                                      Global<const T> out, Global<float> x, Global<float> previous,
                                      Global<const StepState> state, Global<int32_t> bad) {
  SharedMemory shared;
  const Smem<int> scratch = shared.take<int>(static_cast<int>(blockDim.x) / 32);
  const StepState s = state[0];
  const int i = static_cast<int>(blockIdx.x) / parts;
  const ChainSlot slot = slots[i];
  const int64_t index = slot.row(s.step);
  const ImageRun run = image_run(size, i, static_cast<int>(blockIdx.x) % parts);
  bool finite = true;
  if (run.count > 0 && index >= 0) {
    const SamplerRow row = rows[index];
    float o[kRun], v[kRun], p[kRun] = {}, z[kRun] = {}, x0[kRun];
    if constexpr (Plain)
      load_run<T>(out, run, o);
    else
      load_output<T>(d, slot.guidance, size, out, run, o);
    load_run<float>(x, run, v);
    // Before its first use `previous` is undefined: it must not be read then.
    if (row.x_previous != 0) load_run<float>(previous, run, p);
    if (row.x_z != 0)
      draw_normals({.seed = slot.seed,
                    .purpose = Purpose::kSampleNoise,
                    .sample = slot.image,
                    .step = static_cast<uint32_t>(row.t)},
                   run.begin, z);
    if (!Plain && d.variance && row.x_z != 0) {
      float log_variance[kRun];
      load_half<T>(out, run, d.x.c, 1, log_variance);
#pragma unroll
      for (int j = 0; j < kRun; ++j) z[j] *= expf(fmaf(row.z_out, log_variance[j], row.z_log));
    }
#pragma unroll
    for (int j = 0; j < kRun; ++j) {
      v[j] = sample_row(row, o[j], v[j], p[j], z[j], x0[j]);
      if (j < run.count) finite = finite && std::isfinite(v[j]);
    }
    store_run<float>(previous, run, x0);
    store_run<float>(x, run, v);
  }
  if (bad == nullptr) return;
  const int count = block_sum(finite ? 0 : 1, scratch);
  if (threadIdx.x == 0) bad[blockIdx.x] = count;
}

__global__ void note_bad_samples_kernel(int blocks, Global<const int32_t> bad,
                                        Global<StepState> state) {
  SharedMemory shared;
  const Smem<int> scratch = shared.take<int>(static_cast<int>(blockDim.x) / 32);
  int count = 0;
  for (int i = static_cast<int>(threadIdx.x); i < blocks; i += static_cast<int>(blockDim.x))
    count |= bad[i];
  count = block_sum(count != 0 ? 1 : 0, scratch);
  if (threadIdx.x != 0 || count == 0) return;
  StepState s = state[0];
  set_nonfinite(s, kSampleNonFinite);
  state[0] = s;
}

__device__ __forceinline__ uint32_t to_byte(float x) {
  const float v = fminf(fmaxf((x + 1.0f) * 127.5f, 0.0f), 255.0f);
  return static_cast<uint32_t>(v + 0.5f);
}

__global__ void image_to_uint8_kernel(int64_t count, Global<const float> x, Global<uint8_t> y) {
  for_run<8>(count, [&]<int N>(int64_t i) {
    float v[N];
    load_floats<float>(x + i, v);
    if constexpr (N == 1) {
      y[i] = static_cast<uint8_t>(to_byte(v[0]));
    } else {
      Words<N / 4> words = {};
#pragma unroll
      for (int j = 0; j < N; ++j) words.w[j / 4] |= to_byte(v[j]) << (8 * (j % 4));
      store_words(y + i, words);
    }
  });
}

int image_size(const Shape& s) { return static_cast<int>(s.pixels()) * s.c; }

void check_gather(const char* op, const GatherDesc& d, In labels, Out batch_labels) {
  check_images(op, d.batch);
  DDPM_CHECK(d.count > 0 && d.count <= int64_t{1} << 40, "%s: batch %s of %lld images", op,
             to_string(d.batch).c_str(), static_cast<long long>(d.count));
  DDPM_CHECK(static_cast<bool>(labels) == static_cast<bool>(batch_labels),
             "%s: labels on one side only", op);
}

void add_labels(Call& call, In labels, Out batch_labels) {
  if (!labels) return;
  call.reads.push_back(labels);
  call.writes.push_back(batch_labels);
}

}  // namespace

Call CudaBackend::gather_images(const GatherDesc& d, In images, In labels, In state, Out x0,
                                Out batch_labels) {
  check_gather("gather_images", d, labels, batch_labels);
  const int parts = image_parts(d.batch, kBlock);
  const LaunchShape grid{.grid_x = static_cast<unsigned>(d.batch.n * parts),
                         .block = kBlock,
                         .shared = shared_bytes<Slot>(1)};
  Call call{"gather_images", {images, state}, {x0}, 0, [=](const Run& r) {
              launch<gather_images_kernel>(grid, r.stream, d, image_size(d.batch), parts,
                                           r.in<uint8_t>(images), r.in<int32_t>(labels),
                                           r.in<StepState>(state), r.out<float>(x0),
                                           r.out<int32_t>(batch_labels));
            }};
  add_labels(call, labels, batch_labels);
  return call;
}

Call CudaBackend::q_sample(const NoiseDesc& d, In x0, In t, In noise, In table, Out x_t) {
  check_images("q_sample", d.x);
  DDPM_CHECK(d.timesteps > 0, "q_sample: shape %s, %d timesteps", to_string(d.x).c_str(),
             d.timesteps);
  const int parts = image_parts(d.x, kBlock);
  const LaunchShape grid{.grid_x = static_cast<unsigned>(d.x.n * parts), .block = kBlock};
  return dispatch(d.out, [&]<typename T>(T) -> Call {
    return {"q_sample", {x0, t, noise, table}, {x_t}, 0, [=](const Run& r) {
              launch<q_sample_kernel<T>>(grid, r.stream, image_size(d.x), parts, d.timesteps,
                                         r.in<float>(x0), r.in<int32_t>(t), r.in<float>(noise),
                                         r.in<float>(table), r.out<T>(x_t));
            }};
  });
}

std::optional<Call> CudaBackend::noisy_batch(const NoisyBatchDesc& d, In images, In labels,
                                             In state, In table, Out x_t, Out t, Out batch_labels) {
  check_gather("noisy_batch", d.gather, labels, batch_labels);
  const Shape s = d.gather.batch;
  DDPM_CHECK(d.timesteps > 0, "noisy_batch: shape %s, %d timesteps", to_string(s).c_str(),
             d.timesteps);
  const int parts = std::min(image_parts(s, kBlock), kMaxParts);
  const LaunchShape grid{.grid_x = static_cast<unsigned>(s.n * parts),
                         .block = kBlock,
                         .shared = shared_bytes<Slot>(1)};
  return dispatch(type_, [&]<typename T>(T) {
    Call call{"noisy_batch", {images, state, table}, {x_t, t}, 0, [=](const Run& r) {
                launch<noisy_batch_kernel<T>>(
                    grid, r.stream, d, image_size(s), parts, r.in<uint8_t>(images),
                    r.in<int32_t>(labels), r.in<StepState>(state), r.in<float>(table),
                    r.out<T>(x_t), r.out<int32_t>(t), r.out<int32_t>(batch_labels));
              }};
    add_labels(call, labels, batch_labels);
    return call;
  });
}

Call CudaBackend::sampler_timestep(int n, In rows, In slots, In state, Out t) {
  DDPM_CHECK(n > 0, "sampler_timestep: n %d", n);
  return {"sampler_timestep", {rows, slots, state}, {t}, 0, [=](const Run& r) {
            launch<sampler_timestep_kernel>({.grid_x = blocks_for(n, 1, kBlock), .block = kBlock},
                                            r.stream, n, r.in<SamplerRow>(rows),
                                            r.in<ChainSlot>(slots), r.in<StepState>(state),
                                            r.out<int32_t>(t));
          }};
}

Call CudaBackend::sampler_update(const SamplerDesc& d, In rows, In slots, In out, Out x,
                                 Out previous, Out state) {
  check_images("sampler_update", d.x);
  const int parts = image_parts(d.x, kBlock), blocks = d.x.n * parts;
  const LaunchShape grid{.grid_x = static_cast<unsigned>(blocks),
                         .block = kBlock,
                         .shared = shared_bytes<int>(kBlock / 32)};
  constexpr unsigned kLast = 256;
  return dispatch(type_, [&]<typename T>(T) -> Call {
    return {
        "sampler_update",
        {rows, slots, out},
        {x, previous, state},
        d.watch ? sizeof(int32_t) * static_cast<size_t>(blocks) : 0,
        [=](const Run& r) {
          auto* bad = d.watch ? static_cast<int32_t*>(r.workspace) : nullptr;
          auto* s = r.out<StepState>(state);
          const auto update = [&]<bool Plain>() {
            launch<sampler_update_kernel<T, Plain>>(grid, r.stream, d, image_size(d.x), parts,
                                                    r.in<SamplerRow>(rows), r.in<ChainSlot>(slots),
                                                    r.in<T>(out), r.out<float>(x),
                                                    r.out<float>(previous), s, bad);
          };
          if (d.variance || d.guided)
            update.template operator()<false>();
          else
            update.template operator()<true>();
          if (!d.watch) return;
          launch<note_bad_samples_kernel>({.block = kLast, .shared = shared_bytes<int>(kLast / 32)},
                                          r.stream, blocks, bad, s);
        }};
  });
}

Call CudaBackend::image_to_uint8(int64_t count, In x, Out y) {
  DDPM_CHECK(count > 0 && count < int64_t{1} << 40, "image_to_uint8: count %lld",
             static_cast<long long>(count));
  return {"image_to_uint8", {x}, {y}, 0, [=](const Run& r) {
            launch<image_to_uint8_kernel>({.grid_x = blocks_for(count, 8)}, r.stream, count,
                                          r.in<float>(x), r.out<uint8_t>(y));
          }};
}

}  // namespace ddpm::cuda
