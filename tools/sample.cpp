// ddpm sample
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <memory>

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
void choose_classes(const SampleArgs& args, const UNetConfig& u, Sampling& job) {
  const int classes = u.classes();
  if (args.label && (*args.label < 0 || *args.label >= classes)) {
    if (classes == 0)
      fail(Status::kUsage,
           "--label %d: the model has no classes; train one with unet.num_class_embeds",
           *args.label);
    fail(Status::kUsage, "--label %d: the model has classes 0 to %d", *args.label, classes - 1);
  }
  if (args.guidance != 1 && !u.null_class)
    fail(Status::kUsage,
         "--guidance %g: the model %s; train one with train.label_dropout, 0.1 say, and "
         "unet.num_class_embeds = classes + 1",
         args.guidance,
         classes == 0 ? "has no classes" : "was not trained without its classes too");
  job.guidance = static_cast<float>(args.guidance);
  for (uint64_t i = 0; classes > 0 && i < static_cast<uint64_t>(job.num); ++i)
    job.labels.push_back(args.label.value_or(
        static_cast<int32_t>((job.first + i) % static_cast<uint64_t>(classes))));
}

// What the command line asks for, but for the model's hash. `images`: those of --from, which have
// no noise yet.
Sampling new_job(const SampleArgs& args, const Pipeline& p, const Shape& image,
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
  job.batch_size =
      args.batch_size > 0 ? args.batch_size : static_cast<int>(std::min<int64_t>(job.num, 64));
  choose_classes(args, p.unet, job);
  return job;
}

// Draws what a job asks for, batch by batch.
class Sampler {
 public:
  Sampler(Generator& generator, Sampling& job, const Shape& image)
      : generator_(generator),
        job_(job),
        size_(static_cast<size_t>(image.count())),
        progress_("image", job.images_done, job.num) {}

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

  // Whether all is done; else the job is as it was left, after `most` steps or by a signal.
  bool run(const StopSignal* stop, std::optional<int64_t> most) {
    while (job_.images_done < job_.num) {
      begin_batch();
      if (!run_batch(stop, most)) return false;
      const int now = static_cast<int>(job_.batch());
      const std::vector<float> done =
          job_.latents ? generator_.latents(now) : generator_.images(now);
      job_.images.insert(job_.images.end(), done.begin(), done.end());
      job_.images_done += now;
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
    std::copy_n(job_.labels.begin() + job_.images_done, job_.batch(), labels_.begin());
    return labels_.data();
  }

  // The slots without an image run along with zeros.
  std::vector<float> padded(std::vector<float> values) const {
    values.resize(static_cast<size_t>(job_.batch_size) * size_, 0.0f);
    return values;
  }

  void begin_batch() {
    const uint64_t first = job_.first + static_cast<uint64_t>(job_.images_done);
    if (job_.steps_done > 0) {
      Generator::Suspended s{job_.steps_done, padded(std::move(job_.x)), {}};
      if (!job_.previous.empty()) s.previous = padded(std::move(job_.previous));
      generator_.resume(job_.seed, first, labels(), s);
      job_.x = job_.previous = {};
      return;
    }
    generator_.begin(job_.seed, first, labels());
    if (job_.starts.empty()) return generator_.executor().run(Phase::kStart);
    const auto end = job_.starts.begin() + job_.batch() * static_cast<int64_t>(size_);
    const std::vector<float> x = padded({job_.starts.begin(), end});
    job_.starts.erase(job_.starts.begin(), end);
    generator_.executor().upload(generator_.x(), x.data());
  }

  bool run_batch(const StopSignal* stop, std::optional<int64_t> most) {
    struct Stopped {};
    const int before = job_.steps_done, all = generator_.steps();
    const int part = static_cast<int>(std::min<int64_t>(all - before, most ? *most - taken_ : all));
    try {
      generator_.executor().steps(part, [&](int done) {
        progress_.update(job_.images_done, format("step %d/%d", before + done, all));
        if (stop != nullptr && stop->raised() && before + done < all) throw Stopped{};
      });
      taken_ += part;
      if (before + part == all) return true;
    } catch (const Stopped&) {
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

  Generator& generator_;
  Sampling& job_;
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

}  // namespace

Status run_sample(const SampleArgs& args) {
  require_one_process();
  const std::unique_ptr<StopSignal> stop(args.suspend.empty() ? nullptr : new StopSignal);
  const Pipeline p = open_pipeline(args.model);
  const Shape image{1, p.unet.sample_height, p.unet.sample_width, p.unet.in_channels};
  std::vector<float> images;
  Sampling job =
      args.resume.empty() ? new_job(args, p, image, images) : read_sampling(args.resume, p);
  require_writable(args.out);
  if (!args.suspend.empty()) {
    require_writable(args.suspend);
    job.model = model_hash(p);
  }

  const std::unique_ptr<Backend> backend = open_backend(args.device);
  const Chain chain = make_chain(*backend, p, job.rows, job.batch_size, job.guidance);
  print_header(*backend, p, job, chain);
  Sampler sampler(*chain.generator, job, image);
  if (!images.empty()) sampler.noise_images(images, Schedule(p.scheduler));
  if (sampler.run(stop.get(), args.suspend_at)) {
    write_images(args, job, image);
    std::printf("%s\n", args.out.c_str());
    return Status::kOk;
  }
  job.numerics = backend->numerics();
  write_sampling(args.suspend, job, image);
  std::fprintf(stderr,
               "suspended after %lld images and %d steps of the next batch; --resume %s "
               "goes on\n",
               static_cast<long long>(job.images_done), job.steps_done, args.suspend.c_str());
  return stop->raised() ? Status::kStopped : Status::kOk;
}

}  // namespace ddpm::tools
