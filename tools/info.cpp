// ddpm info: what a model is, what it needs and how much work it is.
#include <algorithm>
#include <cstdio>
#include <functional>
#include <memory>

#include "engine/memory.h"
#include "engine/plan.h"
#include "model/generator.h"
#include "model/pipeline.h"
#include "model/presets.h"
#include "model/trainer.h"
#include "tools/commands.h"
#include "tools/scaling.h"

namespace ddpm::tools {
namespace {

std::string widths_text(const UNetConfig& u) {
  std::string text;
  for (int i = 0; i < u.levels(); ++i)
    text += format("%s%d%s", i > 0 ? ", " : "", u.block_out_channels[static_cast<size_t>(i)],
                   u.down_attention[static_cast<size_t>(i)] ? " (attention)" : "");
  return text;
}

void print_plan(const char* what, const Graph& g, size_t arenas, int batch) {
  const Plan plan = make_plan(g.tensors(), g.steps());
  std::printf(
      "%-9s %zu steps; %s planned (bound %s) and %s of parameters; %.3f GFLOP per image\n", what,
      g.steps().size(), bytes_text(plan.bytes).c_str(), bytes_text(plan.lower_bound).c_str(),
      bytes_text(arenas * sizeof(float) * static_cast<size_t>(g.params().arena_size())).c_str(),
      2e-9 * static_cast<double>(g.macs()) / batch * (g.training() ? 3 : 1));
}

// A row for 1, 2, 4 ... ranks: the same images on each of them, and `batch` images of all together.
void print_scaling(const InfoArgs& args, const Graph& training, int batch,
                   const std::function<size_t(int)>& bytes_of) {
  const Link link{args.bandwidth * 1e9, args.latency * 1e-6};
  const std::vector<Closing> buckets = closings(training, Parts{}.bucket);
  const double step = args.step_ms * 1e-3;
  std::printf(
      "\nranks by arithmetic (docs/scaling.md): %g ms a step of %d images on one, %g GB/s, %g us, "
      "%zu sums of %s in all\n",
      args.step_ms, batch, args.bandwidth, args.latency, buckets.size(),
      bytes_text(sizeof(float) * static_cast<size_t>(training.params().arena_size())).c_str());
  std::printf("%8s | %-43s | %-43s\n", "", format("weak: %d images on each rank", batch).c_str(),
              format("strong: %d images of all ranks", batch).c_str());
  std::printf("%8s |", "ranks");
  for (int i = 0; i < 2; ++i)
    std::printf(" %9s %9s %9s %12s |", "step ms", "exposed", "gain", "memory");
  std::printf("\n");
  const size_t whole = bytes_of(batch);
  for (int n = 1;; n = std::min(2 * n, args.ranks)) {
    const auto print = [&](double compute, double gain_of_one, size_t bytes) {
      const double exposed = step_on_ranks(buckets, compute, n, link).exposed;
      std::printf(" %9.2f %9.2f %8.1fx %12s |", 1e3 * (compute + exposed), 1e3 * exposed,
                  gain_of_one / (compute + exposed), bytes_text(bytes).c_str());
    };
    std::printf("%8d |", n);
    print(step, n * step, whole);
    if (batch % n == 0)
      print(step / n, step, bytes_of(batch / n));
    else
      std::printf(" %9s %9s %9s %12s |", "-", "-", "-", "-");
    std::printf("\n");
    if (n == args.ranks) break;
  }
}

}  // namespace

void run_info(const InfoArgs& args) {
  UNetConfig unet;
  SchedulerConfig scheduler;
  int batch = args.batch_size > 0 ? args.batch_size : 1;
  if (!args.model.empty()) {
    const Pipeline p = open_pipeline(args.model);
    unet = p.unet;
    scheduler = p.scheduler;
    std::printf("model     %s\n", p.folder.c_str());
  } else {
    const Preset& p = find_preset(args.preset);
    unet = p.unet;
    scheduler = p.scheduler;
    if (args.batch_size == 0) batch = p.train.batch_size;
    std::printf("preset    %s: batch %d, %s steps, learning rate %g\n", p.name.c_str(),
                p.train.batch_size, grouped(p.train.steps).c_str(), p.train.learning_rate);
  }
  const std::unique_ptr<Backend> backend = open_backend({});
  TrainerOptions options;
  options.batch_size = batch;
  options.objective.loss = usual_loss(scheduler.variance_type);
  const TrainingGraph training = build_training_graph(*backend, unet, scheduler, options, 1);
  const SamplingGraph sampling =
      build_sampling_graph(*backend, unet, scheduler.num_train_timesteps, batch, 1);
  const Params& params = training.graph.params();
  std::printf("images    %dx%dx%d\n", unet.sample_height, unet.sample_width, unet.in_channels);
  std::printf("levels    %s; %d blocks each\n", widths_text(unet).c_str(), unet.layers_per_block);
  std::printf("schedule  %s, T %d, predicts %s, variance %s\n",
              name_of(scheduler.beta_schedule).c_str(), scheduler.num_train_timesteps,
              name_of(scheduler.prediction_type).c_str(), name_of(scheduler.variance_type).c_str());
  if (unet.classes() > 0)
    std::printf("classes   %d%s\n", unet.classes(), unet.null_class ? ", or none: guided" : "");
  std::printf("params    %s in %zu tensors\n", grouped(params.count()).c_str(),
              checkpoint_tensors(params).size());
  std::printf("batch     %d\n", batch);
  print_plan("training", training.graph, kArenas, batch);
  print_plan("sampling", sampling.graph, 1, batch);
  if (args.ranks == 0) return;
  print_scaling(args, training.graph, batch, [&](int images) {
    TrainerOptions share = options;
    share.batch_size = images;
    const Graph g = build_training_graph(*backend, unet, scheduler, share, 1).graph;
    return planned_bytes(g) +
           kArenas * sizeof(float) * static_cast<size_t>(g.params().arena_size());
  });
}

}  // namespace ddpm::tools
