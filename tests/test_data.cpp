#include "tools/data.h"

#include <algorithm>
#include <catch2/catch.hpp>

#include "tests/data_files.h"
#include "tools/image_io.h"

using namespace ddpm;
using namespace ddpm::test;
using namespace ddpm::tools;

namespace {

void put_png(const std::string& path, int h, int w, int c, uint8_t value) {
  std::filesystem::create_directories(std::filesystem::path(path).parent_path());
  write_png(path, make_image(h, w, c, value));
}

const Shape kModel{1, 4, 5, 3};

}  // namespace

TEST_CASE("load_data: an image folder in byte order, first-level folders are classes", "[data]") {
  TempFolder folder;
  // Byte order: '-' < '/' < '0' < 'B' < 'a'.
  put_png(folder / "b/2.png", 4, 5, 3, 40);
  put_png(folder / "a/deep/er.png", 4, 5, 3, 30);
  put_png(folder / "a/9.renamed", 4, 5, 1, 20);
  put_png(folder / "a-b/x.jpg", 4, 5, 3, 10);
  put_png(folder / "B/0.png", 4, 5, 4, 255);
  put_file(folder / "a/notes.txt", {'n', 'o'});
  put_file(folder / "a/fake.png", {'n', 'o', ' ', 'i', 'm', 'a', 'g', 'e', '!'});
  put_file(folder / "empty", {});
  std::filesystem::create_symlink(folder.path(), folder / "a/loop");
  std::filesystem::create_symlink(folder / "nothing", folder / "a/dangling.png");

  const ImageFolder list = list_image_folder(folder.path());
  CHECK(list.files == std::vector<std::string>{"B/0.png", "a-b/x.jpg", "a/9.renamed",
                                               "a/deep/er.png", "b/2.png"});
  CHECK(list.class_names == std::vector<std::string>{"B", "a", "a-b", "b"});
  CHECK(list.labels == std::vector<int32_t>{0, 2, 1, 1, 3});
  CHECK(list.ignored == 3);

  for (const std::string& spec : {folder.path(), folder.path() + "/"}) {
    const Dataset d = load_data(spec, kModel);
    CHECK((d.count == 5 && d.h == 4 && d.w == 5 && d.c == 3));
    CHECK(d.labels == list.labels);
    CHECK(d.class_names == list.class_names);
    for (int i = 0; i < 5; ++i) CHECK(d.image(i)[0] == std::vector<int>{255, 10, 20, 30, 40}[i]);
    CHECK(d.description.find("3 other files ignored") != std::string::npos);
  }
  CHECK(load_data(folder.path(), {1, 4, 5, 1}).images[20] == 10);
  CHECK(load_data(folder.path(), {1, 4, 5, 4}).images[80 + 3] == 255);
}

TEST_CASE("load_data: in the images' own shape", "[data]") {
  TempFolder folder;
  put_png(folder / "a/1.png", 4, 5, 1, 7);
  put_png(folder / "a/2.png", 4, 5, 4, 9);
  const Dataset d = load_data(folder.path(), Split::kTrain);
  CHECK((d.count == 2 && d.h == 4 && d.w == 5 && d.c == 3));
  CHECK(d.images[2] == 7);
  put_png(folder / "a/0.png", 4, 6, 3, 9);
  const Thrown t = thrown_by([&] { load_data(folder.path(), Split::kTrain); });
  CHECK(t.status == Status::kConfig);
  CHECK(t.says("a/1.png"));
  const Dataset shapes = load_data("shapes", Split::kTest);
  CHECK((shapes.count == 10000 && shapes.h == 32 && shapes.w == 32 && shapes.c == 3));
  CHECK(thrown_by([&] { load_data(folder / "none", Split::kTrain); }).status == Status::kConfig);
}

TEST_CASE("load_data: an image outside every subfolder means no classes", "[data]") {
  TempFolder folder;
  put_png(folder / "a/1.png", 4, 5, 3, 1);
  put_png(folder / "2.png", 4, 5, 3, 2);
  const Dataset d = load_data(folder.path(), kModel);
  CHECK(d.count == 2);
  CHECK(d.labels.empty());
  CHECK(d.class_names.empty());
}

TEST_CASE("load_data: one bad image stops it, by name", "[data]") {
  TempFolder folder;
  put_png(folder / "a/1.png", 4, 5, 3, 1);
  put_png(folder / "a/2.png", 4, 5, 3, 2);
  SECTION("broken") {
    auto bytes = get_file(folder / "a/2.png");
    bytes[bytes.size() / 2] ^= 4;
    put_file(folder / "a/2.png", bytes);
    const Thrown t = thrown_by([&] { load_data(folder.path(), kModel); });
    CHECK(t.status == Status::kFile);
    CHECK(t.says("a/2.png"));
  }
  SECTION("another size") {
    put_png(folder / "a/2.png", 6, 6, 3, 2);
    const Thrown t = thrown_by([&] { load_data(folder.path(), kModel); });
    CHECK(t.status == Status::kConfig);
    CHECK(t.says("a/2.png"));
    CHECK(t.says("6x6x3"));
    CHECK(t.says("4x5x3"));
    CHECK(t.says("ddpm pack " + folder.path() + " --out"));
    CHECK(t.says("--size 4x5"));
  }
  SECTION("two channels") {
    CHECK(thrown_by([&] { load_data(folder.path(), {1, 4, 5, 2}); }).status == Status::kConfig);
  }
}

TEST_CASE("load_data: nothing usable there", "[data]") {
  TempFolder folder;
  const auto refused = [&](const std::string& spec, const std::string& part) {
    const Thrown t = thrown_by([&] { load_data(spec, kModel); });
    INFO(t.message);
    CHECK(t.status == Status::kConfig);
    CHECK(t.says(part));
  };
  refused(folder / "none", "none': no such file or folder");
  refused("", "no such file or folder");
  refused(folder.path(), "holds no PNG or JPEG");
  put_file(folder / "x.txt", {'x'});
  refused(folder.path(), "1 other files");
  put_file(folder / "d.tar.gz", {0x1F, 0x8B, 8, 0});
  refused(folder / "d.tar.gz", "gzip archive");
  put_file(folder / "d.zip", {'P', 'K', 3, 4, 0});
  refused(folder / "d.zip", "zip archive");
  put_png(folder / "one.png", 4, 5, 3, 0);
  refused(folder / "one.png", "one image");
  CHECK(thrown_by([&] { load_data(folder / "x.txt", kModel); }).status == Status::kFile);
}

TEST_CASE("load_data: shapes, CIFAR-10 and packed files by what they are", "[data]") {
  CHECK(load_data("shapes", {1, 8, 8, 1}).count == 50000);

  TempFolder folder;
  put_file(folder / "data_batch_1.bin", std::vector<uint8_t>(3073 * 2, 3));
  put_file(folder / "test_batch.bin", std::vector<uint8_t>(3073, 4));
  CHECK(load_data(folder.path(), kCifarImage).labels == std::vector<int32_t>{3, 3});
  CHECK(load_data(folder.path(), kCifarImage, Split::kTest).labels == std::vector<int32_t>{4});
  const Thrown t = thrown_by([&] { load_data(folder.path(), {1, 16, 16, 3}); });
  CHECK(t.status == Status::kConfig);
  CHECK(t.says("32x32x3"));
  CHECK(t.says(pack_command(folder.path(), {1, 16, 16, 3})));
}
