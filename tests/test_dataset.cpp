#include "engine/dataset.h"

#include <catch2/catch.hpp>

#include "engine/safetensors.h"
#include "tests/data_files.h"

using namespace ddpm;
using namespace ddpm::test;

namespace {

std::vector<uint8_t> cifar_record(uint8_t label, uint8_t salt) {
  std::vector<uint8_t> record = {label};
  for (int c = 0; c < 3; ++c)
    for (int p = 0; p < 1024; ++p) record.push_back(static_cast<uint8_t>(p * 7 + c * 101 + salt));
  return record;
}

std::vector<uint8_t> cifar_file(int records, uint8_t salt) {
  std::vector<uint8_t> bytes;
  for (int i = 0; i < records; ++i) {
    const auto r =
        cifar_record(static_cast<uint8_t>((i + salt) % 10), static_cast<uint8_t>(salt + i));
    bytes.insert(bytes.end(), r.begin(), r.end());
  }
  return bytes;
}

}  // namespace

TEST_CASE("make_dataset: more than the memory is refused before it is taken", "[dataset]") {
  const Thrown t = thrown_by([] { make_dataset(int64_t{1} << 40, {1, 256, 256, 3}); });
  CHECK(t.status == Status::kMemory);
  CHECK(t.says("1099511627776 images of 256x256x3"));
  // The product overflows 64 bits, to a small number.
  CHECK(thrown_by([] {
          make_dataset(int64_t{1} << 40, {1, 1 << 12, 1 << 12, 1});
        }).status == Status::kMemory);
}

TEST_CASE("require_image_shape: names both shapes and the command that mends it", "[dataset]") {
  const Shape model{1, 16, 24, 3};
  require_image_shape("x", "x", {9, 16, 24, 3}, model);
  const Thrown t = thrown_by([&] { require_image_shape("it", "my data", {1, 32, 32, 1}, model); });
  CHECK(t.status == Status::kConfig);
  CHECK(t.says("32x32x1"));
  CHECK(t.says("16x24x3"));
  CHECK(t.says("ddpm pack 'my data' --out packed-16x24x3.safetensors --size 16x24 --channels 3"));
  const Thrown two = thrown_by([] { require_image_shape("x", "x", {1, 4, 4, 3}, {1, 4, 4, 2}); });
  CHECK((two.status == Status::kConfig && !two.says("ddpm pack")));
  CHECK(pack_command("it's", model).find("ddpm pack 'it'\\''s' --out") == 0);
  CHECK(pack_command("a/b-1", model).find("ddpm pack a/b-1 --out") == 0);
}

TEST_CASE("load_cifar: records become HWC images and labels, in file order", "[dataset]") {
  TempFolder folder;
  CHECK_FALSE(is_cifar_folder(folder.path()));
  put_file(folder / "data_batch_1.bin", cifar_file(3, 0));
  put_file(folder / "data_batch_2.bin", cifar_file(2, 50));
  put_file(folder / "test_batch.bin", cifar_file(4, 90));
  CHECK(is_cifar_folder(folder.path()));

  const Dataset d = load_cifar(folder.path(), Split::kTrain);
  CHECK(d.count == 5);
  CHECK((d.h == 32 && d.w == 32 && d.c == 3));
  CHECK(d.labels == std::vector<int32_t>{0, 1, 2, 0, 1});
  CHECK(d.class_names.empty());
  int wrong = 0;
  for (int i = 0; i < 5; ++i)
    for (int p = 0; p < 1024; ++p)
      for (int c = 0; c < 3; ++c)
        wrong += d.image(i)[p * 3 + c] !=
                 static_cast<uint8_t>(p * 7 + c * 101 + (i < 3 ? i : 50 + i - 3));
  CHECK(wrong == 0);

  const Dataset test = load_cifar(folder.path(), Split::kTest);
  CHECK(test.count == 4);
  CHECK(test.image(0)[0] == 90);
}

TEST_CASE("load_cifar: class names", "[dataset]") {
  TempFolder folder;
  put_file(folder / "data_batch_1.bin", cifar_file(1, 0));
  const std::string names = "a\nb\nc\r\nd\ne\n\nf\ng\nh\ni\nj\n\n";
  put_file(folder / "batches.meta.txt", {names.begin(), names.end()});
  const auto got = load_cifar(folder.path(), Split::kTrain).class_names;
  CHECK(got == std::vector<std::string>{"a", "b", "c", "d", "e", "f", "g", "h", "i", "j"});
  put_file(folder / "batches.meta.txt", {'x', '\n'});
  CHECK(load_cifar(folder.path(), Split::kTrain).class_names.empty());
}

TEST_CASE("load_cifar: damaged folders", "[dataset]") {
  TempFolder folder;
  const auto load = [&] { load_cifar(folder.path(), Split::kTrain); };
  put_file(folder / "data_batch_1.bin", cifar_file(2, 0));
  CHECK(thrown_by(load).status == Status::kOk);
  const Thrown no_test = thrown_by([&] { load_cifar(folder.path(), Split::kTest); });
  CHECK(no_test.status == Status::kConfig);
  CHECK(no_test.says("test_batch.bin"));

  SECTION("any other length") {
    for (const size_t length : {size_t{0}, size_t{1}, size_t{3072}, size_t{3074}, size_t{6145}}) {
      auto bytes = cifar_file(2, 0);
      bytes.resize(length);
      put_file(folder / "data_batch_1.bin", bytes);
      const Thrown t = thrown_by(load);
      INFO(length << ": " << t.message);
      CHECK(t.status == Status::kFile);
      CHECK(t.says("data_batch_1.bin"));
      CHECK(t.says(std::to_string(length) + " bytes"));
      CHECK(t.says("30730000"));
    }
  }
  SECTION("a label above 9") {
    auto bytes = cifar_file(2, 0);
    bytes[3073] = 10;
    put_file(folder / "data_batch_1.bin", bytes);
    const Thrown t = thrown_by(load);
    CHECK(t.status == Status::kFile);
    CHECK(t.says("record 1: label 10"));
  }
  SECTION("a gap between the files") {
    put_file(folder / "data_batch_3.bin", cifar_file(1, 0));
    const Thrown t = thrown_by(load);
    CHECK(t.status == Status::kConfig);
    CHECK(t.says("data_batch_2.bin"));
  }
  SECTION("a full-length file without the others") {
    put_file(folder / "data_batch_1.bin", std::vector<uint8_t>(30730000, 0));
    const Thrown t = thrown_by(load);
    CHECK(t.status == Status::kConfig);
    CHECK(t.says("data_batch_2.bin"));
  }
}

namespace {

struct PackedFile {
  std::vector<uint64_t> shape = {3, 4, 5, 3};
  DType dtype = DType::kU8;
  std::vector<int64_t> labels = {0, 2, 1};
  DType label_dtype = DType::kI64;
  std::string name = "images", class_names = "";
};

void write_packed(const std::string& path, const PackedFile& p) {
  std::vector<uint8_t> data(20000);
  for (size_t i = 0; i < data.size(); ++i) data[i] = static_cast<uint8_t>(i * 7);
  std::vector<TensorSource> tensors = {tensor_in_memory(p.name, p.dtype, p.shape, data.data())};
  if (!p.labels.empty())
    tensors.push_back(
        tensor_in_memory("labels", p.label_dtype, {p.labels.size()}, p.labels.data()));
  std::map<std::string, std::string> metadata;
  if (!p.class_names.empty()) metadata["class_names"] = p.class_names;
  OutputFile file(path);
  write_safetensors(file, tensors, metadata);
  file.commit();
}

}  // namespace

TEST_CASE("load_packed: images, labels, class names", "[dataset]") {
  TempFolder folder;
  const std::string path = folder / "d.safetensors";
  write_packed(path, {});
  const Dataset d = load_packed(path);
  CHECK((d.count == 3 && d.h == 4 && d.w == 5 && d.c == 3));
  CHECK(d.labels == std::vector<int32_t>{0, 2, 1});
  CHECK(d.class_names.empty());
  int wrong = 0;
  for (size_t i = 0; i < d.images.size(); ++i) wrong += d.images[i] != static_cast<uint8_t>(i * 7);
  CHECK((d.images.size() == 180 && wrong == 0));
  CHECK(load_packed(path, Shape{1, 4, 5, 3}).count == 3);

  write_packed(path, {.class_names = "x\nyy\nz"});
  CHECK(load_packed(path).class_names == std::vector<std::string>{"x", "yy", "z"});
  write_packed(path, {.labels = {}});
  CHECK(load_packed(path).labels.empty());
  for (const uint64_t c : {1, 2, 4}) {
    write_packed(path, {.shape = {1, 2, 2, c}, .labels = {}});
    CHECK(load_packed(path).c == static_cast<int>(c));
  }
}

TEST_CASE("load_packed: another size is refused with the command that mends it", "[dataset]") {
  TempFolder folder;
  const std::string path = folder / "d.safetensors";
  write_packed(path, {});
  for (const Shape s : {Shape{1, 5, 4, 3}, Shape{1, 4, 5, 1}}) {
    const Thrown t = thrown_by([&] { load_packed(path, s); });
    CHECK(t.status == Status::kConfig);
    CHECK(t.says("4x5x3"));
    CHECK(t.says(pack_command(path, s)));
  }
  CHECK(thrown_by([&] { load_packed(folder / "none.safetensors"); }).status == Status::kConfig);
}

TEST_CASE("load_packed: files that are no data set", "[dataset]") {
  TempFolder folder;
  const std::string path = folder / "d.safetensors";
  const auto refused = [&](const PackedFile& p, const std::string& part) {
    write_packed(path, p);
    const Thrown t = thrown_by([&] { load_packed(path); });
    INFO(t.message);
    CHECK(t.status == Status::kFile);
    CHECK(t.says(path));
    CHECK(t.says(part));
  };
  refused({.name = "pictures"}, "no tensor \"images\"");
  refused({.shape = {3, 4, 5}}, "U8 [3,4,5]");
  refused({.shape = {3, 2, 2, 3}, .dtype = DType::kF32}, "F32 [3,2,2,3]");
  refused({.shape = {0, 4, 5, 3}, .labels = {}}, "U8 [0,4,5,3]");
  refused({.shape = {3, 0, 5, 3}}, "U8 [3,0,5,3]");
  refused({.shape = {3, 4, 5, 5}}, "U8 [3,4,5,5]");
  refused({.shape = {1, 20000, 1, 1}, .labels = {}}, "sides up to 16384");
  refused({.labels = {0, 1}}, "\"labels\" is I64 [2], not I64 [3]");
  refused({.labels = {0, 1, 2}, .label_dtype = DType::kF32}, "F32 [3]");
  refused({.labels = {0, -1, 2}}, "label 1 is -1");
  refused({.labels = {0, 1, int64_t{1} << 31}}, "label 2 is 2147483648");
  refused({.labels = {0, 1, 2}, .class_names = "a\nb"}, "label 2 has no class name");
  put_file(path, {'h', 'e', 'l', 'l', 'o'});
  CHECK(thrown_by([&] { load_packed(path); }).status == Status::kFile);
}
