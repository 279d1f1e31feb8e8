// The C entry when memory runs out: c_api_faults MODEL. Linked with the archive, so that every
// allocation of the program's C++ comes through here. Each allocation k of loading a model, of
// being refused one, and of making a sampler and sampling fails once; the call must say
// DDPM_MEMORY, leak nothing, and leave a process in which the next call gives the right image.
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <functional>
#include <iterator>
#include <new>
#include <string>
#include <vector>

#include "model/ddpm.h"

namespace {

std::atomic<long> countdown{0};  // the allocation that fails, 0: none
std::atomic<long> made{0}, live{0};

bool fails() {
  ++made;
  return countdown > 0 && --countdown == 0;
}

void* allocate(std::size_t size, std::size_t alignment) {
  void* p = nullptr;
  if (!fails())
    p = alignment > 0
            ? std::aligned_alloc(alignment, (size + alignment - 1) / alignment * alignment)
            : std::malloc(size == 0 ? 1 : size);
  if (p == nullptr) throw std::bad_alloc();
  ++live;
  return p;
}

void release(void* p) {
  if (p == nullptr) return;
  --live;
  std::free(p);
}

}  // namespace

extern "C" void* __real_calloc(std::size_t n, std::size_t size);
extern "C" void* __wrap_calloc(std::size_t n, std::size_t size) {
  return fails() ? nullptr : __real_calloc(n, size);
}

void* operator new(std::size_t n) { return allocate(n, 0); }
void* operator new[](std::size_t n) { return allocate(n, 0); }
void* operator new(std::size_t n, std::align_val_t a) { return allocate(n, std::size_t(a)); }
void operator delete(void* p) noexcept { release(p); }
void operator delete[](void* p) noexcept { release(p); }
void operator delete(void* p, std::size_t) noexcept { release(p); }
void operator delete[](void* p, std::size_t) noexcept { release(p); }
void operator delete(void* p, std::align_val_t) noexcept { release(p); }
void operator delete(void* p, std::size_t, std::align_val_t) noexcept { release(p); }

namespace {

unsigned char image[64 * 64 * 3];  // no larger model

ddpm_model_options on_cpu() {
  ddpm_model_options mo{};
  mo.struct_size = sizeof mo;
  mo.device = "cpu";
  mo.threads = 1;
  return mo;
}

// Make, sample, free.
ddpm_status whole(ddpm_model* model) {
  ddpm_sampler_options so{};
  so.struct_size = sizeof so;
  so.batch_size = 1;
  so.steps = 2;
  ddpm_sampler* sampler = nullptr;
  ddpm_status status = ddpm_sampler_create(model, &so, &sampler);
  if (status == DDPM_OK) status = ddpm_sample(sampler, 1, 0, 1, image);
  ddpm_sampler_destroy(sampler);
  return status;
}

// The same by a pool.
ddpm_status whole_pool(ddpm_model* model) {
  ddpm_pool_options po{};
  po.struct_size = sizeof po;
  po.batch_size = 1;
  ddpm_pool* pool = nullptr;
  ddpm_status status = ddpm_pool_create(model, &po, &pool);
  if (status != DDPM_OK) return status;
  ddpm_pool_request q{};
  q.struct_size = sizeof q;
  q.steps = 2;
  q.seed = 1;
  q.n = 1;
  q.bytes = image;
  ddpm_ticket* ticket = nullptr;
  status = ddpm_pool_submit(pool, &q, &ticket);
  if (status == DDPM_OK) status = ddpm_ticket_wait(ticket);
  ddpm_ticket_destroy(ticket);
  ddpm_pool_destroy(pool);
  return status;
}

// Loads, and samples where that worked; allocations of the sampling neither fail nor count.
template <typename Load>
ddpm_status whole_load(const Load& load) {
  ddpm_model* model = nullptr;
  ddpm_status status = load(&model);
  const long left = countdown.exchange(0), counted = made;
  if (status == DDPM_OK) status = whole(model);
  ddpm_model_destroy(model);
  countdown = left;
  made = counted;
  return status;
}

ddpm_status load_folder(const std::string& folder) {
  return whole_load([&](ddpm_model** model) {
    const ddpm_model_options mo = on_cpu();
    return ddpm_model_load(folder.c_str(), &mo, model);
  });
}

// A model's files as ddpm_model_load_memory takes them.
struct Files {
  std::string unet, scheduler, weights;
  ddpm_status load() const {
    return whole_load([&](ddpm_model** model) {
      const ddpm_model_options mo = on_cpu();
      ddpm_model_files files{};
      files.struct_size = sizeof files;
      files.unet_config = unet.c_str();
      files.scheduler_config = scheduler.c_str();
      files.weights = weights.data();
      files.weights_size = weights.size();
      return ddpm_model_load_memory(&files, &mo, model);
    });
  }
};

std::string read_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

// Allocations of a step: what a chain of 16 steps makes more than one of 10, of a sampler and of a
// pool. (The lists of both lengths grow as often when the request is made.)
struct StepAllocations {
  double sampler = -1, pool = -1;
};
StepAllocations step_allocations(ddpm_model* model) {
  StepAllocations found;
  long by_sampler[2] = {}, by_pool[2] = {};
  for (int i = 0; i < 2; ++i) {
    ddpm_sampler_options so{};
    so.struct_size = sizeof so;
    so.batch_size = 1;
    so.steps = i == 0 ? 10 : 16;
    ddpm_sampler* sampler = nullptr;
    if (ddpm_sampler_create(model, &so, &sampler) != DDPM_OK) return found;
    long before = made;
    ddpm_sample(sampler, 1, 0, 1, image);
    by_sampler[i] = made - before;
    ddpm_sampler_destroy(sampler);

    ddpm_pool_options po{};
    po.struct_size = sizeof po;
    po.batch_size = 1;
    ddpm_pool* pool = nullptr;
    if (ddpm_pool_create(model, &po, &pool) != DDPM_OK) return found;
    ddpm_pool_request q{};
    q.struct_size = sizeof q;
    q.steps = so.steps;
    q.seed = 1;
    q.n = 1;
    q.bytes = image;
    ddpm_ticket* ticket = nullptr;
    before = made;
    if (ddpm_pool_submit(pool, &q, &ticket) != DDPM_OK) return found;
    ddpm_ticket_wait(ticket);
    by_pool[i] = made - before;
    ddpm_ticket_destroy(ticket);
    ddpm_pool_destroy(pool);
  }
  return {(by_sampler[1] - by_sampler[0]) / 6.0, (by_pool[1] - by_pool[0]) / 6.0};
}

// Blocks that are left of 1,000 samples; `allocations`: made by a sample.
long growth(ddpm_model* model, double& allocations) {
  constexpr int kSamples = 1000;
  ddpm_sampler_options so{};
  so.struct_size = sizeof so;
  so.batch_size = 1;
  so.steps = 1;
  ddpm_sampler* sampler = nullptr;
  if (ddpm_sampler_create(model, &so, &sampler) != DDPM_OK) return -1;
  ddpm_sample(sampler, 1, 0, 1, image);
  const long before = live, made_before = made;
  for (int i = 0; i < kSamples; ++i) ddpm_sample(sampler, 1, 0, 1, image);
  const long left = live - before;
  allocations = static_cast<double>(made - made_before) / kSamples;
  ddpm_sampler_destroy(sampler);
  return left;
}

// Fails allocations of a call, each once; false where it told something else than DDPM_MEMORY, or
// where an image is another one. `usual`: what it says with memory.
bool survives(const char* name, const std::function<ddpm_status()>& call, ddpm_status usual,
              const std::vector<unsigned char>& expected, long may_leak) {
  const auto as_usual = [&](ddpm_status status) {
    return status == usual &&
           (status != DDPM_OK || std::memcmp(image, expected.data(), sizeof image) == 0);
  };
  made = 0;
  call();
  const long all = made, before = live;
  // Every one of the first, then ever fewer, with strides that share no factor with loops.
  long tried = 0, told = 0;
  for (long k = 1; k <= all; k += 1 + k / 400) {
    countdown = k;
    const ddpm_status status = call();
    countdown = 0;
    if (status != DDPM_MEMORY && !as_usual(status)) {
      std::printf("%s, allocation %ld: status %d, %s\n", name, k, status, ddpm_last_error());
      return false;
    }
    ++tried;
    told += status == DDPM_MEMORY;
  }
  if (!as_usual(call())) {
    std::printf("%s: another result afterwards\n", name);
    return false;
  }
  const long leaked = live - before;
  std::printf("%s: %ld of %ld allocations failed, %ld told, %ld blocks leaked\n", name, tried, all,
              told, leaked);
  return leaked <= may_leak;
}

bool loading_survives(const std::string& folder, const std::vector<unsigned char>& expected) {
  bool good = survives(
      "load", [&] { return load_folder(folder); }, DDPM_OK, expected, 0);
  const Files files{read_file(folder + "/unet/config.json"),
                    read_file(folder + "/scheduler/scheduler_config.json"),
                    read_file(folder + "/unet/diffusion_pytorch_model.safetensors")};
  good &= survives(
      "load_memory", [&] { return files.load(); }, DDPM_OK, expected, 0);
  struct {
    const char* name;
    Files files;
    ddpm_status usual;
  } refused[] = {{"an unknown key", files, DDPM_CONFIG},
                 {"a wrong size", files, DDPM_CONFIG},
                 {"a cut text", files, DDPM_CONFIG},
                 {"cut weights", files, DDPM_FILE}};
  refused[0].files.unet.insert(1, "\"unknown\": [[1, 2], {\"a\": [3]}],");
  std::string& unet = refused[1].files.unet;
  unet.insert(unet.find("\"sample_size\": ") + 15, "[8, 8, 8], \"_was\": ");
  refused[2].files.scheduler = "{\"a\": [1, {\"b\": [2]}, [";
  refused[3].files.weights.pop_back();
  for (const auto& r : refused)
    good &= survives(
        r.name, [&] { return r.files.load(); }, r.usual, expected, 0);
  return good;
}

}  // namespace

int main(int argc, char** argv) {
  const ddpm_model_options mo = on_cpu();
  ddpm_model* model = nullptr;
  if (argc != 2 || ddpm_model_load(argv[1], &mo, &model) != DDPM_OK || whole(model) != DDPM_OK)
    return 2;
  const std::vector<unsigned char> expected(image, image + sizeof image);
  bool good = loading_survives(argv[1], expected);
  // oneDNN 2.6.3 loses two blocks where it fails to make a primitive: some 20 each.
  good &= survives(
      "sampler", [&] { return whole(model); }, DDPM_OK, expected, 64);
  good &= survives(
      "pool", [&] { return whole_pool(model); }, DDPM_OK, expected, 64);
  double allocations = 0;
  const long left = growth(model, allocations);
  const StepAllocations step = step_allocations(model);
  ddpm_model_destroy(model);
  std::printf("1000 samples: %g allocations each, %ld blocks left\n", allocations, left);
  std::printf("allocations of a step: sampler %g, pool %g\n", step.sampler, step.pool);
  return good && left == 0 && step.pool == step.sampler ? 0 : 1;
}
