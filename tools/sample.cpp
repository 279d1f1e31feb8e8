// ddpm sample
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <memory>

#include "engine/safetensors.h"
#include "tools/commands.h"
#include "tools/image_io.h"
#include "tools/npz.h"
#include "tools/progress.h"
#include "tools/ranks.h"
#include "tools/start_images.h"
#include "tools/stop_signal.h"
#include "tools/suspended.h"

namespace ddpm::tools {
namespace {

// Or else a folder of PNGs.
bool is_file(const std::string& out) {
  return out.ends_with(".safetensors") || out.ends_with(".png") || out.ends_with(".npz");
}

void write_images(const SampleArgs& args, const Sampling& job, const Shape& s) {
  const std::vector<float>& images = job.images;
  if (args.out.ends_with(".safetensors"))
    return write_image_tensor(args.out, job.latents ? "x_T" : "images", images, job.num, s);
  const std::vector<uint8_t> pixels = to_uint8(images);
  if (args.out.ends_with(".png"))
    write_png(args.out, image_grid(pixels.data(), job.num, s.h, s.w, s.c, display_scale(s.h, s.w)));
  else if (args.out.ends_with(".npz"))
    write_npz(args.out, pixels.data(), job.num, s.h, s.w, s.c);
  else
    write_png_folder(args.out, pixels.data(), job.num, s.h, s.w, s.c,
                     static_cast<int64_t>(job.first));
}

// Classes of images first, ... and how they guide their chains.
void choose_classes(const ChainArgs& args, const UNetConfig& u, Sampling& job) {
  require_classes(args, u);
  job.guidance = static_cast<float>(args.guidance);
  const auto classes = static_cast<uint64_t>(u.classes());
  for (uint64_t i = 0; classes > 0 && i < static_cast<uint64_t>(job.num); ++i)
    job.labels.push_back(args.label.value_or(static_cast<int32_t>((job.first + i) % classes)));
}

// What the command line asks for, but for the model's hash. `images`: those of --from, which have
// no noise yet.
Sampling new_job(const SampleArgs& args, const Pipeline& p, const Shape& image, int ranks,
                 std::vector<float>& images) {
  SamplerOptions options =
      sampler_options(args.chain, args.invert.empty() ? SamplerKind::kDdpm : SamplerKind::kDdim);
  if (!args.from.empty()) options.strength = args.strength;
  const Schedule schedule(p.scheduler);
  Sampling job;
  job.seed = args.seed;
  job.first = args.first;
  job.num = args.num;
  job.latents = !args.invert.empty();
  job.rows = job.latents ? ddim_inverse_rows(schedule, p.scheduler, options)
                         : sampler_rows(schedule, p.scheduler, options);
  job.sampler = name_of(options.kind) + (job.latents ? " inverted" : "");
  if (job.num < 1) fail(Status::kUsage, "--num %lld: at least 1", static_cast<long long>(job.num));
  if (job.latents && !args.out.ends_with(".safetensors"))
    fail(Status::kUsage, "--invert writes latents: --out %s must end in .safetensors",
         args.out.c_str());
  if (!args.init.empty()) {
    StartImages start = read_latents(args.init, image);
    job.num = start.count;
    job.starts = std::move(start.values);
  } else if (job.latents) {
    StartImages start = read_start_images(args.invert, image, args.num);
    job.num = start.count;
    job.starts = std::move(start.values);
  } else if (!args.from.empty()) {
    StartImages start = read_start_images(args.from, image, args.num);
    images = std::move(start.values);
    if (start.count == 1)  // as many pictures of the one image
      for (int64_t i = 1; i < args.num; ++i)
        images.insert(images.end(), images.begin(), images.begin() + image.count());
    else
      job.num = start.count;
  }
  job.batch_size = args.batch_size > 0
                       ? args.batch_size
                       : static_cast<int>(std::min<int64_t>((job.num + ranks - 1) / ranks, 64));
  choose_classes(args.chain, p.unet, job);
  return job;
}

// Draws what a job asks for: in rounds, a batch on each rank. Rank 0 has the images then.
class Sampler {
 public:
  Sampler(Communicator& ranks, Generator& generator, Sampling& job, const Shape& image)
      : ranks_(ranks),
        generator_(generator),
        job_(job),
        size_(static_cast<size_t>(image.count())),
        progress_("image", job.images_done, job.num, ranks.rank() != 0) {}

  // x_t = sqrt_ab x0 + sqrt_1mab noise at the first row's t, the noise being that of the images'
  // numbers.
  void noise_images(const std::vector<float>& x0, const Schedule& schedule) {
    const double ab = schedule.alpha_bar(job_.rows[0].t);
    job_.starts.clear();
    for (int64_t done = 0; done < job_.num; done += job_.batch_size) {
      const std::vector<float> noise =
          generator_.start_noise(job_.seed, job_.first + static_cast<uint64_t>(done));
      const size_t at = static_cast<size_t>(done) * size_;
      for (size_t i = 0; i < noise.size() && at + i < x0.size(); ++i)
        job_.starts.push_back(static_cast<float>(std::sqrt(ab) * double{x0[at + i]} +
                                                 std::sqrt(1 - ab) * double{noise[i]}));
    }
  }

  // Whether all is done; else the job, of one process, is as it was left, after `most` steps or by
  // a signal.
  bool run(const StopSignal* stop, std::optional<int64_t> most) {
    while (job_.images_done < job_.num) {
      round_ = round_at(ranks_, job_.images_done, job_.num, job_.batch_size);
      begin_batch();
      if (!run_batch(stop, most)) return false;
      std::vector<float> own;
      if (round_.count > 0)
        own = job_.latents ? generator_.latents(round_.count) : generator_.images(round_.count);
      const std::vector<float> done = collect(ranks_, own);
      job_.images.insert(job_.images.end(), done.begin(), done.end());
      job_.images_done = round_.next;
      job_.steps_done = 0;
      if (job_.images_done < job_.num && most && *most == taken_) return false;
    }
    progress_.show(job_.num, format("%.1f s", progress_.seconds()));
    return true;
  }

 private:
  const int32_t* labels() {
    if (job_.labels.empty()) return nullptr;
    labels_.assign(static_cast<size_t>(job_.batch_size), 0);
    std::copy_n(job_.labels.begin() + round_.first, round_.count, labels_.begin());
    return labels_.data();
  }

  // The slots without an image run along with zeros.
  std::vector<float> padded(std::vector<float> values) const {
    values.resize(static_cast<size_t>(job_.batch_size) * size_, 0.0f);
    return values;
  }

  // Where the chains of this rank's batch start, unless from noise; those of the round are taken
  // out of the job.
  std::vector<float> take_starts() {
    if (job_.starts.empty()) return {};
    const auto value = [&](int64_t image) {
      return job_.starts.begin() + (image - job_.images_done) * static_cast<int64_t>(size_);
    };
    std::vector<float> x;
    if (round_.count > 0) x.assign(value(round_.first), value(round_.first + round_.count));
    job_.starts.erase(job_.starts.begin(), value(round_.next));
    return padded(std::move(x));
  }

  void begin_batch() {
    const uint64_t first = job_.first + static_cast<uint64_t>(round_.first);
    if (job_.steps_done > 0) {
      Generator::Suspended s{job_.steps_done, padded(std::move(job_.x)), {}};
      if (!job_.previous.empty()) s.previous = padded(std::move(job_.previous));
      generator_.resume(job_.seed, first, labels(), s);
      job_.x = job_.previous = {};
      return;
    }
    const std::vector<float> x = take_starts();
    if (round_.count == 0) return;
    generator_.begin(job_.seed, first, labels());
    if (x.empty()) return generator_.executor().run(Phase::kStart);
    generator_.executor().upload(generator_.x(), x.data());
  }

  bool run_batch(const StopSignal* stop, std::optional<int64_t> most) {
    const int before = job_.steps_done, all = generator_.steps();
    const int part = static_cast<int>(std::min<int64_t>(all - before, most ? *most - taken_ : all));
    const auto progress = [&](int done) {
      progress_.update(job_.images_done, format("step %d/%d", before + done, all));
    };
    if (take_steps(ranks_, generator_, part, round_.count == 0, progress, stop)) {
      taken_ += part;
      if (before + part == all) return true;
    }
    const size_t values = static_cast<size_t>(job_.batch()) * size_;
    Generator::Suspended s = generator_.suspend();
    s.x.resize(values);
    if (!s.previous.empty()) s.previous.resize(values);
    job_.steps_done = s.done;
    job_.x = std::move(s.x);
    job_.previous = std::move(s.previous);
    return false;
  }

  Communicator& ranks_;
  Generator& generator_;
  Sampling& job_;
  Round round_;
  size_t size_;        // of an image
  int64_t taken_ = 0;  // steps
  std::vector<int32_t> labels_;
  Progress progress_;
};

void print_header(const Backend& backend, const Pipeline& p, const Sampling& job,
                  const Chain& chain) {
  const Shape& image = chain.generator->shape();
  std::fprintf(stderr,
               "device   %s\nmodel    %s, %s parameters\nsampling %lld image%s %dx%dx%d, %s, "
               "%d steps, batch %d%s, %s\n",
               backend.description().c_str(), p.folder.c_str(),
               grouped(chain.store->params().count()).c_str(), static_cast<long long>(job.num),
               job.num == 1 ? "" : "s", image.h, image.w, image.c, job.sampler.c_str(),
               chain.generator->steps(), job.batch_size,
               job.guidance != 1 ? format(", guided by %g", double{job.guidance}).c_str() : "",
               bytes_text(chain.bytes()).c_str());
  if (job.images_done > 0 || job.steps_done > 0)
    std::fprintf(stderr, "resumed  after %lld images and %d steps of the next batch\n",
                 static_cast<long long>(job.images_done), job.steps_done);
  if (!job.numerics.empty() && job.numerics != backend.numerics())
    std::fprintf(stderr, "note: it was begun as \"%s\" and goes on as \"%s\": not bit-exact\n",
                 job.numerics.c_str(), backend.numerics().c_str());
}

// Of a job with its model's hash, all that it is and not how far it is.
std::string settings_of(const Sampling& job, const std::vector<float>& images) {
  const auto hash = [](const auto& values) {
    return hash_of(
        {reinterpret_cast<const char*>(values.data()), values.size() * sizeof values[0]});
  };
  return format("%s %llu %llu %lld %d %d %.9g %s %s %s %s", job.model.c_str(),
                static_cast<unsigned long long>(job.seed),
                static_cast<unsigned long long>(job.first), static_cast<long long>(job.num),
                job.batch_size, job.latents ? 1 : 0, double{job.guidance}, hash(job.rows).c_str(),
                hash(job.labels).c_str(), hash(job.starts).c_str(), hash(images).c_str());
}

void require_no_suspending(const SampleArgs& args, int ranks) {
  if (ranks > 1 && !(args.suspend.empty() && args.resume.empty()))
    fail(Status::kUsage,
         "%s keeps the chains of one process, and there are %d ranks: start one, or leave it out",
         args.suspend.empty() ? "--resume" : "--suspend", ranks);
}

Status sample(const SampleArgs& args, Ranks& ranks, const StopSignal* stop) {
  Communicator& all = ranks.communicator();
  const bool several = all.size() > 1;
  Pipeline p;
  Shape image;
  std::vector<float> images;
  Sampling job;
  agree(all, [&] {
    require_no_suspending(args, all.size());
    p = open_pipeline(args.model);
    image = {1, p.unet.sample_height, p.unet.sample_width, p.unet.in_channels};
    job = args.resume.empty() ? new_job(args, p, image, all.size(), images)
                              : read_sampling(args.resume, p);
    if (ranks.first()) (is_file(args.out) ? require_writable_file : require_writable)(args.out);
    if (!args.suspend.empty()) require_writable_file(args.suspend);
    if (several || !args.suspend.empty()) job.model = model_hash(p);
  });
  if (several) require_equal_settings(all, settings_of(job, images));

  Backend& backend = ranks.open_device();
  Chain chain;
  plan_alike(all, backend, [&] {
    chain = make_chain(backend, p, job.rows, job.batch_size, double{job.guidance});
  });
  print_ranks(all, backend);
  if (ranks.first()) print_header(backend, p, job, chain);
  Sampler sampler(all, *chain.generator, job, image);
  if (!images.empty()) sampler.noise_images(images, Schedule(p.scheduler));
  if (sampler.run(stop, args.suspend_at)) {
    if (!ranks.first()) return Status::kOk;
    write_images(args, job, image);
    std::printf("%s\n", args.out.c_str());
    return Status::kOk;
  }
  job.numerics = backend.numerics();
  write_sampling(args.suspend, job, image);
  std::fprintf(stderr,
               "suspended after %lld images and %d steps of the next batch; --resume %s "
               "goes on\n",
               static_cast<long long>(job.images_done), job.steps_done, args.suspend.c_str());
  return stop->raised() ? Status::kStopped : Status::kOk;
}

}  // namespace

Status run_sample(const SampleArgs& args) {
  const std::string advice = "no image was written; the same command begins anew";
  const Launch launch = find_launch();
  if (const auto ended = start_ranks(args.ranks, args.device, launch, advice)) return *ended;
  const std::unique_ptr<StopSignal> stop(args.suspend.empty() ? nullptr : new StopSignal);
  Ranks ranks(launch, args.device, args.ranks, advice);
  return ranks.run([&] { return sample(args, ranks, stop.get()); });
}

}  // namespace ddpm::tools
