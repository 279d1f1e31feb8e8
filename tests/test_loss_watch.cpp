#include <catch2/catch.hpp>

#include <cmath>
#include <limits>

#include "tools/loss_watch.h"

using ddpm::tools::LossWatch;
using Verdict = ddpm::tools::LossWatch::Verdict;

namespace {

// 0.05 and a little, up and down: a spread that a spike has to stand out from.
double usual(int i) { return 0.05 + 0.002 * std::sin(1.7 * i); }

LossWatch watch_of(int count) {
  LossWatch watch;
  for (int i = 0; i < count; ++i) REQUIRE(watch.add(usual(i)) == Verdict::kOrdinary);
  return watch;
}

}  // namespace

TEST_CASE("loss_watch: a spike is told once, and a run of them is divergence", "[loss_watch]") {
  LossWatch watch = watch_of(300);
  CHECK(watch.median() == Approx(0.05).margin(0.002));
  CHECK(watch.add(0.054) == Verdict::kOrdinary);
  CHECK(watch.add(0.2) == Verdict::kSpike);
  CHECK(watch.add(0.2) == Verdict::kOrdinary);  // of the same run
  CHECK(watch.add(usual(0)) == Verdict::kOrdinary);
  CHECK(watch.add(0.2) == Verdict::kSpike);
  for (int i = 2; i < LossWatch::kRow; ++i) CHECK(watch.add(0.2) == Verdict::kOrdinary);
  CHECK(watch.add(0.2) == Verdict::kDiverged);
  // Warned of once; the new level is the measure from now on.
  for (int i = 0; i < 100; ++i) CHECK(watch.add(0.2) == Verdict::kOrdinary);
  // A loss that falls is no spike.
  CHECK(watch.add(1e-6) == Verdict::kOrdinary);
}

TEST_CASE("loss_watch: a NaN or an infinity does not poison it", "[loss_watch]") {
  for (const double bad : {std::nan(""), std::numeric_limits<double>::infinity()}) {
    LossWatch watch = watch_of(100);
    CHECK(watch.add(bad) == Verdict::kSpike);
    CHECK(watch.median() == Approx(0.05).margin(0.002));
    for (int i = 0; i < 50; ++i) CHECK(watch.add(usual(i)) == Verdict::kOrdinary);
    CHECK(watch.add(0.2) == Verdict::kSpike);
    LossWatch fresh;
    CHECK(fresh.add(bad) == Verdict::kSpike);
    CHECK(fresh.median() == 0);
  }
}

TEST_CASE("loss_watch: a start at 1 is usual, a loss that stays over 1.5 is not", "[loss_watch]") {
  LossWatch watch;
  for (int i = 0; i < 100; ++i) CHECK(watch.add(1.02 - 0.004 * i) == Verdict::kOrdinary);
  LossWatch useless;
  for (int i = 1; i < LossWatch::kRow; ++i) CHECK(useless.add(1.6) == Verdict::kOrdinary);
  CHECK(useless.add(1.6) == Verdict::kDiverged);
  // The bound in bits may be large for long.
  LossWatch bound(std::numeric_limits<double>::infinity());
  for (int i = 0; i < 100; ++i) CHECK(bound.add(40 - 0.01 * i) == Verdict::kOrdinary);
}
