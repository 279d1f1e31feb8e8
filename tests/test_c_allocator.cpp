// The C entry on a program's own memory.
#include <catch2/catch.hpp>

#include <cstdlib>
#include <map>
#include <mutex>

#include "tests/c_api_support.h"

using namespace ddpm;
using namespace test::c;

namespace {

// A program's pool, that can end.
struct Program {
  std::mutex mutex;
  std::map<void*, size_t> held;
  size_t bytes = 0, most = 0, limit = SIZE_MAX;
  size_t shift = 0;  // from the alignment that is asked for
  int wrong = 0;     // releases of what was not given
};

void* allocate(void* user, size_t bytes) {
  auto& p = *static_cast<Program*>(user);
  const std::lock_guard lock(p.mutex);
  if (p.bytes + bytes > p.limit) return nullptr;
  char* memory = static_cast<char*>(std::aligned_alloc(256, (bytes + 511) / 256 * 256)) + p.shift;
  std::fill_n(memory, bytes, '\xff');  // NaN, if it is used as it comes
  p.held[memory] = bytes;
  p.bytes += bytes;
  p.most = std::max(p.most, p.bytes);
  return memory;
}

void release(void* user, void* memory, size_t bytes) {
  auto& p = *static_cast<Program*>(user);
  const std::lock_guard lock(p.mutex);
  const auto it = p.held.find(memory);
  if (it == p.held.end() || it->second != bytes) {
    ++p.wrong;
    return;
  }
  p.held.erase(it);
  p.bytes -= bytes;
  std::free(static_cast<char*>(memory) - p.shift);
}

ddpm_model_options options_of(Program& p) {
  ddpm_model_options o{};
  o.struct_size = sizeof o;
  o.device = "cpu";
  o.threads = kThreads;
  o.user = &p;
  o.allocate = allocate;
  o.release = release;
  return o;
}

std::vector<uint8_t> image(ddpm_model* model, size_t* device_bytes = nullptr) {
  ddpm_sampler_options so{};
  so.struct_size = sizeof so;
  so.steps = 3;
  ddpm_sampler* sampler = nullptr;
  ok(ddpm_sampler_create(model, &so, &sampler));
  const Sampler owned(sampler);
  std::vector<uint8_t> pixels(8 * 8 * 3);
  ok(ddpm_sample(sampler, 3, 0, 1, pixels.data()));
  ddpm_sampler_info info{};
  info.struct_size = sizeof info;
  ok(ddpm_sampler_get_info(sampler, &info));
  if (device_bytes != nullptr) *device_bytes = info.device_bytes;
  return pixels;
}

}  // namespace

TEST_CASE("c allocator: all of a sampler lies in the program's memory", "[c_allocator]") {
  const std::string folder = model_folder("small");
  Program p;
  const ddpm_model_options o = options_of(p);
  ddpm_model* raw = nullptr;
  ok(ddpm_model_load(folder.c_str(), &o, &raw));
  {
    const Model model(raw);
    size_t bytes = 0;
    CHECK(image(raw, &bytes) == image(open_model(folder).get()));
    CHECK(p.most >= bytes);
  }
  CHECK(p.held.empty());
  CHECK(p.wrong == 0);
}

TEST_CASE("c allocator: memory that ends, or is not aligned, is said", "[c_allocator]") {
  const std::string folder = model_folder("small");
  Program p;
  ddpm_model_options o = options_of(p);
  ddpm_model* raw = nullptr;
  ok(ddpm_model_load(folder.c_str(), &o, &raw));
  const Model model(raw);
  image(raw);
  ddpm_sampler_options so{};
  so.struct_size = sizeof so;
  ddpm_sampler* sampler = nullptr;
  for (const size_t limit : {size_t{0}, size_t{1000}, p.most / 2, p.most - 1}) {
    p.limit = limit;
    CHECK(ddpm_sampler_create(raw, &so, &sampler) == DDPM_MEMORY);
    CHECK(sampler == nullptr);
    CHECK(p.held.empty());
  }
  p.limit = SIZE_MAX;
  p.shift = 64;
  CHECK(ddpm_sampler_create(raw, &so, &sampler) == DDPM_USAGE);
  CHECK(std::string(ddpm_last_error()).find("aligned to 256") != std::string::npos);
  CHECK(p.held.empty());
  o.release = nullptr;
  CHECK(ddpm_model_load(folder.c_str(), &o, &raw) == DDPM_USAGE);
  CHECK(p.wrong == 0);
}
