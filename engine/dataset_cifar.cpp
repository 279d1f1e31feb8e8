// CIFAR-10's binary files: records of a label byte and 32 x 32 pixels, plane by plane (CHW).
#include <algorithm>
#include <vector>

#include "engine/dataset.h"
#include "engine/file_io.h"
#include "kernels/error.h"

namespace ddpm {
namespace {

constexpr int kPixels = 32 * 32;
constexpr int kChannels = 3;
constexpr int kClasses = 10;
constexpr size_t kRecord = 1 + kPixels * kChannels;
constexpr uint64_t kFullFile = 10000 * kRecord;  // 30,730,000 bytes

std::string train_file(const std::string& folder, int number) {
  return format("%s/data_batch_%d.bin", folder.c_str(), number);
}

// A folder that holds one full-length file must hold all five: a download broke off, else. Test
// data may stop at any number.
std::vector<std::string> train_files(const std::string& folder) {
  std::vector<std::string> files;
  std::string missing;
  bool needs_all = false;
  for (int i = 1; i <= 5; ++i) {
    const std::string file = train_file(folder, i);
    if (!file_exists(file)) {
      if (missing.empty()) missing = file;
      continue;
    }
    needs_all = needs_all || !missing.empty() || InputFile(file).size() == kFullFile;
    files.push_back(file);
  }
  if (files.empty() || (needs_all && !missing.empty()))
    fail(Status::kConfig, "data set %s: there is no file '%s'; unpack cifar-10-binary.tar.gz again",
         folder.c_str(), missing.c_str());
  return files;
}

int64_t count_records(const InputFile& file) {
  if (file.size() == 0 || file.size() % kRecord != 0)
    fail(Status::kFile,
         "'%s' has %llu bytes, not a whole number of %zu-byte CIFAR-10 records (%llu bytes in the "
         "original); copy or download it again",
         file.path().c_str(), static_cast<unsigned long long>(file.size()), kRecord,
         static_cast<unsigned long long>(kFullFile));
  return static_cast<int64_t>(file.size() / kRecord);
}

void read_records(const InputFile& file, int64_t count, int64_t first, Dataset& d) {
  std::vector<uint8_t> bytes(static_cast<size_t>(count) * kRecord);
  file.read(0, bytes.data(), bytes.size());
  for (int64_t i = 0; i < count; ++i) {
    const uint8_t* record = bytes.data() + static_cast<size_t>(i) * kRecord;
    if (record[0] >= kClasses)
      fail(Status::kFile, "'%s' record %lld: label %d, not 0..9; copy or download it again",
           file.path().c_str(), static_cast<long long>(i), record[0]);
    d.labels[static_cast<size_t>(first + i)] = record[0];
    uint8_t* out = d.image(first + i);
    for (int p = 0; p < kPixels; ++p)
      for (int c = 0; c < kChannels; ++c) *out++ = record[1 + c * kPixels + p];
  }
}

// batches.meta.txt: ten names, one per line. It only names things: anything else is ignored.
std::vector<std::string> read_class_names(const std::string& path) {
  if (!file_exists(path)) return {};
  std::vector<std::string> names;
  std::string name;
  for (const char ch : read_small_file(path, 4096) + "\n") {
    if (ch > ' ' && ch < 0x7F) name += ch;
    if (ch != '\n' || name.empty()) continue;
    names.push_back(name);
    name.clear();
  }
  if (names.size() != kClasses) names.clear();
  return names;
}

}  // namespace

bool is_cifar_folder(const std::string& folder) {
  for (int i = 1; i <= 5; ++i)
    if (file_exists(train_file(folder, i))) return true;
  return file_exists(folder + "/test_batch.bin");
}

Dataset load_cifar(const std::string& folder, Split split) {
  std::vector<std::string> files = {folder + "/test_batch.bin"};
  if (split == Split::kTrain) files = train_files(folder);
  int64_t count = 0;
  for (const std::string& path : files) count += count_records(InputFile(path, Status::kConfig));
  Dataset d = make_dataset(count, kCifarImage);
  d.labels.resize(static_cast<size_t>(count));
  int64_t first = 0;
  for (const std::string& path : files) {
    const InputFile file(path);
    const int64_t records = count_records(file);
    if (records > count - first)
      fail(Status::kFile, "'%s' grew while it was read; let its writer finish first", path.c_str());
    read_records(file, records, first, d);
    first += records;
  }
  if (first != count)
    fail(Status::kFile, "data set %s: a file became shorter while it was read", folder.c_str());
  d.class_names = read_class_names(folder + "/batches.meta.txt");
  d.description =
      format("%s: CIFAR-10, %lld %s images, 32x32x3", folder.c_str(), static_cast<long long>(count),
             split == Split::kTrain ? "training" : "test");
  return d;
}

}  // namespace ddpm
