// Writes a small valid file or two for each target into FOLDER/TARGET.
#include <cstdio>
#include <cstdlib>
#include <nlohmann/json.hpp>

// After <cstdio>, which it needs.
#include <jpeglib.h>

#include "engine/file_io.h"
#include "engine/safetensors.h"
#include "model/run_config.h"
#include "tests/fuzz/suspended_model.h"
#include "tools/eval_progress.h"
#include "tools/image_io.h"
#include "tools/suspended.h"

using namespace ddpm;

namespace {

tools::Image gradient(int channels) {
  tools::Image image = tools::make_image(6, 5, channels);
  for (size_t i = 0; i < image.pixels.size(); ++i) image.pixels[i] = static_cast<uint8_t>(i * 7);
  return image;
}

std::string text_of(const std::vector<uint8_t>& bytes) { return {bytes.begin(), bytes.end()}; }

std::string jpeg_of(const tools::Image& image, bool progressive) {
  jpeg_compress_struct jpeg;
  jpeg_error_mgr errors;
  jpeg.err = jpeg_std_error(&errors);
  jpeg_create_compress(&jpeg);
  unsigned char* bytes = nullptr;
  unsigned long size = 0;
  jpeg_mem_dest(&jpeg, &bytes, &size);
  jpeg.image_width = static_cast<JDIMENSION>(image.w);
  jpeg.image_height = static_cast<JDIMENSION>(image.h);
  jpeg.input_components = image.c;
  jpeg.in_color_space = image.c == 1 ? JCS_GRAYSCALE : JCS_RGB;
  jpeg_set_defaults(&jpeg);
  if (progressive) jpeg_simple_progression(&jpeg);
  jpeg_start_compress(&jpeg, TRUE);
  while (jpeg.next_scanline < jpeg.image_height) {
    auto* row = const_cast<JSAMPROW>(image.pixels.data()) +
                static_cast<size_t>(jpeg.next_scanline) * image.w * image.c;
    jpeg_write_scanlines(&jpeg, &row, 1);
  }
  jpeg_finish_compress(&jpeg);
  jpeg_destroy_compress(&jpeg);
  std::string text(reinterpret_cast<char*>(bytes), size);
  std::free(bytes);
  return text;
}

void write_tensors(const std::string& path) {
  const std::vector<float> values = {1, 2, 3, 4, 5, 6};
  const std::vector<uint8_t> images(size_t{2} * 3 * 4 * 3, 9);
  const std::vector<int64_t> labels = {0, 1};
  OutputFile file(path);
  write_safetensors(file, {tensor_in_memory("weight", DType::kF32, {2, 3}, values.data()),
                           tensor_in_memory("images", DType::kU8, {2, 3, 4, 3}, images.data()),
                           tensor_in_memory("labels", DType::kI64, {2}, labels.data())});
  file.commit();
}

constexpr const char* kManifest =
    R"({"format":1,"step":7,"seed":0,"data":{"batch_size":8,"position":56},)"
    R"("plan":{"numerics":"cpu"},"versions":{"ddpm":"0.1.0"},"hashes":{)"
    R"("training_state.safetensors":{"weights.a":"00112233445566778899aabbccddeeff"},)"
    R"("unet/diffusion_pytorch_model.safetensors":{"a":"0011223344556677"}}})";

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) return std::fputs("usage: fuzz_seeds FOLDER\n", stderr), 2;
  const std::string root = argv[1];
  const auto put = [&](const std::string& target, const std::string& name,
                       const std::string& bytes) {
    make_folders(root + "/" + target);
    write_file(root + "/" + target + "/" + name, bytes);
  };
  const RunConfig run = run_config_of(find_preset("tiny"));
  put("config", "unet", "\x30" + to_json(run.unet).dump());
  put("config", "scheduler", "\x31" + to_json(run.scheduler).dump());
  put("config", "run", "\x32" + to_json(run).dump());
  put("manifest", "manifest", kManifest);
  put("cifar", "two", std::string(2 * 3073, '\x05'));
  for (int c = 1; c <= 4; ++c)
    put("png", std::to_string(c), text_of(tools::encode_png(gradient(c))));
  put("jpeg", "grey", jpeg_of(gradient(1), false));
  put("jpeg", "colour", jpeg_of(gradient(3), false));
  put("jpeg", "progressive", jpeg_of(gradient(3), true));
  make_folders(root + "/progress");
  tools::EvalProgress progress{{{"model", "a"}}, "cpu", BoundSums(3)};
  progress.sums.images = 2;
  progress.sums.image_terms = progress.sums.image_mse = {0.5};
  tools::write_eval_progress(root + "/progress/three", progress);
  make_folders(root + "/suspended");
  const fuzz::SuspendedModel model;
  const Pipeline& p = model.pipeline();
  tools::Sampling s{.seed = 1, .num = 3, .batch_size = 2, .sampler = "ddim"};
  s.rows = {{.t = 9, .x_previous = 1}, {.t = 5, .x_previous = 1}, {.t = 0}};
  s.labels = {0, 1, 2};
  s.guidance = 2;
  s.model = model_hash(p);
  s.steps_done = 1;
  s.x = s.previous = {1, 2, 3, 4, 5, 6, 7, 8};
  s.starts = {1, 1, 1, 1};
  const Shape image{1, 2, 2, 1};
  tools::write_sampling(root + "/suspended/first", s, image);
  s.images_done = 2;
  s.images = s.x;
  s.starts = {};
  s.x = s.previous = {1, 2, 3, 4};
  tools::write_sampling(root + "/suspended/second", s, image);
  for (const char* target : {"safetensors", "packed"}) {
    make_folders(root + "/" + target);
    write_tensors(root + "/" + target + "/tensors");
  }
  return 0;
}
