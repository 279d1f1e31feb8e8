#include "tools/pack.h"

#include <algorithm>
#include <catch2/catch.hpp>

#include "engine/safetensors.h"
#include "tests/data_files.h"
#include "tools/data.h"
#include "tools/image_io.h"

using namespace ddpm;
using namespace ddpm::test;
using namespace ddpm::tools;

namespace {

Image ramp(int h, int w, int c, int salt) {
  Image image = make_image(h, w, c);
  for (size_t i = 0; i < image.pixels.size(); ++i)
    image.pixels[i] = static_cast<uint8_t>(i * 5 + static_cast<size_t>(salt) * 37);
  return image;
}

void put_image(const std::string& path, const Image& image) {
  std::filesystem::create_directories(std::filesystem::path(path).parent_path());
  write_png(path, image);
}

}  // namespace

TEST_CASE("pack: an image folder, fitted to one size, with its classes", "[pack]") {
  TempFolder folder;
  const std::vector<std::pair<std::string, Image>> files = {{"in/cat/1.png", ramp(20, 30, 3, 1)},
                                                            {"in/cat/2.png", ramp(16, 8, 1, 2)},
                                                            {"in/dog/1.png", ramp(8, 8, 4, 3)}};
  for (const auto& [name, image] : files) put_image(folder / name, image);
  put_file(folder / "in/readme.txt", {'r'});
  const std::string out = folder / "out.safetensors";
  const PackResult r = pack({folder / "in", out, 8, 8, 0});
  CHECK(r.count == 3);
  CHECK(r.image == Shape{1, 8, 8, 3});
  CHECK(r.has_labels);
  CHECK(r.ignored == 1);

  const Dataset d = load_data(out, {1, 8, 8, 3});
  CHECK(d.labels == std::vector<int32_t>{0, 0, 1});
  CHECK(d.class_names == std::vector<std::string>{"cat", "dog"});
  for (int i = 0; i < 3; ++i) {
    const Image fitted =
        crop_and_resize(convert_channels(files[static_cast<size_t>(i)].second, 3), 8, 8);
    CHECK(std::equal(fitted.pixels.begin(), fitted.pixels.end(), d.image(i)));
  }
  pack({folder / "in", folder / "again.safetensors", 8, 8, 3});
  CHECK(get_file(out) == get_file(folder / "again.safetensors"));
}

TEST_CASE("pack: files larger than the writer's piece, own size kept", "[pack]") {
  TempFolder folder;
  std::vector<Image> images;
  for (int i = 0; i < 3; ++i) {
    images.push_back(ramp(700, 801, 3, i));  // 1.6 MiB each: pieces of 1 MiB end anywhere in them
    put_image(folder / format("in/%d.png", i), images.back());
  }
  const std::string out = folder / "out.safetensors";
  CHECK_FALSE(pack({folder / "in", out, 0, 0, 0}).has_labels);
  const Dataset d = load_packed(out);
  CHECK((d.count == 3 && d.h == 700 && d.w == 801 && d.c == 3 && d.labels.empty()));
  for (int i = 0; i < 3; ++i)
    CHECK(std::equal(images[static_cast<size_t>(i)].pixels.begin(),
                     images[static_cast<size_t>(i)].pixels.end(), d.image(i)));
}

TEST_CASE("pack: CIFAR-10, and a packed file again", "[pack]") {
  TempFolder folder;
  std::vector<uint8_t> batch;
  for (int i = 0; i < 4; ++i) {
    batch.push_back(static_cast<uint8_t>(9 - i));
    for (int p = 0; p < 3072; ++p) batch.push_back(static_cast<uint8_t>(p / 5 + i));
  }
  put_file(folder / "cifar/data_batch_1.bin", batch);
  const std::string full = folder / "full.safetensors", small = folder / "small.safetensors";
  CHECK(pack({folder / "cifar", full, 0, 0, 0}).image == kCifarImage);
  const Dataset source = load_cifar(folder / "cifar", Split::kTrain), d = load_packed(full);
  CHECK(d.images == source.images);
  CHECK(d.labels == source.labels);

  CHECK(pack({full, small, 16, 12, 1}).image == Shape{1, 16, 12, 1});
  const Dataset s = load_packed(small);
  CHECK(s.labels == source.labels);
  Image first = make_image(32, 32, 3);
  std::copy_n(source.image(0), first.pixels.size(), first.pixels.begin());
  const Image fitted = crop_and_resize(convert_channels(first, 1), 16, 12);
  CHECK(std::equal(fitted.pixels.begin(), fitted.pixels.end(), s.image(0)));

  pack({small, small, 0, 0, 0});  // onto itself
  CHECK(load_packed(small).images == s.images);
}

TEST_CASE("pack: what the mismatch message says works as it stands", "[pack]") {
  TempFolder folder;
  put_image(folder / "in/1.png", ramp(9, 7, 1, 1));
  const Shape model{1, 4, 6, 3};
  const Thrown t = thrown_by([&] { load_data(folder / "in", model); });
  CHECK(t.says("--size 4x6 --channels 3"));
  pack({folder / "in", folder / "p.safetensors", 4, 6, 3});
  CHECK(load_data(folder / "p.safetensors", model).count == 1);
}

TEST_CASE("pack: failures leave no file behind", "[pack]") {
  TempFolder folder;
  const std::string out = folder / "out.safetensors";
  const auto refused = [&](const PackOptions& o, Status status, const std::string& part) {
    const Thrown t = thrown_by([&] { pack(o); });
    INFO(t.message);
    CHECK(t.status == status);
    CHECK(t.says(part));
    CHECK(std::distance(std::filesystem::directory_iterator(folder.path()), {}) == 1);
  };
  put_image(folder / "in/1.png", ramp(9, 7, 3, 1));
  refused({folder / "none", out}, Status::kConfig, "no such file or folder");
  refused({folder / "in", out, 8, 8, 2}, Status::kUsage, "--channels is 2");
  refused({folder / "in", out, 5000, 8, 3}, Status::kUsage, "larger than 4096x4096");
  refused({folder / "in", folder / "no/out", 8, 8, 3}, Status::kFile, "no/out");
  put_image(folder / "in/2.png", ramp(9, 8, 3, 1));
  refused({folder / "in", out}, Status::kConfig, "in/2.png' is 9x8, the first is 9x7");
  auto bytes = get_file(folder / "in/2.png");
  bytes[bytes.size() / 2] ^= 1;
  put_file(folder / "in/2.png", bytes);
  refused({folder / "in", out, 8, 8, 3}, Status::kFile, "in/2.png");
}
