// Timesteps drawn by their losses: the history, and what is drawn of it.
#include <cmath>
#include <deque>
#include <vector>

#include <catch2/catch.hpp>

#include "tests/diffusion_support.h"
#include "tests/simt/machine.h"

using namespace ddpm;
using test::for_simt;

namespace {

constexpr size_t kRow = kLossHistoryRow;

struct Drawn {
  std::vector<int32_t> t;
  std::vector<float> weight;
};

Drawn draw(Backend& backend, int n, int timesteps, const std::vector<float>& history,
           const StepState& state) {
  test::Bench b(backend);
  const Out t = b.out<int32_t>(n), weight = b.out(n);
  b.run(backend.draw_timesteps_by_loss(n, timesteps, b.in(history), b.state(state), t, weight));
  return {b.get<int32_t>(t), b.get(weight)};
}

// A full history whose timestep t has losses around (t % 5) / 4; its probabilities.
std::vector<float> full_history(int timesteps, std::vector<double>& p) {
  std::vector<float> history;
  std::vector<double> root;
  double total = 0;
  for (int t = 0; t < timesteps; ++t) {
    double squares = 0;
    for (const float v : test::random_values(kLossHistory, 7 + static_cast<uint64_t>(t))) {
      history.push_back(static_cast<float>(t % 5) / 4 * (2 + v));
      squares += std::pow(double{history.back()}, 2) / kLossHistory;
    }
    history.push_back(static_cast<float>(kLossHistory + t % kLossHistory));
    root.push_back(std::sqrt(squares));
    total += root.back();
  }
  for (const double r : root)
    p.push_back(total == 0 ? 1.0 / timesteps : 0.999 * r / total + 0.001 / timesteps);
  return history;
}

// As the inverse of the distribution function has them, from the address that draw_timesteps uses.
void check_draws(Backend& backend) {
  const StepState state{.seed = 5, .step = 3, .first_image = 2};
  for (const int timesteps : {1, 2, 7, 256, 300, 1000})
    for (const int n : {1, 33, 300}) {
      CAPTURE(timesteps, n);
      std::vector<double> p;
      std::vector<float> history = full_history(timesteps, p);
      for (const bool full : {true, false}) {
        if (!full) {
          history[kRow * static_cast<size_t>(timesteps / 2) + kLossHistory] = kLossHistory - 1;
          p.assign(p.size(), 1.0 / timesteps);
        }
        const Drawn drawn = draw(backend, n, timesteps, history, state);
        for (int i = 0; i < n; ++i) {
          const auto at = static_cast<size_t>(i);
          const RandomStream stream{.seed = 5,
                                    .purpose = Purpose::kTimestep,
                                    .sample = 2 + static_cast<uint64_t>(i),
                                    .step = 3};
          const double u = stream.block(0)[0] * 0x1p-32;
          int t = 0;
          double sum = p[0];
          while (t + 1 < timesteps && sum <= u) sum += p[static_cast<size_t>(++t)];
          REQUIRE(drawn.t[at] == t);
          REQUIRE(drawn.weight[at] ==
                  Approx(1 / (timesteps * p[static_cast<size_t>(t)])).epsilon(1e-6));
        }
      }
    }
  // Losses of zero say nothing.
  std::vector<float> zeros(kRow * 4, 0.0f);
  for (size_t t = 0; t < 4; ++t) zeros[t * kRow + kLossHistory] = kLossHistory;
  for (const float w : draw(backend, 40, 4, zeros, state).weight) CHECK(w == 1);
  CHECK_THROWS_AS(backend.draw_timesteps_by_loss(0, 9, {0}, {1}, {2}, {3}), Error);
  CHECK_THROWS_AS(backend.draw_timesteps_by_loss(9, 0, {0}, {1}, {2}, {3}), Error);
}

void check_history(Backend& backend) {
  constexpr int kTimesteps = 270, kImages = 37;
  std::vector<std::deque<float>> expected(kTimesteps);
  test::Bench b(backend);
  const Out history = b.inout(std::vector<float>(kRow * kTimesteps, 0.0f));
  for (int step = 0; step < 40; ++step) {
    std::vector<int32_t> t;
    const auto losses = test::random_values(kImages, 100 + static_cast<uint64_t>(step), 1, 1);
    for (int i = 0; i < kImages; ++i) {
      // Some timesteps come several times in a batch, some never.
      t.push_back((i % 3 == 0 ? 269 : i * (step + 1) * 7) % kTimesteps);
      auto& own = expected[static_cast<size_t>(t.back())];
      own.push_back(losses[static_cast<size_t>(i)]);
      if (own.size() > kLossHistory) own.pop_front();
    }
    const In ts = b.in(t), values = b.in(losses);
    b.run(backend.loss_history(kImages, kTimesteps, ts, values, b.state({}), history));
    StepState flagged;
    set_nonfinite(flagged, kLossNonFinite);
    b.run(backend.loss_history(kImages, kTimesteps, ts, values, b.state(flagged), history));
  }
  const std::vector<float> rows = b.get(history);
  for (size_t t = 0; t < kTimesteps; ++t) {
    const auto count = static_cast<size_t>(rows[t * kRow + kLossHistory]);
    REQUIRE(std::min<size_t>(count, kLossHistory) == expected[t].size());
    REQUIRE(count < 2 * kLossHistory);
    for (size_t i = 0; i < expected[t].size(); ++i)  // the latest stands before `count`
      REQUIRE(rows[t * kRow + (count - expected[t].size() + i) % kLossHistory] == expected[t][i]);
  }
  CHECK(expected[269].size() == kLossHistory);
  CHECK_THROWS_AS(backend.loss_history(0, 9, {0}, {1}, {2}, {3}), Error);
  CHECK_THROWS_AS(backend.loss_history(9, 0, {0}, {1}, {2}, {3}), Error);
}

}  // namespace

TEST_CASE("loss_history: timesteps come by the root of their mean squared loss", "[loss_history]") {
  check_draws(*make_cpu_backend({}));
}
TEST_CASE("simt.loss_history: timesteps come by the root of their mean squared loss",
          "[loss_history]") {
  check_draws(*test::make_kernel_backend(DType::kF32));
}

TEST_CASE("loss_history: the last ten losses of a timestep", "[loss_history]") {
  check_history(*make_cpu_backend({}));
}
TEST_CASE("simt.loss_history: the last ten losses of a timestep", "[loss_history]") {
  check_history(*test::make_kernel_backend(DType::kF32));
}
