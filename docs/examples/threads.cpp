// Four threads share one model, and each makes images with a sampler of its own: threads MODEL
// Prints a line per image: its number and its mean grey. The lines are the same in every run.
#include <cstdio>
#include <cstdlib>
#include <ddpm.hpp>
#include <exception>
#include <numeric>
#include <string>
#include <thread>
#include <vector>

namespace {

constexpr int kThreads = 4, kImages = 8;

struct Result {
  double mean[kImages] = {};
  std::string error;
};

// Thread k makes images k, k + 4, ...
void work(const ddpm::api::Model& model, int k, Result& result) {
  try {
    ddpm_sampler_options options = ddpm::api::sized<ddpm_sampler_options>();
    options.batch_size = 1;
    options.sampler = "ddim";
    options.steps = 10;
    ddpm::api::Sampler sampler(model, options);
    for (int i = k; i < kImages; i += kThreads) {
      const std::vector<std::uint8_t> image = sampler.sample(0, static_cast<std::uint64_t>(i), 1);
      result.mean[i] =
          std::accumulate(image.begin(), image.end(), 0.0) / static_cast<double>(image.size());
    }
  } catch (const std::exception& e) {
    result.error = e.what();
  }
}

}  // namespace

int main(int argc, char** argv) try {
  if (argc < 2) {
    std::fprintf(stderr, "usage: threads MODEL\n");
    return DDPM_USAGE;
  }
  ddpm_model_options options = ddpm::api::sized<ddpm_model_options>();
  options.threads = 1;  // of each sampler
  const ddpm::api::Model model(argv[1], options);
  std::vector<Result> results(kThreads);
  std::vector<std::thread> threads;
  for (int k = 0; k < kThreads; ++k)
    threads.emplace_back(work, std::cref(model), k, std::ref(results[static_cast<std::size_t>(k)]));
  for (std::thread& t : threads) t.join();
  for (int i = 0; i < kImages; ++i) {
    const Result& r = results[static_cast<std::size_t>(i % kThreads)];
    if (!r.error.empty()) {
      std::fprintf(stderr, "%s\n", r.error.c_str());
      return EXIT_FAILURE;
    }
    std::printf("image %d mean %.3f\n", i, r.mean[i]);
  }
} catch (const ddpm::api::Error& e) {
  std::fprintf(stderr, "%s: %s\n", ddpm_status_string(e.status()), e.what());
  return e.status();
}
