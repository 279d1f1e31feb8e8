#include "tools/estimate.h"

#include "tools/common.h"
#include "tools/progress.h"

namespace ddpm::tools {
namespace {

std::string about(int64_t steps, double seconds_each) {
  return format("about %s for %s steps",
                duration_text(static_cast<double>(steps) * seconds_each).c_str(),
                grouped(steps).c_str());
}

}  // namespace

int64_t step_macs(const Graph& g) {
  int64_t macs = 0;
  for (const Step& step : g.steps()) macs += step.call.macs;
  return macs;
}

std::string estimate_text(int64_t steps, const StepEstimate& e, const std::string& where) {
  return about(steps, e.seconds()) +
         format(": %.3g GFLOP a step at %.3g GFLOP/s, %.0f %% of a matrix product's rate here (%s)",
                2e-9 * e.macs, 2e-9 * e.rate(), 100 * StepEstimate::kShare, where.c_str());
}

std::string estimate_text(int64_t steps, double measured_seconds) {
  return about(steps, measured_seconds) +
         format(": %.3g ms a step, as this run measured it last", 1e3 * measured_seconds);
}

}  // namespace ddpm::tools
