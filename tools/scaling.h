// What a training step takes on more ranks, by arithmetic from what it takes on one.
#pragma once

#include <cstddef>
#include <vector>

#include "engine/graph.h"
#include "engine/parts.h"

namespace ddpm::tools {

// What a rank can send and receive at once. Of several machines it is that between them.
struct Link {
  double bytes_per_second = 0;
  double latency = 10e-6;  // seconds of one message, software included
};

// The sum over ranks of that many bytes, in seconds: each rank sends and receives 2 (N-1)/N of
// them, and the message passes a tree up and down.
double sum_seconds(double bytes, int ranks, const Link& link);

// Buckets of gradients by what happens when, as shares of a step: of its products.
struct Closing {
  double at = 0;     // share of the step after which the bucket is complete
  double bytes = 0;  // of its gradients
};
std::vector<Closing> closings(const Graph& training, int64_t bucket);

struct StepOnRanks {
  double summing = 0;  // seconds that all sums take
  double exposed = 0;  // of these, after the last gradient: what the step becomes longer by
};
// Sums follow one another; each begins when its bucket is complete. `step` in seconds, without
// sums.
StepOnRanks step_on_ranks(const std::vector<Closing>& closings, double step, int ranks,
                          const Link& link);

}  // namespace ddpm::tools
