// ddpm interpolate: the paper's figure 8, and the same between latents of DDIM.
#include <algorithm>
#include <cmath>
#include <cstdio>

#include "tools/commands.h"
#include "tools/progress.h"
#include "tools/ranks.h"
#include "tools/start_images.h"
#include "tools/strips.h"

namespace ddpm::tools {
namespace {

// What to mix, and the rows that make images of it.
struct Work {
  std::vector<SamplerRow> to_latents;  // of ddim; else noise is added
  std::vector<SamplerRow> rows;
  Blend mix = Blend::kLinear;
};

Work work_of(const InterpolateArgs& args, const SchedulerConfig& c) {
  const Schedule s(c);
  const bool ddim = args.latents == "ddim";
  SamplerOptions options =
      sampler_options(args.chain, ddim ? SamplerKind::kDdim : SamplerKind::kDdpm);
  Work work;
  const std::string mix = !args.mix.empty() ? args.mix : ddim ? "spherical" : "linear";
  if (mix == "spherical") work.mix = Blend::kSpherical;
  if (ddim) {
    if (args.timestep) fail(Status::kUsage, "--timestep: ddim leads images to the chain's start");
    work.to_latents = ddim_inverse_rows(s, c, options);
    if (!options.clip) options.clip = false;  // or the images would not come back
    work.rows = sampler_rows(s, c, options);
    return work;
  }
  options.start = args.timestep.value_or(s.timesteps() / 2);
  work.rows = sampler_rows(s, c, options);
  return work;
}

// The first 2 * num images, as (pairs,H,W,C) of firsts and seconds.
Pairs read_pairs(const InterpolateArgs& args, const Shape& image) {
  const StartImages all = read_start_images(args.from, image, 2 * int64_t{args.num});
  if (all.count < 2)
    fail(Status::kConfig, "--from %s holds one image; an interpolation takes two",
         args.from.c_str());
  Pairs pairs;
  const int64_t size = image.count();
  for (int64_t i = 0; i + 1 < all.count; i += 2)
    for (const int64_t k : {i, i + 1}) {
      std::vector<float>& to = k == i ? pairs.a : pairs.b;
      to.insert(to.end(), all.values.begin() + k * size, all.values.begin() + (k + 1) * size);
    }
  return pairs;
}

// x_t = sqrt_ab x0 + sqrt_1mab noise, at the chain's first timestep.
std::vector<float> diffused(const std::vector<float>& x0, const std::vector<float>& noise,
                            double ab) {
  std::vector<float> x(x0.size());
  for (size_t i = 0; i < x.size(); ++i)
    x[i] = static_cast<float>(std::sqrt(ab) * double{x0[i]} + std::sqrt(1 - ab) * double{noise[i]});
  return x;
}

std::vector<float> led_back(Generator& g, const std::vector<float>& images) {
  g.begin(0, 0);
  g.executor().upload(g.x(), images.data());
  g.executor().steps(g.steps());
  return g.latents(g.batch_size());
}

}  // namespace

void run_interpolate(const InterpolateArgs& args) {
  require_one_process();
  require_png(args.out);
  const Pipeline p = open_pipeline(args.model);
  const Shape image{1, p.unet.sample_height, p.unet.sample_width, p.unet.in_channels};
  const Work work = work_of(args, p.scheduler);
  require_classes(args.chain, p.unet);
  Pairs pairs = read_pairs(args, image);
  require_writable_file(args.out);
  const int batch = static_cast<int>(static_cast<int64_t>(pairs.a.size()) / image.count());
  const std::unique_ptr<Backend> backend = open_backend(args.device);
  std::fprintf(stderr, "device   %s\nmodel    %s\npairs    %d, %s latents, %zu steps\n",
               backend->description().c_str(), p.folder.c_str(), batch, args.latents.c_str(),
               work.rows.size());
  if (!work.to_latents.empty()) {
    const Chain back = make_chain(*backend, p, work.to_latents, batch, 1, args.chain.label);
    pairs.from_a = led_back(*back.generator, pairs.a);
    pairs.from_b = led_back(*back.generator, pairs.b);
  }
  const Chain chain =
      make_chain(*backend, p, work.rows, batch, args.chain.guidance, args.chain.label);
  Generator& g = *chain.generator;
  if (work.to_latents.empty()) {
    const double ab = Schedule(p.scheduler).alpha_bar(work.rows[0].t);
    const auto second = args.first + static_cast<uint64_t>(batch);  // noise of its own
    pairs.from_a = diffused(pairs.a, g.start_noise(args.seed, args.first), ab);
    pairs.from_b = diffused(pairs.b, g.start_noise(args.seed, second), ab);
  }
  const int64_t total = int64_t{g.steps()} * args.columns;
  Progress progress("step", 0, total);
  const Strips strips = interpolations(g, pairs, work.mix, args.columns, args.seed, args.first,
                                       [&](int64_t done) { progress.update(done); });
  progress.show(total, format("%.1f s", progress.seconds()));
  write_strips(args.out, strips, g.shape());
  std::printf("%s\n", args.out.c_str());
}

}  // namespace ddpm::tools
