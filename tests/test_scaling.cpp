// Arithmetic of steps over ranks, beside hand-made cases and a simulation by small moments.
#include <catch2/catch.hpp>

#include "model/presets.h"
#include "model/trainer.h"
#include "tests/recording_backend.h"
#include "tools/scaling.h"

using namespace ddpm;
using tools::Closing;
using tools::Link;

TEST_CASE("scaling: the time of a sum", "[scaling]") {
  const Link link{1e9, 1e-3};
  CHECK(tools::sum_seconds(1e9, 1, link) == 0);
  CHECK(tools::sum_seconds(1e9, 2, link) == Approx(1 + 2e-3));
  CHECK(tools::sum_seconds(1e9, 4, link) == Approx(1.5 + 4e-3));
  CHECK(tools::sum_seconds(1e9, 5, link) == Approx(1.6 + 6e-3));
  CHECK(tools::sum_seconds(0, 1024, link) == Approx(20e-3));
}

TEST_CASE("scaling: sums hide behind what is still computed", "[scaling]") {
  const Link link{1e9, 0};
  const auto exposed = [&](std::vector<Closing> c, double step) {
    return tools::step_on_ranks(c, step, 2, link).exposed;
  };
  CHECK(exposed({{0.5, 1e9}}, 10) == 0);                       // 5 to 6
  CHECK(exposed({{0.5, 6e9}}, 10) == Approx(1));               // 5 to 11
  CHECK(exposed({{0.5, 4e9}, {1.0, 1e9}}, 10) == Approx(1));   // 5 to 9, 10 to 11
  CHECK(exposed({{0.5, 4e9}, {0.75, 4e9}}, 10) == Approx(3));  // 5 to 9, 9 to 13
  CHECK(tools::step_on_ranks({{0.5, 4e9}, {0.75, 4e9}}, 10, 2, link).summing == Approx(8));
  CHECK(tools::step_on_ranks({{1.0, 1e9}}, 10, 1, link).exposed == 0);
}

TEST_CASE("scaling: buckets of a network close from half of its step on", "[scaling]") {
  test::RecordingBackend backend;
  const Preset& p = find_preset("cifar10");
  TrainerOptions o;
  o.batch_size = 2;
  const Graph g = build_training_graph(backend, p.unet, p.scheduler, o, 1).graph;
  const auto all = tools::closings(g, 1 << 20);
  double bytes = 0, last = 0;
  for (const Closing& c : all) {
    CHECK(c.at >= last);
    last = c.at;
    bytes += c.bytes;
  }
  CHECK(bytes == Approx(4.0 * static_cast<double>(g.params().arena_size())));
  // A third of the products is the forward pass, which closes none.
  CHECK(all.front().at > 0.33);
  CHECK(all.front().at < 0.6);
  CHECK(last > 0.99);
  CHECK(last <= 1);
}
