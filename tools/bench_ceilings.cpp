// ddpm bench ceilings: the two rates that every other figure is held against, a copy of memory that
// no cache holds and a large matrix product, over random values (zeros compute faster).
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <memory>
#include <nlohmann/json.hpp>
#include <vector>

#include "engine/file_io.h"
#include "engine/json.h"
#include "tools/ceilings.h"
#include "tools/commands.h"

namespace ddpm::tools {
namespace {

constexpr int kWarmUp = 3, kRounds = 15;

// Median seconds of a call over memory of its own, in so many rounds.
double time_call(Backend& backend, const Call& call, const std::vector<void*>& data, int rounds) {
  using Clock = std::chrono::steady_clock;
  const auto workspace = backend.allocate(call.workspace);
  const Run run{data.data(), workspace->data(), backend.stream()};
  std::vector<double> seconds;
  for (int i = 0; i < kWarmUp + rounds; ++i) {
    backend.synchronize();
    const auto start = Clock::now();
    call.run(run);
    backend.synchronize();
    if (i >= kWarmUp)
      seconds.push_back(std::chrono::duration<double>(Clock::now() - start).count());
  }
  const auto median = seconds.begin() + rounds / 2;
  std::nth_element(seconds.begin(), median, seconds.end());
  return *median;
}

// `count` normal values of the compute type.
std::unique_ptr<Memory> random_memory(Backend& backend, int count) {
  const DType type = backend.compute_type();
  const size_t bytes = static_cast<size_t>(count) * sizeof(float);
  const auto state = backend.allocate(sizeof(StepState));
  auto values = backend.allocate(bytes);
  std::vector<void*> data{state->data(), values->data()};
  const Run run{data.data(), nullptr, backend.stream()};
  backend.draw_noise({1, 1, 1, count}, {0}, {1}).run(run);
  if (type != DType::kF32) {
    auto narrow = backend.allocate(static_cast<size_t>(count) * size_of(type));
    data = {values->data(), narrow->data()};
    backend.cast(count, DType::kF32, {0}, type, {1})
        .run(Run{data.data(), nullptr, backend.stream()});
    backend.synchronize();
    return narrow;
  }
  backend.synchronize();
  return values;
}

}  // namespace

double product_rate(Backend& backend, int size, int rounds) {
  const DType type = backend.compute_type();
  const bool gpu = backend.stream() != nullptr;
  const auto a = random_memory(backend, size * size), b = random_memory(backend, size * size);
  const auto product = random_memory(backend, size * size);
  // In the layout of each device's fastest product: a weight gradient's on the CPU.
  const GemmDesc g{.m = size,
                   .n = size,
                   .k = size,
                   .transpose_a = !gpu,
                   .transpose_b = gpu,
                   .in = type,
                   .out = type};
  return 1.0 * size * size * size /
         time_call(backend, backend.gemm(g, {0}, {1}, {}, {}, {2}, Write::kOverwrite),
                   {a->data(), b->data(), product->data()}, rounds);
}

Ceilings measure_ceilings(Backend& backend) {
  const DType type = backend.compute_type();
  const bool gpu = backend.stream() != nullptr;
  const int count = gpu ? 1 << 29 : 1 << 25, size = gpu ? 8192 : 2048;
  Ceilings c{.copied = static_cast<size_t>(count) * size_of(type), .size = size};
  {
    const auto from = random_memory(backend, count), to = random_memory(backend, count);
    c.bytes_per_second = 2.0 * static_cast<double>(c.copied) /
                         time_call(backend, backend.copy(count, type, {0}, {1}, Write::kOverwrite),
                                   {from->data(), to->data()}, kRounds);
  }
  c.macs_per_second = product_rate(backend, size, kRounds);
  return c;
}

void run_bench_ceilings(const BenchArgs& args) {
  const std::unique_ptr<Backend> backend = open_backend(args.device);
  const Ceilings c = measure_ceilings(*backend);
  const double rate = c.bytes_per_second * 1e-9, flops = 2e-9 * c.macs_per_second;
  std::printf("%s\ncopy of %s: %.1f GB/s read and written\nproduct of %d^3, %s: %.0f GFLOP/s\n",
              backend->description().c_str(), bytes_text(c.copied).c_str(), rate, c.size,
              name_of(backend->compute_type()), flops);
  if (args.json.empty()) return;
  nlohmann::ordered_json json;
  json["work"] = args.work;
  json["device"] = backend->description();
  json["figures"] = {{{"name", "copy GB/s"}, {"measured", rate}},
                     {{"name", "product GFLOP/s"}, {"measured", flops}}};
  write_file(args.json, to_text(json));
}

}  // namespace ddpm::tools
