// The choice between our own convolutions and a library's, by a made-up timer.
#include "kernels/cuda/conv_choice.h"

#include <chrono>
#include <nlohmann/json.hpp>
#include <thread>

#include "kernels/cuda/conv.h"
#include "kernels/cuda/cuda_backend.h"
#include "model/unet.h"
#include "tests/conv_support.h"
#include "tests/recording_backend.h"
#include "tests/simt/simt_backend.h"

using namespace ddpm;
using namespace ddpm::test;
using cuda::ConvChoice;
using cuda::ConvChoiceOptions;
using cuda::PlanTable;

namespace {

constexpr const char* kLibrary = "library";
constexpr size_t kShared = cuda::CudaBackend::kHopperShared;
constexpr cuda::ConvChip kChip{kShared};

// Takes plain convolutions under a name of its own; computes them by our kernels.
class StandIn final : public cuda::ConvLibrary {
 public:
  explicit StandIn(DType type) : type_(type) {}
  std::optional<Call> forward(const ConvDesc& d, const ConvSlots& s, Out y) override {
    return named(cuda::conv_forward(type_, kChip, d, s, y, {}));
  }
  std::optional<Call> dgrad(const ConvDesc& d, const ConvSlots& s, In dy, Out dx,
                            Write write) override {
    return named(cuda::conv_dgrad(type_, kChip, d, s, dy, dx, write));
  }
  std::optional<Call> wgrad(const ConvDesc& d, const ConvSlots& s, In dy, Out dfilter,
                            Write write) override {
    return named(cuda::conv_wgrad(type_, kChip, d, s, dy, dfilter, write));
  }

 private:
  static std::optional<Call> named(std::optional<Call> call) {
    call->op = kLibrary;
    return call;
  }
  DType type_;
};

// Seconds of our own call and of everything else, and how often each was asked for.
struct Clock {
  double own = 1, other = 1;
  int own_asked = 0, other_asked = 0;
  double operator()(const Call& call, const std::vector<size_t>&) {
    const bool composite = std::string(call.op) == "composite";
    ++(composite ? other_asked : own_asked);
    return composite ? other : own;
  }
};

// A backend that computes nothing and chooses its convolutions.
class Chooser final : public RecordingBackend {
 public:
  explicit Chooser(ConvChoiceOptions options, DType type = DType::kBF16)
      : RecordingBackend({.compute_type = type}), library(type), choice(*this, library, options) {}

  std::optional<Call> conv_forward(const ConvDesc& d, const ConvSlots& s, Out y,
                                   Out statistics) override {
    return choice.forward(d, s, y, statistics);
  }
  std::optional<Call> conv_dgrad(const ConvDesc& d, const ConvSlots& s, In dy, Out dx,
                                 Write write) override {
    return choice.dgrad(d, s, dy, dx, write);
  }
  std::optional<Call> conv_dgrad_norm(const ConvDesc& d, const ConvSlots& s,
                                      const GroupNormDesc& norm, In mean_rstd, In dy, Out dz,
                                      Out sums) override {
    return choice.dgrad_norm(d, s, norm, mean_rstd, dy, dz, sums);
  }
  std::optional<Call> conv_wgrad_sums(const ConvDesc& d, const ConvSlots& s, In dy, Out dfilter,
                                      Write write, Out sums, int stride, int offset) override {
    return choice.wgrad_sums(d, s, dy, dfilter, write, sums, stride, offset);
  }
  std::optional<Call> conv_wgrad(const ConvDesc& d, const ConvSlots& s, In dy, Out dfilter,
                                 Write write) override {
    return choice.wgrad(d, s, dy, dfilter, write);
  }

  StandIn library;
  ConvChoice choice;
};

ConvChoiceOptions timed_by(Clock& clock, double budget = 1e9) {
  return {.precision = "bf16",
          .library = "lib 1, chip",
          .shared_bytes = kShared,
          .timer = std::ref(clock),
          .budget = std::make_shared<cuda::TuningBudget>(budget)};
}
ConvChoiceOptions untimed() {
  return {.precision = "bf16", .library = "lib 1, chip", .shared_bytes = kShared};
}

ConvDesc whole(ConvShape s, int c2 = 16) {
  ConvDesc d = make_desc(s);
  d.c2 = c2;
  d.transform = kNormalise;
  d.bias = d.statistics = true;
  d.sample_bias_stride = s.k;
  d.shortcut_c = 8;
  d.shortcut_c2 = 24;
  return d;
}
ConvDesc normalised(ConvShape s) {
  ConvDesc d = make_desc(s);
  d.transform = kNormalise;
  d.bias = d.statistics = true;
  return d;
}
ConvDesc biased(ConvShape s) {
  ConvDesc d = make_desc(s);
  d.bias = true;
  return d;
}

// The op that is answered; "" where the whole is declined.
std::string asked(Backend& backend, ConvPass pass, const ConvDesc& d,
                  Write write = Write::kOverwrite) {
  ConvSlots s;
  int next = 0;
  const auto slot = [&](bool present) { return present ? In{next++} : In{}; };
  s.x = slot(true);
  s.x2 = slot(d.c2 > 0);
  s.scale_shift = slot(d.transform.affine);
  s.state = slot(d.transform.dropout.p > 0);
  s.filter = slot(true);
  s.bias = slot(d.bias);
  s.sample_bias = slot(d.sample_bias_stride > 0);
  s.residual = slot(d.residual);
  s.shortcut = slot(d.shortcut_c > 0);
  s.shortcut2 = slot(d.shortcut_c2 > 0);
  s.shortcut_filter = s.shortcut_bias = slot(d.shortcut_c > 0);
  const In y = slot(true), z = slot(true);
  std::optional<Call> call;
  if (pass == ConvPass::kForward)
    call = backend.conv_forward(d, s, {y.slot}, {d.statistics ? z.slot : -1});
  else if (pass == ConvPass::kDgrad)
    call = backend.conv_dgrad(d, s, y, {z.slot}, write);
  else
    call = backend.conv_wgrad(d, s, y, {z.slot}, write);
  return call ? call->op : "";
}

// Whether a gradient is led back through its norm, of four groups.
bool leads_back(ConvChoice& choice, const ConvDesc& d) {
  ConvSlots s;
  s.x = s.scale_shift = s.state = s.filter = {0};
  if (d.c2 > 0) s.x2 = {0};
  const GroupNormDesc norm{.x = d.x, .c2 = d.c2, .groups = 4};
  return choice.dgrad_norm(d, s, norm, {0}, {0}, {1}, {2}).has_value();
}

// Whether dy is summed beside the filter's gradient.
bool sums_too(ConvChoice& choice, const ConvDesc& d) {
  ConvSlots s;
  s.x = s.scale_shift = s.state = {0};
  if (d.c2 > 0) s.x2 = {0};
  return choice.wgrad_sums(d, s, {0}, {1}, Write::kOverwrite, {2}, d.k, 0).has_value();
}

PlanTable through_text(const PlanTable& table) {
  return cuda::plan_table_from_json(nlohmann::json::parse(cuda::to_json(table).dump()), "m.json");
}

}  // namespace

TEST_CASE("conv_choice: the faster way is taken", "[conv_choice]") {
  const ConvShape s{2, 8, 8, 16, 16};
  for (const double other : {0.5, 1.0, 2.0}) {
    Clock clock{.own = 1, .other = other};
    Chooser backend(timed_by(clock));
    const bool own = other >= 1;  // a tie is ours: it needs less memory
    INFO(other);
    CHECK(asked(backend, ConvPass::kForward, whole(s)) == (own ? "conv_forward" : ""));
    CHECK(asked(backend, ConvPass::kWgrad, whole(s)) == (own ? "conv_wgrad" : ""));
    CHECK(asked(backend, ConvPass::kForward, biased(s)) == (own ? "conv_forward" : "library"));
    CHECK(asked(backend, ConvPass::kWgrad, biased(s)) == (own ? "conv_wgrad" : "library"));
    CHECK(asked(backend, ConvPass::kDgrad, biased(s)) == (own ? "conv_dgrad" : "library"));
    CHECK(asked(backend, ConvPass::kDgrad, biased(s), Write::kAccumulate) ==
          (own ? "conv_dgrad" : "library"));
    const int before = clock.own_asked;
    CHECK(leads_back(backend.choice, normalised(s)) == own);
    CHECK(leads_back(backend.choice, normalised(s)) == own);
    CHECK(clock.own_asked == before + 1);  // its composite's plain gradient was known already
    const ConvDesc broad = normalised({2, 8, 8, 32, 16});
    asked(backend, ConvPass::kWgrad, broad);
    const int measured = clock.own_asked;
    CHECK(sums_too(backend.choice, broad) == own);
    CHECK(sums_too(backend.choice, broad) == own);
    CHECK(clock.own_asked == measured + 1);
  }
}

TEST_CASE("conv_choice: measures once, and what changes the time apart", "[conv_choice]") {
  Clock clock;
  Chooser backend(timed_by(clock));
  const auto measured = [&](ConvPass pass, const ConvDesc& d, Write write = Write::kOverwrite) {
    clock.own_asked = clock.other_asked = 0;
    asked(backend, pass, d, write);
    CHECK(clock.own_asked == clock.other_asked);
    return clock.own_asked;
  };
  const ConvDesc d = make_desc({2, 8, 8, 16, 16});
  CHECK(measured(ConvPass::kForward, d) == 1);
  CHECK(measured(ConvPass::kForward, d) == 0);
  CHECK(measured(ConvPass::kWgrad, d) == 1);
  CHECK(measured(ConvPass::kDgrad, d) == 1);
  CHECK(measured(ConvPass::kDgrad, d, Write::kAccumulate) == 1);
  ConvDesc behind = d;  // gradients know nothing of what is added
  behind.bias = behind.residual = true;
  CHECK(measured(ConvPass::kDgrad, behind) == 0);
  CHECK(measured(ConvPass::kWgrad, behind) == 0);
  CHECK(measured(ConvPass::kForward, behind) == 1);

  // The plain convolution of a composite is measured before it, unless it is known.
  ConvDesc fused = d;
  fused.transform = kNormalise;
  CHECK(measured(ConvPass::kForward, fused) == 1);
  fused.transform.dropout.layer = 9;
  CHECK(measured(ConvPass::kForward, fused) == 0);
  fused.transform.dropout = {};
  CHECK(measured(ConvPass::kForward, fused) == 1);
  fused.transform.silu = false;
  CHECK(measured(ConvPass::kForward, fused) == 1);
  fused.statistics = true;
  CHECK(measured(ConvPass::kForward, fused) == 1);
  fused.upsample = true;
  CHECK(measured(ConvPass::kForward, fused) == 2);
  fused.c2 = 8;
  CHECK(measured(ConvPass::kForward, fused) == 2);
  fused.shortcut_c = 8;  // itself, the 1x1, and the main one with a residual
  CHECK(measured(ConvPass::kForward, fused) == 3);
  fused.shortcut_c = 16;
  fused.sample_bias_stride = 16;
  CHECK(measured(ConvPass::kForward, fused) == 3);
  fused.x.n = 3;
  CHECK(measured(ConvPass::kForward, fused) == 3);
}

TEST_CASE("conv_choice: a second start makes the first one's choices", "[conv_choice]") {
  const ConvDesc fused = whole({2, 8, 8, 16, 16}), plain = biased({2, 8, 8, 16, 16});
  Clock library{.own = 2, .other = 1}, own{.own = 1, .other = 2};
  Chooser first(timed_by(library));
  CHECK(asked(first, ConvPass::kForward, fused).empty());
  CHECK(asked(first, ConvPass::kWgrad, fused).empty());
  CHECK(asked(first, ConvPass::kDgrad, plain) == "library");
  const PlanTable table = through_text(first.choice.table());
  CHECK((table == first.choice.table()));

  Chooser again(timed_by(own));  // would choose otherwise
  again.choice.use(table);
  CHECK(asked(again, ConvPass::kForward, fused).empty());
  CHECK(asked(again, ConvPass::kWgrad, fused).empty());
  CHECK(asked(again, ConvPass::kDgrad, plain) == "library");
  CHECK(own.own_asked + own.other_asked == 0);
  CHECK(again.choice.replaced() == 0);
  CHECK(asked(again, ConvPass::kWgrad, whole({3, 8, 8, 16, 16})) == "conv_wgrad");
  CHECK(again.choice.replaced() == 0);  // of that nothing was said

  // Another library or chip, or a word that is not a choice.
  PlanTable other = table, damaged = table;
  other.library = "lib 2, chip";
  for (auto& [key, choice] : damaged.choices) choice.variant = "plain";
  for (const PlanTable& t : {other, damaged}) {
    Chooser anew(timed_by(own));
    anew.choice.use(t);
    CHECK(asked(anew, ConvPass::kDgrad, plain) == "conv_dgrad");
    CHECK(anew.choice.replaced() == 1);
  }
}

TEST_CASE("conv_choice: past the budget, and without room, the rules decide", "[conv_choice]") {
  const ConvDesc a = normalised({2, 8, 8, 16, 16}), b = normalised({3, 8, 8, 16, 16});
  Clock clock{.own = 2, .other = 1};  // against the rule
  const auto slow = [&](const Call& call, const std::vector<size_t>& bytes) {
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
    return clock(call, bytes);
  };
  ConvChoiceOptions o = timed_by(clock, 1e-3);
  o.timer = slow;
  Chooser backend(o);
  CHECK(asked(backend, ConvPass::kForward, a).empty());  // what is begun is ended
  CHECK_FALSE(o.budget->left());
  const int before = clock.own_asked;
  CHECK(asked(backend, ConvPass::kForward, b) == "conv_forward");
  CHECK(clock.own_asked == before);

  Chooser spent(timed_by(clock, 0));
  CHECK(asked(spent, ConvPass::kForward, a) == "conv_forward");

  ConvChoiceOptions full = timed_by(clock);
  full.timer = [](const Call&, const std::vector<size_t>&) -> double {
    fail(Status::kMemory, "full");
  };
  Chooser crowded(full);
  CHECK(asked(crowded, ConvPass::kForward, a) == "conv_forward");
  full.timer = [](const Call&, const std::vector<size_t>&) -> double {
    fail(Status::kDevice, "a kernel failed");
  };
  Chooser broken(full);
  CHECK_THROWS_WITH(asked(broken, ConvPass::kForward, a), "a kernel failed");
}

TEST_CASE("conv_choice: the rules", "[conv_choice]") {
  Chooser backend(untimed()), wide(untimed(), DType::kF32);
  const ConvShape body{128, 32, 32, 128, 128}, down{128, 32, 32, 128, 128, 3, 3, 2};
  CHECK(asked(backend, ConvPass::kForward, normalised(body)) == "conv_forward");
  CHECK(asked(backend, ConvPass::kForward, whole(body)) == "conv_forward");
  CHECK(asked(backend, ConvPass::kForward, normalised({128, 32, 32, 128, 3})) == "conv_forward");
  CHECK(asked(backend, ConvPass::kForward, biased(body)) == "library");
  CHECK(asked(backend, ConvPass::kForward, normalised({128, 32, 32, 3, 128})).empty());
  CHECK(asked(backend, ConvPass::kForward, normalised({1, 32, 32, 128, 128, 5, 5})).empty());
  CHECK(asked(backend, ConvPass::kWgrad, normalised(body)).empty());
  CHECK(asked(backend, ConvPass::kWgrad, biased(body)) == "library");
  CHECK(asked(backend, ConvPass::kDgrad, biased(body)) == "library");
  CHECK(asked(backend, ConvPass::kDgrad, biased(body), Write::kAccumulate) == "conv_dgrad");
  CHECK(asked(backend, ConvPass::kDgrad, biased(down), Write::kAccumulate) == "library");
  CHECK(asked(backend, ConvPass::kDgrad, biased({128, 32, 32, 128, 3}), Write::kAccumulate) ==
        "library");
  CHECK(leads_back(backend.choice, normalised(body)));
  CHECK_FALSE(leads_back(backend.choice, normalised(down)));
  CHECK_FALSE(leads_back(wide.choice, normalised(body)));
  CHECK(asked(wide, ConvPass::kForward, normalised(body)).empty());
  CHECK(asked(wide, ConvPass::kDgrad, biased(body), Write::kAccumulate) == "library");
}

TEST_CASE("conv_choice: batch-invariant, and where there is no composite, it is ours",
          "[conv_choice]") {
  Clock clock{.own = 2, .other = 1};
  ConvChoiceOptions o = timed_by(clock);
  ConvDesc unscaled = make_desc({2, 8, 8, 16, 16});
  unscaled.transform.silu = true;
  Chooser timed(o);
  CHECK(asked(timed, ConvPass::kForward, unscaled) == "conv_forward");
  CHECK(asked(timed, ConvPass::kWgrad, unscaled) == "conv_wgrad");
  o.batch_invariant = true;
  Chooser invariant(o);
  const ConvDesc plain = biased({2, 8, 8, 16, 16});
  CHECK(asked(invariant, ConvPass::kForward, plain) == "conv_forward");
  CHECK(asked(invariant, ConvPass::kDgrad, plain) == "conv_dgrad");
  CHECK(asked(invariant, ConvPass::kWgrad, plain) == "conv_wgrad");
  CHECK(clock.own_asked + clock.other_asked == 0);
  CHECK(invariant.choice.table().choices.empty());
}

TEST_CASE("conv_choice: E4M3 is declined by either side, untimed", "[conv_choice]") {
  Clock clock;
  Chooser chooser(timed_by(clock));
  ConvDesc d = normalised({2, 8, 8, 16, 16});
  d.e4m3 = true;
  ConvSlots s;
  s.x = s.filter = s.scale_shift = s.bias = {0};
  CHECK_FALSE(chooser.conv_forward(d, s, {1}, {}));
  CHECK_FALSE(chooser.conv_dgrad(d, s, {0}, {1}, Write::kOverwrite));
  CHECK_FALSE(chooser.conv_wgrad(d, s, {0}, {1}, Write::kOverwrite));
  CHECK_FALSE(leads_back(chooser.choice, d));
  d = make_desc({2, 8, 8, 32, 16});
  d.e4m3 = true;
  CHECK_FALSE(sums_too(chooser.choice, d));
  CHECK(clock.own_asked + clock.other_asked == 0);
}

// What is timed on either side is the same computation, within slots of the sizes that are given.
// bf16 shows the sizes alone: simt reports an access behind a slot's end.
TEST_CASE("conv_choice: the composite that is timed computes what our call does",
          "[conv_choice][simt]") {
  const auto type = GENERATE(DType::kF32, DType::kBF16);
  const auto backend = make_simt_backend(type);
  StandIn library(type);
  std::vector<Out> outputs;
  std::vector<std::vector<float>> wrote;
  int compared = 0;
  ConvChoiceOptions o = untimed();
  o.budget = std::make_shared<cuda::TuningBudget>(1e9);
  o.timer = [&](const Call& call, const std::vector<size_t>& bytes) {
    Bench bench(*backend);
    for (size_t i = 0; i < bytes.size(); ++i)
      if (type == DType::kF32)
        bench.in(random_values(static_cast<int64_t>(bytes[i] / sizeof(float)), 50 + i));
      else
        bench.in(std::vector<uint8_t>(bytes[i], 0x3C));
    bench.run(call);
    if (type == DType::kBF16) return 1.0;
    const bool ours = std::string(call.op) != "composite";
    if (ours) {
      outputs = call.writes;
      // Behind a norm: not the gradient at z and its sums, which the composite has nowhere.
      if (std::string(call.op) == "conv_dgrad_norm")
        outputs.erase(outputs.begin(), outputs.begin() + 2);
      wrote.clear();
      for (const Out out : outputs) wrote.push_back(bench.get(out));
      return 1.0;
    }
    for (size_t i = 0; i < outputs.size(); ++i, ++compared)
      CHECK(relative_error(bench.get(outputs[i]), wrote[i]) <= 2e-6);
    return 1.0;
  };
  ConvDesc up = normalised({2, 4, 4, 8, 8});
  up.upsample = up.residual = true;
  ConvDesc both = whole({2, 5, 7, 24, 16});
  both.residual = true;
  for (const ConvDesc& d :
       {whole({2, 8, 8, 16, 16}), both, up, biased({3, 8, 8, 8, 16, 3, 3, 2})}) {
    INFO(describe(d));
    ConvChoice choice(*backend, library, o);
    ConvSlots s;
    s.x = s.x2 = s.scale_shift = s.state = s.filter = s.bias = s.sample_bias = s.residual = {0};
    s.shortcut = s.shortcut2 = s.shortcut_filter = s.shortcut_bias = {0};
    if (d.c2 == 0) s.x2 = {};
    if (d.sample_bias_stride == 0) s.sample_bias = {};
    if (!d.residual) s.residual = {};
    if (d.shortcut_c == 0) s.shortcut = s.shortcut2 = s.shortcut_filter = s.shortcut_bias = {};
    compared = 0;
    CHECK(choice.forward(d, s, {1}, {d.statistics ? 2 : -1}));
    CHECK(choice.wgrad(d, s, {1}, {2}, Write::kAccumulate));
    if (type == DType::kBF16 && d.c() >= 32 && d.y().pixels() % 32 == 0) CHECK(sums_too(choice, d));
    CHECK(compared == (type == DType::kBF16 ? 0 : 2 + d.statistics));
    if (d.transform.affine && !d.upsample) {
      compared = 0;
      leads_back(choice, d);
      // The plain gradient within the composite is chosen, and compared, as well.
      CHECK(compared == (type == DType::kBF16 ? 0 : 1 + 3 + (d.c2 > 0)));
    }
    if (d.c2 > 0 || d.transform.any()) continue;
    CHECK(choice.dgrad(d, s, {1}, {2}, Write::kAccumulate));
  }
}

// What is declined is listed as a backend's that fuses nothing; what is taken, as one's that fuses
// all.
TEST_CASE("conv_choice: a network through either choice", "[conv_choice]") {
  UNetConfig config;
  config.sample_height = config.sample_width = 8;
  config.block_out_channels = {32, 64};
  config.down_attention = config.up_attention = {false, true};
  config.layers_per_block = 1;
  config.dropout = 0.1;
  const auto steps_of = [&](Backend& backend) {
    Graph g(backend, Mode::kTraining);
    const Tensor x = g.activation({2, 8, 8, 3});
    const Tensor y =
        build_unet(g, config, 1000, {.sample = x, .timestep = g.tensor({2}, DType::kI32)});
    g.set_grad(y, g.activation(g.shape(y)));
    g.backward();
    std::vector<std::string> steps;
    for (const Step& step : g.steps()) {
      const std::string op = step.call.op;
      // As the two calls it stands for: which images are large enough is not of interest here.
      if (op == "conv_wgrad_sums") steps.push_back(step.scope + " pixel_sum");
      const bool convolution = op.starts_with("conv_") || op == kLibrary;
      steps.push_back(step.scope + " " + (convolution ? "convolution" : op));
    }
    return steps;
  };
  for (const bool own : {false, true}) {
    Clock clock{.own = own ? 1.0 : 2.0, .other = own ? 2.0 : 1.0};
    Chooser chooser(timed_by(clock));
    RecordingBackend other({.fused_convolution = own, .compute_type = DType::kBF16});
    const auto steps = steps_of(chooser);
    CHECK(steps.size() > 100);
    CHECK((steps == steps_of(other)));
  }
}
