// Four threads of a service make images by one pool, each request with a sampler and steps of its
// own: service MODEL
// Prints a line per request: its number and its images' mean grey. The lines are the same in every
// run, whichever thread took a request and whatever shared its batch.
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <ddpm.hpp>
#include <exception>
#include <numeric>
#include <string>
#include <thread>
#include <vector>

namespace {

namespace api = ddpm::api;
constexpr int kThreads = 4, kRequests = 12;

struct Result {
  double mean = 0;
  std::string error;
};

ddpm_pool_request request_of(int k) {
  ddpm_pool_request request = api::sized<ddpm_pool_request>();
  request.sampler = k % 3 == 0 ? "ddpm" : k % 3 == 1 ? "ddim" : "dpmpp2m";
  request.steps = 4 + k;
  request.seed = static_cast<std::uint64_t>(k);
  request.n = static_cast<std::size_t>(1 + k % 2);
  request.timeout = 600;  // seconds
  return request;
}

// A queue that has no room is the service's to answer: this one tries again.
api::Ticket submit(api::Pool& pool, const ddpm_pool_request& request) {
  for (;;) {
    try {
      return pool.submit(request);
    } catch (const api::Error& e) {
      if (e.status() != DDPM_FULL) throw;
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
  }
}

void serve(api::Pool& pool, std::size_t image_size, int k, Result& result) {
  try {
    ddpm_pool_request request = request_of(k);
    std::vector<std::uint8_t> images(request.n * image_size);
    request.bytes = images.data();
    submit(pool, request).wait();
    result.mean =
        std::accumulate(images.begin(), images.end(), 0.0) / static_cast<double>(images.size());
  } catch (const std::exception& e) {
    result.error = e.what();
  }
}

}  // namespace

int main(int argc, char** argv) try {
  if (argc < 2) {
    std::fprintf(stderr, "usage: service MODEL\n");
    return DDPM_USAGE;
  }
  const api::Model model(argv[1]);
  ddpm_pool_options options = api::sized<ddpm_pool_options>();
  options.batch_size = 4;
  options.queue_size = 6;
  api::Pool pool(model, options);
  const std::size_t image_size = pool.info().image_size;

  std::vector<Result> results(kRequests);
  std::atomic<int> next{0};
  std::vector<std::thread> threads;
  for (int i = 0; i < kThreads; ++i)
    threads.emplace_back([&] {
      for (int k = next++; k < kRequests; k = next++)
        serve(pool, image_size, k, results[static_cast<std::size_t>(k)]);
    });
  for (std::thread& t : threads) t.join();
  pool.drain();
  for (int k = 0; k < kRequests; ++k) {
    const Result& r = results[static_cast<std::size_t>(k)];
    if (!r.error.empty()) {
      std::fprintf(stderr, "request %d: %s\n", k, r.error.c_str());
      return EXIT_FAILURE;
    }
    std::printf("request %d mean %.3f\n", k, r.mean);
  }
} catch (const api::Error& e) {
  std::fprintf(stderr, "%s: %s\n", ddpm_status_string(e.status()), e.what());
  return e.status();
}
