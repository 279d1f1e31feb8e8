// ddpm bench: seconds per training or sampling step, or per operation of a training step. Weights
// are never the initial ones, under which a third of the network computes zeros.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <numeric>

#include "engine/file_io.h"
#include "engine/json.h"
#include "engine/shapes.h"
#include "model/generator.h"
#include "model/pipeline.h"
#include "model/presets.h"
#include "model/trainer.h"
#include "tools/commands.h"
#include "version.h"

namespace ddpm::tools {
namespace {

constexpr int kWarmUp = 2;

struct Model {
  std::string name;
  UNetConfig unet;
  SchedulerConfig scheduler;
  TrainDefaults train;
  std::optional<Pipeline> pipeline;
};

Model open_model(const BenchArgs& args) {
  if (args.model.empty()) {
    const Preset& p = find_preset(args.preset);
    return {p.name, p.unet, p.scheduler, p.train, {}};
  }
  Pipeline p = open_pipeline(args.model);
  Model m{args.model, p.unet, p.scheduler, {}, {}};
  m.train.dropout = p.unet.dropout;
  m.pipeline = std::move(p);
  return m;
}

std::unique_ptr<Trainer> make_trainer(const Model& m, const BenchArgs& args, Backend& backend) {
  TrainerOptions o;
  o.batch_size = args.batch_size;
  o.flip = m.train.flip;
  o.adam.learning_rate = static_cast<float>(m.train.learning_rate);
  o.adam.warmup_steps = m.train.warmup_steps;
  o.activate_zero_layers = true;
  const Shape image{1, m.unet.sample_height, m.unet.sample_width, m.unet.in_channels};
  Dataset data = make_shapes(std::max(args.batch_size, 64), image);
  data.labels.resize(static_cast<size_t>(data.count));
  for (int32_t& label : data.labels) label %= m.unet.num_class_embeds.value_or(1);
  auto trainer = std::make_unique<Trainer>(backend, m.unet, m.scheduler, o, std::move(data));
  trainer->initialize(0);
  return trainer;
}

// A sampler, and the weights it samples from.
struct Sampling {
  std::unique_ptr<ParamStore> store;
  std::unique_ptr<Generator> generator;
};

Sampling make_sampling(const Model& m, const BenchArgs& args, Backend& backend) {
  Sampling s;
  s.generator = std::make_unique<Generator>(
      backend, m.unet, m.scheduler, SamplerOptions{}, args.batch_size, [&](const Params& params) {
        if (m.pipeline) {
          s.store = load_store(backend, *m.pipeline, params);
        } else {
          Params active = params;
          active.activate_zero_layers();
          s.store = std::make_unique<ParamStore>(backend, active, std::vector{Arena::kWeights});
          s.store->initialize(0);
        }
        return s.store->arenas();
      });
  s.generator->weights_final();
  s.generator->executor().run(Phase::kStart);
  return s;
}

std::vector<double> time_steps(Executor& executor, int steps) {
  using Clock = std::chrono::steady_clock;
  std::vector<double> ms;
  for (int i = 0; i < kWarmUp + steps; ++i) {
    const auto start = Clock::now();
    executor.step();
    executor.graph().backend().synchronize();
    if (i >= kWarmUp)
      ms.push_back(std::chrono::duration<double, std::milli>(Clock::now() - start).count());
  }
  std::sort(ms.begin(), ms.end());
  return ms;
}

void report(const BenchArgs& args, const Model& m, Executor& executor, size_t planned,
            const std::vector<double>& ms) {
  const Graph& g = executor.graph();
  const double median = ms[ms.size() / 2];
  const double gflop = 2e-9 * static_cast<double>(g.macs()) * (g.training() ? 3 : 1);
  nlohmann::ordered_json json;
  json["work"] = args.work;
  json["preset"] = m.name;
  json["batch_size"] = args.batch_size;
  json["device"] = g.backend().description();
  json["precision"] = args.device.precision;
  json["threads"] = args.device.threads;
  json["ms_per_step"] = {{"median", median}, {"min", ms.front()}, {"max", ms.back()}};
  json["images_per_second"] = 1e3 * args.batch_size / median;
  json["gflops"] = gflop / median * 1e3;
  json["planned_bytes"] = planned;
  json["peak_bytes"] = peak_bytes();
  json["steps"] = ms.size();
  json["commit"] = kCommit;
  if (!args.json.empty()) write_file(args.json, to_text(json));
  std::printf("%s %s, batch %d, %s\n", args.work.c_str(), m.name.c_str(), args.batch_size,
              g.backend().description().c_str());
  std::printf(
      "%.2f ms per step (%.2f to %.2f over %zu), %.1f images/s, %.0f GFLOP/s, %s planned, "
      "%s peak\n",
      median, ms.front(), ms.back(), ms.size(), 1e3 * args.batch_size / median,
      gflop / median * 1e3, bytes_text(planned).c_str(), bytes_text(peak_bytes()).c_str());
}

// Each step's share: by operation, and the slowest single ones.
void report_ops(const BenchArgs& args, Executor& executor) {
  const int repeats = args.steps;
  std::vector<double> warm, seconds;
  executor.step_timed(warm);
  for (int i = 0; i < repeats; ++i) executor.step_timed(seconds);
  const std::vector<Step>& steps = executor.graph().steps();
  const double total = std::accumulate(seconds.begin(), seconds.end(), 0.0);
  struct Sum {
    int calls = 0;
    double seconds = 0;
  };
  std::map<std::string, Sum> by_op;
  std::vector<size_t> order(steps.size());
  for (size_t i = 0; i < steps.size(); ++i) {
    Sum& s = by_op[steps[i].call.op];
    ++s.calls;
    s.seconds += seconds[i];
    order[i] = i;
  }
  std::vector<std::pair<std::string, Sum>> ops(by_op.begin(), by_op.end());
  std::sort(ops.begin(), ops.end(),
            [](const auto& a, const auto& b) { return a.second.seconds > b.second.seconds; });
  if (!args.json.empty()) {
    nlohmann::ordered_json json;
    json["work"] = args.work;
    json["device"] = executor.graph().backend().description();
    json["batch_size"] = args.batch_size;
    for (const auto& [op, s] : ops)
      json["figures"].push_back({{"name", op + " ms"}, {"measured", 1e3 * s.seconds / repeats}});
    write_file(args.json, to_text(json));
  }
  std::printf("%-24s %6s %10s %7s\n", "operation", "calls", "ms", "share");
  for (const auto& [op, s] : ops)
    std::printf("%-24s %6d %10.3f %6.1f%%\n", op.c_str(), s.calls, 1e3 * s.seconds / repeats,
                100 * s.seconds / total);
  std::printf("%-24s %6zu %10.3f\n\n", "all", steps.size(), 1e3 * total / repeats);
  std::sort(order.begin(), order.end(),
            [&](size_t a, size_t b) { return seconds[a] > seconds[b]; });
  for (size_t i = 0; i < std::min<size_t>(order.size(), 25); ++i)
    std::printf("%10.3f ms  %s:%s\n", 1e3 * seconds[order[i]] / repeats,
                steps[order[i]].scope.c_str(), steps[order[i]].call.op);
}

}  // namespace

void run_bench(const BenchArgs& args) {
  const Model m = open_model(args);
  const std::unique_ptr<Backend> backend = open_backend(args.device);
  if (args.work == "sample") {
    const Sampling s = make_sampling(m, args, *backend);
    Executor& executor = s.generator->executor();
    const std::vector<double> ms = time_steps(executor, args.steps);
    report(args, m, executor, s.store->bytes() + s.generator->bytes(), ms);
    return;
  }
  const std::unique_ptr<Trainer> trainer = make_trainer(m, args, *backend);
  if (args.work == "ops") {
    report_ops(args, trainer->executor());
    return;
  }
  const std::vector<double> ms = time_steps(trainer->executor(), args.steps);
  report(args, m, trainer->executor(), trainer->bytes(), ms);
}

}  // namespace ddpm::tools
