// How long a training will take, as far as that is known before its first step.
#pragma once

#include <cstdint>
#include <string>

#include "engine/graph.h"

namespace ddpm::tools {

// Multiply-adds of a step's products, forward and backward; of one part, where it has several.
int64_t step_macs(const Graph&);

// A step by its products and the rate of one matrix product.
struct StepEstimate {
  // Of that rate, what a step's products come to with all that stands between them: what trainings
  // on CPUs were measured at (docs/performance.md).
  static constexpr double kShare = 0.8;

  double macs = 0;          // of a step
  double product_rate = 0;  // multiply-adds per second, as ceilings.h measures it

  double rate() const { return kShare * product_rate; }
  double seconds() const { return macs / rate(); }
};

// "about 12 min 05 s for 4,000 steps: 5.6 GFLOP a step at 60 GFLOP/s, 70 % of a matrix product's
// rate here (fp32)". `where`: what stands in brackets.
std::string estimate_text(int64_t steps, const StepEstimate&, const std::string& where);
// "about 12 min 05 s for 4,000 steps: 181 ms a step, as this run measured it last".
std::string estimate_text(int64_t steps, double measured_seconds);

}  // namespace ddpm::tools
