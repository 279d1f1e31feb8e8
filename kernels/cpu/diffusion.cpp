// The ends of the diffusion graph: images in, noising, sampler rows, images out.
#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstring>

#include "kernels/cpu/cpu_backend.h"
#include "kernels/cpu/parallel.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/diffusion.cpp"
#include <hwy/foreach_target.h>

#include "kernels/cpu/philox-inl.h"

#ifndef DDPM_KERNELS_CPU_IMAGE_OUTPUT
#define DDPM_KERNELS_CPU_IMAGE_OUTPUT
namespace ddpm::cpu {

// What the network put out for an image: out, and `other` without its class where that guides it.
struct ImageOutput {
  const float* out;
  const float* other;  // or null
  float guidance;
  int c;  // channels of the image where the output has twice as many, else 0

  bool plain() const { return other == nullptr && c == 0; }
};

}  // namespace ddpm::cpu
#endif

HWY_BEFORE_NAMESPACE();
namespace ddpm::cpu::HWY_NAMESPACE {

// y = a x + b noise
void mix_loop(const float* x, const float* noise, float a, float b, float* y, int64_t count) {
  const FloatTag d;
  for (int64_t i = 0; i < count; i += lanes()) {
    const Float scaled = hn::Mul(hn::Set(d, a), load(x + i, count - i));
    store(hn::MulAdd(hn::Set(d, b), load(noise + i, count - i), scaled), y + i, count - i);
  }
}

// Returns whether every x' is finite. Terms in x and out are added even where their factor is zero:
// 0 * inf is NaN, so an infinite network output shows, which the clamp would have hidden.
bool row_loop(const SamplerRow& row, const float* out, const float* z, float* x, float* previous,
              int64_t count) {
  const FloatTag d;
  const Float clip = hn::Set(d, row.clip);
  auto finite = hn::FirstN(d, hn::Lanes(d));
  for (int64_t i = 0; i < count; i += lanes()) {
    const int64_t left = count - i;
    const Float o = load(out + i, left), old = load(x + i, left);
    const Float raw = hn::MulAdd(hn::Set(d, row.x0_out), o, hn::Mul(hn::Set(d, row.x0_x), old));
    // Min and max of x86 lose a NaN.
    const Float x0 = hn::IfThenElse(hn::IsNaN(raw), raw, hn::Clamp(raw, hn::Neg(clip), clip));
    Float sum = hn::Mul(hn::Set(d, row.x_x), old);
    sum = hn::MulAdd(hn::Set(d, row.x_x0), x0, sum);
    sum = hn::MulAdd(hn::Set(d, row.x_out), o, sum);
    // Before its first use `previous` is undefined: it must not be read then.
    if (row.x_previous != 0)
      sum = hn::MulAdd(hn::Set(d, row.x_previous), load(previous + i, left), sum);
    if (row.x_z != 0) sum = hn::MulAdd(hn::Set(d, row.x_z), load(z + i, left), sum);
    finite = hn::And(finite, hn::IsFinite(sum));
    store(x0, previous + i, left);
    store(sum, x + i, left);
  }
  return hn::AllTrue(d, finite);
}

// Elements begin, ..., guided, into `mean`; and z times what the second half says.
void read_output(const SamplerRow& row, const ImageOutput& o, int64_t begin, int64_t count,
                 float* mean, float* z) {
  for (int64_t i = 0; i < count; ++i) {
    const int64_t at = o.c > 0 ? begin + i + (begin + i) / o.c * o.c : begin + i;
    mean[i] = o.out[at];
    if (o.other != nullptr) mean[i] = o.other[at] + o.guidance * (o.out[at] - o.other[at]);
    if (o.c > 0 && row.x_z != 0) z[i] *= std::exp(row.z_log + row.z_out * o.out[at + o.c]);
  }
}

// row_loop on `count` elements from `begin`, a multiple of 4, of an image on, drawing z as it goes.
// All pointers are the image's.
bool update_loop(const SamplerRow& row, const RandomStream& stream, int64_t begin, int64_t count,
                 const ImageOutput& out, float* x, float* previous) {
  constexpr int64_t kPart = 1024;
  HWY_ALIGN float z[kPart], mean[kPart];
  bool finite = true;
  for (int64_t i = begin; i < begin + count; i += kPart) {
    const int64_t part = std::min(kPart, begin + count - i);
    if (row.x_z != 0) normals(stream, static_cast<uint32_t>(i / 4), part, z);
    if (!out.plain()) read_output(row, out, i, part, mean, z);
    finite &= row_loop(row, out.plain() ? out.out + i : mean, z, x + i, previous + i, part);
  }
  return finite;
}

void uint8_loop(const float* x, uint8_t* y, int64_t begin, int64_t end) {
  const FloatTag d;
  const hn::Rebind<uint8_t, FloatTag> du8;
  HWY_ALIGN uint8_t bytes[hn::MaxLanes(d)];
  for (int64_t i = begin; i < end; i += lanes()) {
    Float v = hn::Mul(hn::Add(load(x + i, end - i), hn::Set(d, 1.0f)), hn::Set(d, 127.5f));
    v = hn::Clamp(v, hn::Zero(d), hn::Set(d, 255.0f));
    const auto rounded =
        hn::ConvertTo(hn::RebindToSigned<FloatTag>(), hn::Add(v, hn::Set(d, 0.5f)));
    hn::StoreU(hn::DemoteTo(du8, rounded), du8, bytes);
    std::memcpy(y + i, bytes, static_cast<size_t>(std::min(lanes(), end - i)));
  }
}

}  // namespace ddpm::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace ddpm::cpu {

HWY_EXPORT(mix_loop);
HWY_EXPORT(update_loop);
HWY_EXPORT(uint8_loop);

namespace {

// x0 of each byte, correctly rounded.
std::array<float, 256> image_values() {
  std::array<float, 256> values;
  for (size_t i = 0; i < values.size(); ++i)
    values[i] = static_cast<float>(static_cast<double>(i) / 127.5 - 1.0);
  return values;
}

void decode_image(const uint8_t* image, const std::array<float, 256>& values, const Shape& shape,
                  bool flip, float* x0) {
  const int64_t row = int64_t{shape.w} * shape.c;
  for (int h = 0; h < shape.h; ++h, image += row, x0 += row) {
    if (!flip) {
      for (int64_t i = 0; i < row; ++i) x0[i] = values[image[i]];
      continue;
    }
    for (int w = 0; w < shape.w; ++w)
      for (int c = 0; c < shape.c; ++c)
        x0[w * shape.c + c] = values[image[(shape.w - 1 - w) * shape.c + c]];
  }
}

}  // namespace

Call CpuBackend::gather_images(const GatherDesc& d, In images, In labels, In state, Out x0,
                               Out batch_labels) {
  DDPM_CHECK(d.batch.positive() && d.count > 0 && d.count <= int64_t{1} << 40,
             "gather_images: batch %s of %lld images", to_string(d.batch).c_str(),
             static_cast<long long>(d.count));
  DDPM_CHECK(static_cast<bool>(labels) == static_cast<bool>(batch_labels),
             "gather_images: labels on one side only");
  Call call{"gather_images", {images, state}, {x0}, 0, {}};
  if (labels) {
    call.reads.push_back(labels);
    call.writes.push_back(batch_labels);
  }
  call.run = [=, values = image_values(), threads = threads_](const Run& r) {
    const StepState& s = *r.in<StepState>(state);
    const int64_t size = d.batch.pixels() * d.batch.c;
    const auto count = static_cast<uint64_t>(d.count);
    parallel_for(threads_for(threads, d.batch.count()), d.batch.n, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const uint64_t sample = s.first_image + static_cast<uint64_t>(i);
        const uint64_t position = s.step * d.images_per_step() + sample;
        const auto index = static_cast<int64_t>(
            permute(position % count, count, s.seed, static_cast<uint32_t>(position / count)));
        const RandomStream stream{.seed = s.seed,
                                  .purpose = Purpose::kFlip,
                                  .sample = sample,
                                  .step = static_cast<uint32_t>(s.step)};
        decode_image(r.in<uint8_t>(images) + index * size, values, d.batch,
                     d.flip && (stream.block(0)[0] & 1) != 0, r.out<float>(x0) + i * size);
        if (!labels) continue;
        RandomStream own = stream;
        own.purpose = Purpose::kLabel;
        r.out<int32_t>(batch_labels)[i] = d.label(r.in<int32_t>(labels)[index], own.block(0)[0]);
      }
    });
  };
  return call;
}

Call CpuBackend::q_sample(const NoiseDesc& d, In x0, In t, In noise, In table, Out x_t) {
  DDPM_CHECK(d.x.positive() && d.timesteps > 0 && d.out == DType::kF32,
             "q_sample: shape %s, %d timesteps, to %s", to_string(d.x).c_str(), d.timesteps,
             name_of(d.out));
  return {"q_sample", {x0, t, noise, table}, {x_t}, 0, [=, threads = threads_](const Run& r) {
            const int32_t* steps = r.in<int32_t>(t);
            for (int i = 0; i < d.x.n; ++i)
              if (steps[i] < 0 || steps[i] >= d.timesteps)
                fail(Status::kBug, "q_sample: timestep %d of %d", steps[i], d.timesteps);
            const int64_t size = d.x.pixels() * d.x.c;
            parallel_samples(threads, d.x.n, size, [&](int64_t n, int64_t begin, int64_t end) {
              const float* factors = r.in<float>(table) + 2 * int64_t{steps[n]};
              const int64_t at = n * size + begin;
              HWY_DYNAMIC_DISPATCH(mix_loop)
              (r.in<float>(x0) + at, r.in<float>(noise) + at, factors[0], factors[1],
               r.out<float>(x_t) + at, end - begin);
            });
          }};
}

Call CpuBackend::sampler_timestep(int n, In rows, In slots, In state, Out t) {
  DDPM_CHECK(n > 0, "sampler_timestep: n %d", n);
  return {"sampler_timestep", {rows, slots, state}, {t}, 0, [=](const Run& r) {
            const uint64_t step = r.in<StepState>(state)->step;
            for (int i = 0; i < n; ++i) {
              const int64_t row = r.in<ChainSlot>(slots)[i].row(step);
              r.out<int32_t>(t)[i] = row < 0 ? 0 : r.in<SamplerRow>(rows)[row].t;
            }
          }};
}

Call CpuBackend::sampler_update(const SamplerDesc& d, In rows, In slots, In out, Out x,
                                Out previous, Out state) {
  DDPM_CHECK(d.x.positive(), "sampler_update: shape %s", to_string(d.x).c_str());
  const int64_t size = d.x.pixels() * d.x.c, blocks = (size + 3) / 4;
  return {"sampler_update",
          {rows, slots, out},
          {x, previous, state},
          0,
          [=, threads = threads_](const Run& r) {
            StepState& s = *r.out<StepState>(state);
            std::atomic<bool> finite = true;
            parallel_samples(threads, d.x.n, blocks, [&](int64_t i, int64_t begin, int64_t end) {
              const ChainSlot& slot = r.in<ChainSlot>(slots)[i];
              const int64_t index = slot.row(s.step);
              if (index < 0) return;
              const SamplerRow& row = r.in<SamplerRow>(rows)[index];
              const RandomStream stream{.seed = slot.seed,
                                        .purpose = Purpose::kSampleNoise,
                                        .sample = slot.image,
                                        .step = static_cast<uint32_t>(row.t)};
              const int64_t stride = d.variance ? 2 * size : size;
              const float* const own = r.in<float>(out) + i * stride;
              const bool guided = d.guided && slot.guidance != 1;
              const ImageOutput output{own, guided ? own + d.x.n * stride : nullptr, slot.guidance,
                                       d.variance ? d.x.c : 0};
              if (!HWY_DYNAMIC_DISPATCH(update_loop)(
                      row, stream, 4 * begin, std::min(4 * end, size) - 4 * begin, output,
                      r.out<float>(x) + i * size, r.out<float>(previous) + i * size))
                finite.store(false, std::memory_order_relaxed);
            });
            if (d.watch && !finite.load()) set_nonfinite(s, kSampleNonFinite);
          }};
}

Call CpuBackend::image_to_uint8(int64_t count, In x, Out y) {
  DDPM_CHECK(count > 0, "image_to_uint8: count %lld", static_cast<long long>(count));
  return {"image_to_uint8", {x}, {y}, 0, [=, threads = threads_](const Run& r) {
            parallel_elements(threads, count, [&](int64_t begin, int64_t end) {
              HWY_DYNAMIC_DISPATCH(uint8_loop)(r.in<float>(x), r.out<uint8_t>(y), begin, end);
            });
          }};
}

}  // namespace ddpm::cpu
#endif
