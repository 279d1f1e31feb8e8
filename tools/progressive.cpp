// ddpm progressive: the paper's figures 6 and 7.
#include <algorithm>
#include <cstdio>

#include "tools/commands.h"
#include "tools/progress.h"
#include "tools/ranks.h"
#include "tools/strips.h"

namespace ddpm::tools {
namespace {

void check_shared(const ProgressiveArgs& args, const SamplerOptions& options, int timesteps) {
  for (const int t : args.shared)
    if (t < 0 || t >= timesteps)
      fail(Status::kUsage, "--shared %d: the model has timesteps 0 to %d", t, timesteps - 1);
  const bool draws = options.kind == SamplerKind::kDdpm || options.eta > 0;
  if (!args.shared.empty() && !draws)
    fail(Status::kUsage,
         "--shared: %s draws no noise, so all ends would be the same; use ddpm, or ddim with --eta",
         name_of(options.kind).c_str());
}

}  // namespace

void run_progressive(const ProgressiveArgs& args) {
  require_one_process();
  require_png(args.out);
  const Pipeline p = open_pipeline(args.model);
  const int timesteps = p.scheduler.num_train_timesteps;
  const SamplerOptions options = sampler_options(args.chain, SamplerKind::kDdpm);
  check_shared(args, options, timesteps);
  require_classes(args.chain, p.unet);
  const std::vector<SamplerRow> rows = sampler_rows(Schedule(p.scheduler), p.scheduler, options);
  require_writable_file(args.out);
  const std::unique_ptr<Backend> backend = open_backend(args.device);
  const Chain chain =
      make_chain(*backend, p, rows, args.num, args.chain.guidance, args.chain.label);
  Generator& g = *chain.generator;
  std::fprintf(stderr, "device   %s\nmodel    %s\nsampling %s, %d steps, batch %d, %s\n",
               backend->description().c_str(), p.folder.c_str(), name_of(options.kind).c_str(),
               g.steps(), args.num, bytes_text(chain.bytes()).c_str());
  // A shared latent's chain has the trunk's steps left, which are at most all.
  const int64_t total = g.steps() * (1 + static_cast<int64_t>(args.shared.size()));
  Progress progress("step", 0, total);
  int64_t last = 0;
  const StepsDone told = [&](int64_t done) { progress.update(last = done); };
  const Strips strips = args.shared.empty()
                            ? predictions(g, timesteps, args.columns, args.seed, args.first, told)
                            : shared_latents(g, args.shared, args.seed, args.first, told);
  progress.show(last, format("%.1f s", progress.seconds()));
  write_strips(args.out, strips, g.shape());
  std::printf("%s\n", args.out.c_str());
}

}  // namespace ddpm::tools
