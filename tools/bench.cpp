// ddpm bench: seconds per training or sampling step, or per operation of a training step. Weights
// are never the initial ones, under which a third of the network computes zeros.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>

#include "engine/file_io.h"
#include "engine/json.h"
#include "engine/shapes.h"
#include "model/generator.h"
#include "model/pipeline.h"
#include "model/presets.h"
#include "model/trainer.h"
#include "tools/ceilings.h"
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
  o.objective.loss = usual_loss(m.scheduler.variance_type);
  o.adam.learning_rate = static_cast<float>(m.train.learning_rate);
  o.adam.warmup_steps = m.train.warmup_steps;
  o.activate_zero_layers = true;
  const Shape image{1, m.unet.sample_height, m.unet.sample_width, m.unet.in_channels};
  Dataset data = make_shapes(std::max(args.batch_size, 64), image);
  data.labels.resize(static_cast<size_t>(data.count));
  for (int32_t& label : data.labels) label %= std::max(m.unet.classes(), 1);
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

// Milliseconds of each of as many steps by loops; nullopt where a step is not a launch at all.
std::optional<double> time_loops(Executor& executor, int steps) {
  using Clock = std::chrono::steady_clock;
  Backend& backend = executor.graph().backend();
  if (backend.stream() == nullptr) return std::nullopt;
  executor.steps(kWarmUp);
  backend.synchronize();
  const auto start = Clock::now();
  executor.steps(steps);
  backend.synchronize();
  return std::chrono::duration<double, std::milli>(Clock::now() - start).count() / steps;
}

void report(const BenchArgs& args, const Model& m, Executor& executor, size_t planned,
            const std::vector<double>& ms, std::optional<double> in_loops = {}) {
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
  if (in_loops) json["ms_per_step_in_loops"] = *in_loops;
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
  if (in_loops) std::printf("%.3f ms per step in loops\n", *in_loops);
}

// Measured and least seconds of a step, or of all of one operation.
struct Share {
  std::string name;
  int calls = 0;
  double seconds = 0, floor = 0;
};

void add_to(Share& share, double seconds, double floor) {
  ++share.calls;
  share.seconds += seconds;
  share.floor += floor;
}

void sort_by_time(std::vector<Share>& shares) {
  std::stable_sort(shares.begin(), shares.end(),
                   [](const Share& a, const Share& b) { return a.seconds > b.seconds; });
}

void print_share(const Share& s, double total) {
  std::printf("%6d %10.3f %6.1f%% %10.3f %8.1f  %s\n", s.calls, 1e3 * s.seconds,
              100 * s.seconds / total, 1e3 * s.floor, s.seconds / s.floor, s.name.c_str());
}

void write_ops(const BenchArgs& args, const Model& m, const std::string& device,
               const Ceilings& ceilings, const std::vector<Share>& ops) {
  nlohmann::ordered_json json;
  json["work"] = args.work;
  json["preset"] = m.name;
  json["batch_size"] = args.batch_size;
  json["device"] = device;
  json["precision"] = args.device.precision;
  json["commit"] = kCommit;
  json["ceilings"] = {{"bytes_per_second", ceilings.bytes_per_second},
                      {"multiply_adds_per_second", ceilings.macs_per_second}};
  for (const Share& s : ops)
    json["figures"].push_back(
        {{"name", s.name + " ms"}, {"measured", 1e3 * s.seconds}, {"floor", 1e3 * s.floor}});
  write_file(args.json, to_text(json));
}

// Each step's share: by operation, and the slowest single ones, beside the least they could take.
void report_ops(const BenchArgs& args, const Model& m, Executor& executor,
                const Ceilings& ceilings) {
  const Graph& g = executor.graph();
  std::vector<double> warm, seconds;
  executor.step_timed(warm);
  for (int i = 0; i < args.steps; ++i) executor.step_timed(seconds);
  Share all{.name = "all"};
  std::map<std::string, Share> by_op;
  std::vector<Share> single;
  for (size_t i = 0; i < g.steps().size(); ++i) {
    const Step& step = g.steps()[i];
    const double floor = ceilings.floor(static_cast<double>(g.bytes_moved(step)),
                                        static_cast<double>(step.call.macs));
    const double own = seconds[i] / args.steps;
    Share& op = by_op.try_emplace(step.call.op, Share{.name = step.call.op}).first->second;
    single.push_back({.name = step.scope + ":" + step.call.op});
    for (Share* s : {&all, &op, &single.back()}) add_to(*s, own, floor);
  }
  std::vector<Share> ops;
  for (const auto& [name, share] : by_op) ops.push_back(share);
  sort_by_time(ops);
  sort_by_time(single);
  single.resize(std::min<size_t>(single.size(), 25));

  const std::string device = g.backend().description();
  if (!args.json.empty()) write_ops(args, m, device, ceilings, ops);
  std::printf(
      "%s, batch %d, %s\n"
      "floors: %.1f GB/s, %.0f GFLOP/s of direct multiply-adds; Winograd and caches can beat "
      "them\n\n"
      "%6s %10s %7s %10s %8s  operation\n",
      m.name.c_str(), args.batch_size, device.c_str(), 1e-9 * ceilings.bytes_per_second,
      2e-9 * ceilings.macs_per_second, "calls", "ms", "share", "floor ms", "x floor");
  for (const Share& s : ops) print_share(s, all.seconds);
  print_share(all, all.seconds);
  std::printf("\n");
  for (const Share& s : single) print_share(s, all.seconds);
}

}  // namespace

void run_bench(const BenchArgs& args) {
  const Model m = open_model(args);
  const std::unique_ptr<Backend> backend = open_backend(args.device);
  if (args.work == "sample") {
    const Sampling s = make_sampling(m, args, *backend);
    const int most = s.generator->steps() - kWarmUp;
    if (args.steps > most)
      fail(Status::kUsage, "--steps %d: a chain has %d, of which %d warm up; at most %d",
           args.steps, s.generator->steps(), kWarmUp, most);
    Executor& executor = s.generator->executor();
    const std::vector<double> ms = time_steps(executor, args.steps);
    s.generator->begin(0, 0);  // the chain from its start
    report(args, m, executor, s.store->bytes() + s.generator->bytes(), ms,
           time_loops(executor, args.steps));
    return;
  }
  std::optional<Ceilings> ceilings;  // before the training takes its memory
  if (args.work == "ops") ceilings = measure_ceilings(*backend);
  const std::unique_ptr<Trainer> trainer = make_trainer(m, args, *backend);
  if (ceilings) {
    report_ops(args, m, trainer->executor(), *ceilings);
    return;
  }
  const std::vector<double> ms = time_steps(trainer->executor(), args.steps);
  report(args, m, trainer->executor(), trainer->bytes(), ms);
}

}  // namespace ddpm::tools
