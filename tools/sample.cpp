// ddpm sample
#include <algorithm>
#include <cstdio>
#include <memory>

#include "engine/file_io.h"
#include "engine/safetensors.h"
#include "model/generator.h"
#include "model/pipeline.h"
#include "tools/commands.h"
#include "tools/image_io.h"
#include "tools/npz.h"
#include "tools/progress.h"
#include "tools/ranks.h"

namespace ddpm::tools {
namespace {

// x_T F32 [N,C,H,W] of --init, as (N,H,W,C).
std::vector<float> read_init(const std::string& path, const Shape& image, int64_t& count) {
  const SafetensorsReader file(path, Status::kConfig);
  const TensorInfo* t = file.find("x_T");
  if (t == nullptr || t->dtype != "F32" || t->shape.size() != 4)
    fail(Status::kConfig, "%s: --init needs a tensor \"x_T\", F32 [N,C,H,W]", path.c_str());
  const auto extent = [&](size_t i) { return static_cast<int64_t>(t->shape[i]); };
  if (extent(0) < 1 || extent(1) != image.c || extent(2) != image.h || extent(3) != image.w)
    fail(Status::kConfig, "%s: x_T is [%lld,%lld,%lld,%lld]; the model's images are [N,%d,%d,%d]",
         path.c_str(), static_cast<long long>(extent(0)), static_cast<long long>(extent(1)),
         static_cast<long long>(extent(2)), static_cast<long long>(extent(3)), image.c, image.h,
         image.w);
  count = extent(0);
  std::vector<float> values(static_cast<size_t>(count * image.count()));
  file.read_f32(*t, values.data());
  return to_nhwc(values, static_cast<int>(count), image.h, image.w, image.c);
}

void write_images(const SampleArgs& args, const std::vector<float>& images, int64_t count,
                  const Shape& s) {
  if (args.out.ends_with(".safetensors")) {
    const std::vector<float> nchw = to_nchw(images, static_cast<int>(count), s.h, s.w, s.c);
    OutputFile file(args.out);
    write_safetensors(file,
                      {tensor_in_memory("images", DType::kF32,
                                        {static_cast<uint64_t>(count), static_cast<uint64_t>(s.c),
                                         static_cast<uint64_t>(s.h), static_cast<uint64_t>(s.w)},
                                        nchw.data())});
    file.commit();
    return;
  }
  const std::vector<uint8_t> pixels = to_uint8(images);
  if (args.out.ends_with(".png"))
    write_png(args.out, image_grid(pixels.data(), count, s.h, s.w, s.c, display_scale(s.h, s.w)));
  else if (args.out.ends_with(".npz"))
    write_npz(args.out, pixels.data(), count, s.h, s.w, s.c);
  else
    write_png_folder(args.out, pixels.data(), count, s.h, s.w, s.c,
                     static_cast<int64_t>(args.first));
}

SamplerOptions sampler_options(const SampleArgs& args) {
  SamplerOptions o;
  o.kind = parse_sampler(args.sampler);
  o.steps = args.steps;
  if (!args.spacing.empty()) o.spacing = parse_spacing(args.spacing);
  o.eta = args.eta;
  return o;
}

}  // namespace

void run_sample(const SampleArgs& args) {
  require_one_process();
  const Pipeline p = open_pipeline(args.model);
  const SamplerOptions options = sampler_options(args);
  sampler_rows(Schedule(p.scheduler), p.scheduler, options);  // refuses before anything is loaded
  require_writable(args.out);
  const Shape image{1, p.unet.sample_height, p.unet.sample_width, p.unet.in_channels};
  int64_t count = args.num;
  std::vector<float> init;
  if (!args.init.empty()) init = read_init(args.init, image, count);
  if (count < 1) fail(Status::kUsage, "--num %lld: at least 1", static_cast<long long>(count));

  const std::unique_ptr<Backend> backend = open_backend(args.device);
  std::unique_ptr<ParamStore> store;
  const int batch =
      args.batch_size > 0 ? args.batch_size : static_cast<int>(std::min<int64_t>(count, 64));
  Generator generator(*backend, p.unet, p.scheduler, options, batch, [&](const Params& params) {
    store = load_store(*backend, p, params);
    return store->arenas();
  });
  generator.weights_final();
  std::fprintf(stderr,
               "device   %s\nmodel    %s, %s parameters\nsampling %lld image%s %dx%dx%d, %s, "
               "%d steps, batch %d, %s\n",
               backend->description().c_str(), p.folder.c_str(),
               grouped(store->params().count()).c_str(), static_cast<long long>(count),
               count == 1 ? "" : "s", image.h, image.w, image.c, name_of(options.kind).c_str(),
               generator.steps(), batch, bytes_text(store->bytes() + generator.bytes()).c_str());

  std::vector<float> images;
  images.reserve(static_cast<size_t>(count * image.count()));
  Progress progress("image", 0, count);
  for (int64_t done = 0; done < count; done += batch) {
    const int now = static_cast<int>(std::min<int64_t>(batch, count - done));
    const auto report = [&](int step) {
      progress.update(done, format("step %d/%d", step, generator.steps()));
    };
    const uint64_t first = args.first + static_cast<uint64_t>(done);
    std::vector<float> chunk;
    if (init.empty()) {
      chunk = generator.sample(args.seed, first, now, report);
    } else {
      const auto at = init.begin() + done * image.count();
      chunk = generator.sample_from({at, at + now * image.count()}, args.seed, first, now, report);
    }
    images.insert(images.end(), chunk.begin(), chunk.end());
  }
  progress.show(count, format("%.1f s", progress.seconds()));
  write_images(args, images, count, image);
  std::printf("%s\n", args.out.c_str());
}

}  // namespace ddpm::tools
