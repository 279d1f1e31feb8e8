#include "tools/scaling.h"

#include <algorithm>
#include <bit>

namespace ddpm::tools {

double sum_seconds(double bytes, int ranks, const Link& link) {
  if (ranks == 1) return 0;
  const int depth = std::bit_width(static_cast<unsigned>(ranks - 1));  // log2, rounded up
  return 2.0 * (ranks - 1) / ranks * bytes / link.bytes_per_second + 2.0 * depth * link.latency;
}

std::vector<Closing> closings(const Graph& training, int64_t bucket) {
  std::vector<double> done{0};  // products before each call
  for (const Step& s : training.steps())
    done.push_back(done.back() + static_cast<double>(s.call.macs));
  std::vector<Closing> all;
  for (const Bucket& b : gradient_buckets(training, bucket))
    all.push_back({done[b.closed] / done.back(),
                   static_cast<double>(b.end - b.begin) * static_cast<double>(sizeof(float))});
  std::stable_sort(all.begin(), all.end(),
                   [](const Closing& a, const Closing& b) { return a.at < b.at; });
  return all;
}

StepOnRanks step_on_ranks(const std::vector<Closing>& closings, double step, int ranks,
                          const Link& link) {
  StepOnRanks s;
  double free = 0;  // when the link is
  for (const Closing& c : closings) {
    const double seconds = sum_seconds(c.bytes, ranks, link);
    free = std::max(free, c.at * step) + seconds;
    s.summing += seconds;
  }
  s.exposed = std::max(0.0, free - step);
  return s;
}

}  // namespace ddpm::tools
