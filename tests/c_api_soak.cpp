// The C entry under load, for ThreadSanitizer and for memory that grows:
//   c_api_soak threads MODEL THREADS SAMPLES   threads share a model and a pool, make, free and
//                                              cancel; images must be those of one thread, to the
//                                              bit
//   c_api_soak growth MODEL SAMPLES            memory and files after 100 samples and after SAMPLES
//   c_api_soak leak MODEL SAMPLES              the same with 1 kB lost a sample: must end with 1
// On the CPU, or on the device that SOAK_DEVICE names.
#include <dirent.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "model/ddpm.hpp"

namespace {

namespace api = ddpm::api;
using Bytes = std::vector<std::uint8_t>;

constexpr int kImages = 25, kSteps = 3;

api::Model load(const char* folder) {
  auto options = api::sized<ddpm_model_options>();
  const char* device = std::getenv("SOAK_DEVICE");
  options.device = device != nullptr ? device : "cpu";
  options.threads = 1;
  options.batch_invariant = 1;  // so that samplers and pool, of other batches, agree
  return api::Model(folder, options);
}

ddpm_sampler_options chain(int steps) {
  auto options = api::sized<ddpm_sampler_options>();
  options.batch_size = 1;
  options.steps = steps;
  return options;
}

ddpm_pool_request ask(std::uint64_t image, Bytes& to, int steps) {
  auto request = api::sized<ddpm_pool_request>();
  request.first = image;
  request.n = 1;
  request.bytes = to.data();
  request.steps = steps;
  return request;
}

struct Load {
  const api::Model& model;
  api::Pool& pool;
  const Bytes& expected;
  std::size_t size;
  std::atomic<int> wrong{0}, good{0}, stopped{0};

  void look(std::uint64_t image, const Bytes& got) {
    ++(std::memcmp(got.data(), &expected[image * size], size) == 0 ? good : wrong);
  }
  // A sampler is cancelled by another thread before, in or after its call, which may leave it to
  // the next.
  void cancelled_sample(api::Sampler& sampler, std::uint64_t image) {
    Bytes bytes(size);
    std::thread other([&] { sampler.cancel(); });
    const ddpm_status first = ddpm_sample(sampler.get(), 0, image, 1, bytes.data());
    other.join();
    if (first == DDPM_OK) look(image, bytes);
    if (first == DDPM_OK && ddpm_sample(sampler.get(), 0, 0, 1, bytes.data()) != DDPM_STOPPED)
      ++wrong;
    ++stopped;
  }
  void cancelled_request(std::uint64_t image) {
    Bytes bytes(size);
    api::Ticket ticket = pool.submit(ask(image, bytes, kSteps));
    std::thread other([&] { ticket.cancel(); });
    const ddpm_status status = ddpm_ticket_wait(ticket.get());
    other.join();
    if (status == DDPM_OK) look(image, bytes);
    if (status != DDPM_OK && status != DDPM_STOPPED) ++wrong;
    stopped += status == DDPM_STOPPED;
  }

  void run(int thread, int samples) {
    std::unique_ptr<api::Sampler> sampler;
    for (int i = 0; i < samples; ++i) {
      const auto image = static_cast<std::uint64_t>((i * 7 + thread * 3) % kImages);
      if (i % 8 == 0) sampler.reset(new api::Sampler(model, chain(kSteps)));
      if (i % 16 == 5) cancelled_sample(*sampler, image);
      if (i % 16 == 13) cancelled_request(image);
      Bytes bytes(size);
      if (i % 2 == 0)
        bytes = sampler->sample(0, image, 1);
      else
        pool.submit(ask(image, bytes, kSteps)).wait();
      look(image, bytes);
    }
  }
};

int threads(const char* folder, int count, int samples) {
  const api::Model model = load(folder);
  const Bytes expected = api::Sampler(model, chain(kSteps)).sample(0, 0, kImages);
  auto options = api::sized<ddpm_pool_options>();
  options.batch_size = 4;
  api::Pool pool(model, options);
  Load work{model, pool, expected, expected.size() / kImages};
  std::vector<std::thread> all;
  for (int i = 0; i < count; ++i)
    all.emplace_back([&, i] {
      try {
        work.run(i, samples);
      } catch (const std::exception& e) {
        std::printf("thread %d: %s\n", i, e.what());
        ++work.wrong;
      }
    });
  for (std::thread& t : all) t.join();
  std::printf("%d images right, %d wrong, %d cancelled\n", work.good.load(), work.wrong.load(),
              work.stopped.load());
  return work.wrong == 0 && work.good >= count * samples ? 0 : 1;
}

struct Held {
  long bytes = 0, files = 0;
};

Held held() {
  Held h;
  long all = 0, resident = 0;
  std::ifstream("/proc/self/statm") >> all >> resident;
  h.bytes = resident * sysconf(_SC_PAGESIZE);
  if (DIR* files = opendir("/proc/self/fd")) {
    while (readdir(files) != nullptr) ++h.files;
    closedir(files);
  }
  return h;
}

char* volatile lost;  // so that the compiler keeps what is lost

int growth(const char* folder, int samples, bool leak) {
  constexpr int kWarm = 100;
  constexpr long kAllowed = 1 << 20;
  const api::Model model = load(folder);
  api::Sampler sampler(model, chain(1));
  api::Pool pool(model);
  Bytes bytes(sampler.info().image_size);
  Held before;
  for (int i = 0; i < samples; ++i) {
    if (i == kWarm) before = held();
    if (i % 2 == 0)
      api::check(ddpm_sample(sampler.get(), 0, 0, 1, bytes.data()));
    else
      pool.submit(ask(0, bytes, 1)).wait();
    if (leak) {
      char* kept = static_cast<char*>(std::malloc(1000));
      std::memset(kept, 1, 1000);
      lost = kept;
    }
    if (i % (samples / 100) == 0) api::Sampler(load(folder), chain(1)).sample(0, 0, 1);
  }
  const Held after = held();
  std::printf("%d samples, 100 models loaded: %ld bytes and %ld files more\n", samples,
              after.bytes - before.bytes, after.files - before.files);
  return after.bytes - before.bytes <= kAllowed && after.files == before.files ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) try {
  const std::string what = argc > 3 ? argv[1] : "";
  if (what == "threads" && argc == 5)
    return threads(argv[2], std::atoi(argv[3]), std::atoi(argv[4]));
  if ((what == "growth" || what == "leak") && argc == 4)
    return growth(argv[2], std::atoi(argv[3]), what == "leak");
  std::fprintf(stderr,
               "usage: c_api_soak threads MODEL THREADS SAMPLES | growth|leak MODEL SAMPLES\n");
  return 2;
} catch (const std::exception& e) {
  std::fprintf(stderr, "%s\n", e.what());
  return 2;
}
