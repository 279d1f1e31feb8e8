// A pool against lock-step batching under the same Poisson arrivals:
//   pool_load MODEL BATCH REQUESTS [mixed] [SHARE ...]
//
// Requests of one image arrive at a share of what full batches make. Lock-step is what a
// ddpm_sampler allows: a worker takes what waits, up to a batch, of requests with equal step
// counts, oldest first, and runs the chains to their end. Time is counted in steps of a batch: both
// sides run the plan of the whole batch, so a step of one costs what a step of the other does, and
// a machine that others use changes nothing. Lock-step is worked out; the pool is a real one, whose
// count of steps is the clock that requests arrive by. First the ratio of both sides' step times is
// measured, with all places taken, in turns.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "model/ddpm.hpp"

namespace {

namespace api = ddpm::api;
using Clock = std::chrono::steady_clock;
using Bytes = std::vector<std::uint8_t>;

struct Arrival {
  double at;  // in steps from the start
  int steps;
};

// `mixed`: 10, 20 or 50 steps, else 20.
std::vector<Arrival> arrivals(int count, double share, int batch, bool mixed) {
  std::mt19937 random(1);
  constexpr int kSteps[] = {10, 20, 50};
  const double mean_steps = mixed ? 80.0 / 3 : 20;
  std::exponential_distribution<double> gap(share * batch / mean_steps);
  std::vector<Arrival> all;
  double at = 0;
  for (int i = 0; i < count; ++i) {
    at += gap(random);
    all.push_back({at, mixed ? kSteps[random() % 3] : 20});
  }
  return all;
}

void print(const char* side, double share, std::vector<double> latency, double steps) {
  std::sort(latency.begin(), latency.end());
  const auto at = [&](double q) {
    return latency[static_cast<std::size_t>(q * static_cast<double>(latency.size() - 1))];
  };
  std::printf("%-9s share %.2f  images/step %.3f  p50 %6.1f  p95 %6.1f steps\n", side, share,
              static_cast<double>(latency.size()) / steps, at(0.5), at(0.95));
  std::fflush(stdout);
}

void lock_step(const std::vector<Arrival>& all, int batch, double share) {
  std::vector<double> latency;
  std::deque<Arrival> waiting;
  double now = 0;
  for (std::size_t next = 0; next < all.size() || !waiting.empty();) {
    if (waiting.empty()) now = std::max(now, all[next].at);
    while (next < all.size() && all[next].at <= now) waiting.push_back(all[next++]);
    const int steps = waiting.front().steps;
    std::deque<Arrival> others;
    std::vector<Arrival> taken;
    for (const Arrival& a : waiting)
      if (a.steps == steps && taken.size() < static_cast<std::size_t>(batch))
        taken.push_back(a);
      else
        others.push_back(a);
    waiting.swap(others);
    now += steps;
    for (const Arrival& a : taken) latency.push_back(now - a.at);
  }
  print("lock-step", share, latency, now);
}

void by_pool(api::Pool& pool, const std::vector<Arrival>& all, double share) {
  struct Done {
    ddpm_pool* pool;
    double asked, *latency;
  };
  const auto steps_of = [](ddpm_pool* p) {
    auto info = api::sized<ddpm_pool_info>();
    ddpm_pool_get_info(p, &info);
    return static_cast<double>(info.steps);
  };
  std::vector<double> latency(all.size());
  std::vector<Done> done(all.size());
  const std::size_t size = pool.info().image_size;
  Bytes images(all.size() * size);
  double idle = -steps_of(pool.get());  // steps in which nothing was there to do
  for (std::size_t i = 0; i < all.size(); ++i) {
    for (;;) {
      const ddpm_pool_info info = pool.info();
      const double now = static_cast<double>(info.steps) + idle;
      if (now >= all[i].at) break;
      if (info.running + info.waiting == 0) {
        idle += all[i].at - now;
        break;
      }
      std::this_thread::sleep_for(std::chrono::microseconds(200));
    }
    auto q = api::sized<ddpm_pool_request>();
    q.sampler = "ddim";
    q.steps = all[i].steps;
    q.n = 1;
    q.bytes = &images[i * size];
    done[i] = {pool.get(), steps_of(pool.get()), &latency[i]};
    q.user = &done[i];
    q.done = [](void* user, ddpm_status, const char*) {
      const Done& d = *static_cast<Done*>(user);
      auto info = api::sized<ddpm_pool_info>();
      ddpm_pool_get_info(d.pool, &info);
      *d.latency = static_cast<double>(info.steps) - d.asked;
    };
    api::check(ddpm_pool_submit(pool.get(), &q, nullptr));
  }
  while (pool.info().running + pool.info().waiting > 0)
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  print("pool", share, latency, steps_of(pool.get()) + idle);
}

// Time of a pool's step over a sampler's, all places taken.
double step_ratio(const api::Model& model, api::Pool& pool, int batch) {
  constexpr int kSteps = 20, kRounds = 15;
  auto o = api::sized<ddpm_sampler_options>();
  o.batch_size = batch;
  o.sampler = "ddim";
  o.steps = kSteps;
  api::Sampler sampler(model, o);
  Bytes images(static_cast<std::size_t>(batch) * sampler.info().image_size);
  auto q = api::sized<ddpm_pool_request>();
  q.sampler = "ddim";
  q.steps = kSteps;
  q.n = static_cast<std::size_t>(batch);
  q.bytes = images.data();
  std::vector<double> ratios;
  for (int i = 0; i < kRounds; ++i) {
    const Clock::time_point start = Clock::now();
    api::check(ddpm_sample(sampler.get(), 0, 0, q.n, images.data()));
    const Clock::time_point middle = Clock::now();
    pool.submit(q).wait();
    ratios.push_back((Clock::now() - middle) / std::chrono::duration<double>(middle - start));
  }
  std::sort(ratios.begin(), ratios.end());
  return ratios[kRounds / 2];
}

}  // namespace

int main(int argc, char** argv) try {
  if (argc < 4) {
    std::fprintf(stderr, "usage: pool_load MODEL BATCH REQUESTS [mixed] [SHARE ...]\n");
    return 2;
  }
  const int batch = std::atoi(argv[2]), requests = std::atoi(argv[3]);
  const bool mixed = argc > 4 && std::strcmp(argv[4], "mixed") == 0;
  std::vector<double> shares;
  for (int i = mixed ? 5 : 4; i < argc; ++i) shares.push_back(std::atof(argv[i]));
  if (shares.empty()) shares = {0.3, 0.5, 0.7, 0.9};

  const api::Model model(argv[1]);
  auto options = api::sized<ddpm_pool_options>();
  options.batch_size = batch;
  options.queue_size = static_cast<std::size_t>(requests);
  api::Pool pool(model, options);
  std::printf("time of a pool's step / a sampler's: %.2f\n", step_ratio(model, pool, batch));
  for (double share : shares) {
    const std::vector<Arrival> all = arrivals(requests, share, batch, mixed);
    lock_step(all, batch, share);
    by_pool(pool, all, share);
  }
} catch (const std::exception& e) {
  std::fprintf(stderr, "%s\n", e.what());
  return 1;
}
