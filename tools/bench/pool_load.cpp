// A pool against lock-step batching under the same arrivals: pool_load MODEL BATCH REQUESTS ...
//
// Requests of one image arrive as a Poisson process. Lock-step: a worker takes what waits, up to a
// batch, of requests with equal options (a batch of a ddpm_sampler has one sampler and step count),
// oldest first, and runs the chains to their end. The same requests go to a ddpm_pool. For each
// share of what full batches make, measured anew in each round: images/s, and p50 and p95 of the
// time from arrival to image, in the time of a full batch's mean chain. Both sides take turns in
// each round; medians of the rounds are printed.
#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "model/ddpm.hpp"

namespace {

namespace api = ddpm::api;
using Clock = std::chrono::steady_clock;
using Bytes = std::vector<std::uint8_t>;

double seconds_since(Clock::time_point t) {
  return std::chrono::duration<double>(Clock::now() - t).count();
}

struct Arrival {
  double at;  // seconds from the start
  int steps;
};

// `mixed`: 10, 20 or 50 steps, else 20.
std::vector<Arrival> arrivals(int count, double rate, bool mixed, unsigned seed) {
  std::mt19937 random(seed);
  std::exponential_distribution<double> gap(rate);
  constexpr int kSteps[] = {10, 20, 50};
  std::vector<Arrival> all;
  double at = 0;
  for (int i = 0; i < count; ++i) {
    at += gap(random);
    all.push_back({at, mixed ? kSteps[random() % 3] : 20});
  }
  return all;
}

struct Reading {
  double images_per_second, p50, p95;
};

Reading reading(std::vector<double> latency, double seconds) {
  std::sort(latency.begin(), latency.end());
  const auto at = [&](double q) {
    return latency[static_cast<std::size_t>(q * static_cast<double>(latency.size() - 1))];
  };
  return {static_cast<double>(latency.size()) / seconds, at(0.5), at(0.95)};
}

class LockStep {
 public:
  LockStep(const api::Model& model, int batch) : model_(model), batch_(batch) {
    for (int steps : {10, 20, 50}) {
      auto o = api::sized<ddpm_sampler_options>();
      o.batch_size = batch;
      o.sampler = "ddim";
      o.steps = steps;
      samplers_.emplace(steps, std::unique_ptr<api::Sampler>(new api::Sampler(model, o)));
    }
  }

  // Images per second of full batches.
  double capacity(bool mixed) {
    const std::size_t n = static_cast<std::size_t>(batch_);
    Bytes images(n * samplers_.at(20)->info().image_size);
    double seconds = 0;
    int images_made = 0;
    for (int round = 0; round < 3; ++round)
      for (int steps : {10, 20, 50}) {
        if (!mixed && steps != 20) continue;
        const Clock::time_point start = Clock::now();
        api::check(ddpm_sample(samplers_.at(steps)->get(), 0, 0, n, images.data()));
        if (round == 0) continue;  // warm-up
        seconds += seconds_since(start);
        images_made += batch_;
      }
    return images_made / seconds;
  }

  Reading run(const std::vector<Arrival>& all) {
    std::vector<double> latency(all.size());
    std::deque<std::size_t> waiting;
    std::mutex mutex;
    std::condition_variable arrived;
    bool last = false;
    const Clock::time_point start = Clock::now();
    std::thread worker([&] {
      Bytes images(static_cast<std::size_t>(batch_) * samplers_.at(20)->info().image_size);
      std::unique_lock<std::mutex> lock(mutex);
      for (;;) {
        arrived.wait(lock, [&] { return !waiting.empty() || last; });
        if (waiting.empty()) return;
        const int steps = all[waiting.front()].steps;
        std::vector<std::size_t> batch;
        std::deque<std::size_t> others;
        for (std::size_t i : waiting)
          if (all[i].steps == steps && batch.size() < static_cast<std::size_t>(batch_))
            batch.push_back(i);
          else
            others.push_back(i);
        waiting.swap(others);
        lock.unlock();
        api::check(ddpm_sample(samplers_.at(steps)->get(), 0, 0, batch.size(), images.data()));
        for (std::size_t i : batch) latency[i] = seconds_since(start) - all[i].at;
        lock.lock();
      }
    });
    for (std::size_t i = 0; i < all.size(); ++i) {
      std::this_thread::sleep_until(start + std::chrono::duration<double>(all[i].at));
      const std::lock_guard<std::mutex> lock(mutex);
      waiting.push_back(i);
      last = i + 1 == all.size();
      arrived.notify_one();
    }
    worker.join();
    return reading(latency, seconds_since(start));
  }

 private:
  const api::Model& model_;
  int batch_;
  std::map<int, std::unique_ptr<api::Sampler>> samplers_;
};

Reading run_pool(api::Pool& pool, const std::vector<Arrival>& all) {
  struct Done {
    Clock::time_point start;
    double at, *latency;
  };
  std::vector<double> latency(all.size());
  std::vector<Done> done(all.size());
  const std::size_t size = pool.info().image_size;
  Bytes images(all.size() * size);
  const Clock::time_point start = Clock::now();
  for (std::size_t i = 0; i < all.size(); ++i) {
    std::this_thread::sleep_until(start + std::chrono::duration<double>(all[i].at));
    auto q = api::sized<ddpm_pool_request>();
    q.sampler = "ddim";
    q.steps = all[i].steps;
    q.n = 1;
    q.bytes = &images[i * size];
    done[i] = {start, all[i].at, &latency[i]};
    q.user = &done[i];
    q.done = [](void* user, ddpm_status, const char*) {
      const Done& d = *static_cast<Done*>(user);
      *d.latency = seconds_since(d.start) - d.at;
    };
    api::check(ddpm_pool_submit(pool.get(), &q, nullptr));
  }
  while (pool.info().running + pool.info().waiting > 0)
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  return reading(latency, seconds_since(start));
}

double median(std::vector<double> v) {
  std::sort(v.begin(), v.end());
  return v[v.size() / 2];
}

// Of the rounds at one share, each with the images/s that full batches made in it.
void print(const char* side, double share, int batch, const std::vector<Reading>& rounds,
           const std::vector<double>& capacity) {
  std::vector<double> rate, p50, p95;
  for (std::size_t i = 0; i < rounds.size(); ++i) {
    const double chain = batch / capacity[i];
    rate.push_back(rounds[i].images_per_second / capacity[i]);
    p50.push_back(rounds[i].p50 / chain);
    p95.push_back(rounds[i].p95 / chain);
  }
  std::printf("%-9s load %.2f  images/s %.2f of full batches  p50 %.2f  p95 %.2f chains\n", side,
              share, median(rate), median(p50), median(p95));
  std::fflush(stdout);
}

}  // namespace

int main(int argc, char** argv) try {
  if (argc < 5) {
    std::fprintf(stderr, "usage: pool_load MODEL BATCH REQUESTS ROUNDS [mixed] [SHARE ...]\n");
    return 2;
  }
  const int batch = std::atoi(argv[2]), requests = std::atoi(argv[3]), rounds = std::atoi(argv[4]);
  const bool mixed = argc > 5 && std::strcmp(argv[5], "mixed") == 0;
  std::vector<double> shares;
  for (int i = mixed ? 6 : 5; i < argc; ++i) shares.push_back(std::atof(argv[i]));
  if (shares.empty()) shares = {0.3, 0.5, 0.7, 0.9};

  const api::Model model(argv[1]);
  LockStep lock_step(model, batch);
  auto options = api::sized<ddpm_pool_options>();
  options.batch_size = batch;
  options.queue_size = static_cast<std::size_t>(requests);
  api::Pool pool(model, options);
  unsigned seed = 1;
  for (double share : shares) {
    std::vector<Reading> by_lock_step, by_pool;
    std::vector<double> capacity;
    for (int round = 0; round < rounds; ++round) {
      capacity.push_back(lock_step.capacity(mixed));
      const std::vector<Arrival> all = arrivals(requests, share * capacity.back(), mixed, seed++);
      by_lock_step.push_back(lock_step.run(all));
      by_pool.push_back(run_pool(pool, all));
    }
    std::printf("full batches: %.2f images/s\n", median(capacity));
    print("lock-step", share, batch, by_lock_step, capacity);
    print("pool", share, batch, by_pool, capacity);
  }
} catch (const std::exception& e) {
  std::fprintf(stderr, "%s\n", e.what());
  return 1;
}
