// Threads of the CPU backend. OpenMP, because oneDNN brings it: one pool serves both.
#pragma once

#include <algorithm>
#include <cstdint>

namespace ddpm::cpu {

// Calls body(begin, end) on `threads` contiguous parts of [0, count). The split depends on count
// and threads only. body must not throw.
template <typename Body>
void parallel_for(int threads, int64_t count, const Body& body) {
  const int64_t parts = std::min<int64_t>(threads, count);
  if (parts <= 1) {
    if (count > 0) body(int64_t{0}, count);
    return;
  }
#pragma omp parallel for schedule(static, 1) num_threads(static_cast <int>(parts))
  for (int64_t i = 0; i < parts; ++i) body(count * i / parts, count * (i + 1) / parts);
}

// Threads worth starting for a loop over `elements`: for a short one, starting them would cost more
// than the work.
inline int threads_for(int threads, int64_t elements) {
  constexpr int64_t kGrain = 16384;
  return static_cast<int>(std::clamp<int64_t>(elements / kGrain, 1, threads));
}

// As parallel_for, over elements.
template <typename Body>
void parallel_elements(int threads, int64_t count, const Body& body) {
  parallel_for(threads_for(threads, count), count, body);
}

// Calls body(sample, begin, end) on parts of `samples` rows of `count` elements: a part stays
// within one sample.
template <typename Body>
void parallel_samples(int threads, int64_t samples, int64_t count, const Body& body) {
  parallel_elements(threads, samples * count, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t sample = begin / count, start = sample * count;
      const int64_t stop = std::min(end, start + count);
      body(sample, begin - start, stop - start);
      begin = stop;
    }
  });
}

}  // namespace ddpm::cpu
