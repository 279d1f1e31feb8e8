#include "engine/dataset.h"

#include <limits>
#include <new>

#include "kernels/error.h"
#include "kernels/host_memory.h"

namespace ddpm {
namespace {

[[noreturn]] void fail_memory(int64_t count, const Shape& s, uint64_t available) {
  fail(Status::kMemory,
       "data set: %lld images of %dx%dx%d do not fit in memory (%.1f GiB are free); use fewer or "
       "smaller images",
       static_cast<long long>(count), s.h, s.w, s.c,
       static_cast<double>(available) / (1024.0 * 1024 * 1024));
}

// A path as one word of a shell command.
std::string shell_word(const std::string& path) {
  const char* plain = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-./+=:@%,";
  if (!path.empty() && path.find_first_not_of(plain) == std::string::npos) return path;
  std::string word = "'";
  for (const char ch : path) word += ch == '\'' ? std::string("'\\''") : std::string(1, ch);
  return word + "'";
}

}  // namespace

Dataset make_dataset(int64_t count, const Shape& image) {
  DDPM_CHECK(count > 0 && image.h > 0 && image.w > 0 && image.c > 0,
             "data set of %lld images of %s", static_cast<long long>(count),
             to_string(image).c_str());
  const uint64_t available = available_host_memory();
  uint64_t bytes = static_cast<uint64_t>(count);
  for (const int side : {image.h, image.w, image.c})
    if (__builtin_mul_overflow(bytes, static_cast<uint64_t>(side), &bytes))
      fail_memory(count, image, available);
  if (bytes > available) fail_memory(count, image, available);
  Dataset d;
  d.count = count;
  d.h = image.h;
  d.w = image.w;
  d.c = image.c;
  try {
    d.images.resize(static_cast<size_t>(bytes));
  } catch (const std::bad_alloc&) {
    fail_memory(count, image, available);
  }
  return d;
}

std::string pack_command(const std::string& source, const Shape& image) {
  return format("ddpm pack %s --out packed-%dx%dx%d.safetensors --size %dx%d --channels %d",
                shell_word(source).c_str(), image.h, image.w, image.c, image.h, image.w, image.c);
}

void require_image_shape(const std::string& what, const std::string& source, const Shape& found,
                         const Shape& image) {
  if (found.h == image.h && found.w == image.w && found.c == image.c) return;
  const bool can_pack = image.c == 1 || image.c == 3 || image.c == 4;
  const std::string remedy = can_pack ? "make the data fit with: " + pack_command(source, image)
                                      : "give a packed file of that shape";
  fail(Status::kConfig,
       "data set: %s is %dx%dx%d, the model's images are %dx%dx%d (height, width, channels); %s",
       what.c_str(), found.h, found.w, found.c, image.h, image.w, image.c, remedy.c_str());
}

}  // namespace ddpm
