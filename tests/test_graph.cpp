// Graphs of every preset on a backend that only records: names and counts of parameters, one arena,
// nothing but device work in a step, and a plan whose tensors never lose their bytes.
#include <catch2/catch.hpp>

#include <algorithm>
#include <map>
#include <set>

#include "engine/executor.h"
#include "engine/ops.h"
#include "engine/parts.h"
#include "model/generator.h"
#include "model/presets.h"
#include "model/trainer.h"
#include "tests/recording_backend.h"

using namespace ddpm;
using test::RecordingBackend;

namespace {

TrainingGraph training_graph(Backend& backend, const Preset& p, int batch) {
  TrainerOptions o;
  o.batch_size = batch;
  UNetConfig unet = p.unet;
  unet.dropout = p.train.dropout;
  return build_training_graph(backend, unet, p.scheduler, o, 64);
}

// Follows which tensor owns each 64-byte line of the arena: a step that reads a tensor must find
// the lines its writer left.
void check_plan(const Graph& g, const Plan& plan, Phase phase = Phase::kStep) {
  const std::vector<Step>& steps = g.steps(phase);
  std::vector<int> owner(plan.bytes / 64, -1);
  const auto lines = [&](const Placement& p, auto&& f) {
    for (size_t i = p.offset / 64; i < (p.offset + p.bytes) / 64; ++i) f(owner.at(i));
  };
  for (size_t s = 0; s < steps.size(); ++s) {
    const Call& call = steps[s].call;
    const Placement& workspace = plan.workspaces[s];
    const int workspace_id = -2 - static_cast<int>(s);
    if (workspace.bytes > 0) lines(workspace, [&](int& o) { o = workspace_id; });
    bool intact = true;
    for (In in : call.reads) {
      if (!in || g.info({in.slot}).kind != TensorKind::kPlanned) continue;
      lines(plan.tensors[static_cast<size_t>(in.slot)], [&](int& o) { intact &= o == in.slot; });
    }
    for (Out out : call.writes) {
      if (!out || g.info({out.slot}).kind != TensorKind::kPlanned) continue;
      lines(plan.tensors[static_cast<size_t>(out.slot)], [&](int& o) { o = out.slot; });
    }
    // Written tensors must not lie over what the step reads or works in.
    for (In in : call.reads) {
      if (!in || g.info({in.slot}).kind != TensorKind::kPlanned) continue;
      lines(plan.tensors[static_cast<size_t>(in.slot)], [&](int& o) { intact &= o == in.slot; });
    }
    if (workspace.bytes > 0) lines(workspace, [&](int& o) { intact &= o == workspace_id; });
    INFO(steps[s].scope << ":" << call.op);
    REQUIRE(intact);
  }
}

}  // namespace

TEST_CASE("graph: parameters of the presets", "[graph]") {
  RecordingBackend backend;
  const std::map<std::string, int64_t> known{
      {"cifar10", 35746307}, {"celebahq256", 113673219}, {"lsun256", 113673219}};
  for (const Preset& p : presets()) {
    const TrainingGraph t = training_graph(backend, p, 2);
    INFO(p.name);
    const auto expected = known.find(p.name);
    if (expected != known.end())
      CHECK(t.graph.params().count() == expected->second);
    else
      CHECK(t.graph.params().count() <= 2'000'000);
    if (p.name == "cifar10") CHECK(t.graph.macs() == 2 * int64_t{6221856768});
    if (p.name == "celebahq256") CHECK(t.graph.macs() == 2 * int64_t{248513757184});
    std::set<std::string> keys;
    for (const CheckpointTensor& c : checkpoint_tensors(t.graph.params())) keys.insert(c.key);
    if (p.name == "cifar10") CHECK(keys.size() == 328);
    if (p.name == "celebahq256") CHECK(keys.size() == 450);
    CHECK(keys.contains("mid_block.attentions.0.to_q.weight"));
    CHECK(keys.contains("up_blocks.0.resnets.1.conv_shortcut.bias"));
    CHECK(keys.contains("mid_block.resnets.1.time_emb_proj.weight"));
  }
}

TEST_CASE("graph: a step is device work with the same arguments every time", "[graph]") {
  for (bool fused : {true, false}) {
    for (const Preset& p : presets()) {
      RecordingBackend backend(
          RecordingBackend::Options{.fused_convolution = fused, .fused_objective = fused});
      TrainingGraph t = training_graph(backend, p, 4);
      ParamStore store(backend, t.graph.params(),
                       {Arena::kWeights, Arena::kGradients, Arena::kM, Arena::kV, Arena::kEma});
      Executor executor(std::move(t.graph), store.arenas());
      backend.take_events();
      executor.step();
      const auto first = backend.take_events();
      executor.step();
      INFO(p.name << (fused ? " fused" : " composed"));
      CHECK(first.size() == executor.graph().steps().size());
      CHECK(backend.take_events() == first);
      const std::set<std::string> host{"allocate", "upload", "download", "fill", "synchronize"};
      CHECK(std::none_of(first.begin(), first.end(),
                         [&](const auto& e) { return host.contains(e.what); }));
      const auto count = [&](const std::string& op) {
        return std::count_if(first.begin(), first.end(),
                             [&](const auto& e) { return e.what == op; });
      };
      // One call draws the batch and its noise, or four; the noise is drawn again for the loss.
      CHECK(count("noisy_batch") == (fused ? 1 : 0));
      CHECK(count("noise_loss") == (fused ? 1 : 0));
      for (const char* op :
           {"gather_images", "draw_timesteps", "draw_noise", "q_sample", "mse_loss"})
        CHECK(count(op) == (fused ? 0 : 1));
      CHECK(count("loss_histogram") == 1);
      // A backend that fuses is never asked to write an activation out, except for q, k and v.
      if (fused) CHECK(count("concat") == 0);
      if (fused && p.name == "cifar10") CHECK(count("group_norm_apply") == 2 * 6);
      // Convolutions give their own statistics; the five attention outputs that are normed do not.
      if (fused && p.name == "cifar10") CHECK(count("channel_stats") == 5);
      // Every convolution behind a norm leads its gradient back through it: two of each of 22
      // residual blocks, and the last. Linear layers do not.
      if (fused && p.name == "cifar10") CHECK(count("conv_dgrad_norm") == 2 * 22 + 1);
      if (!fused) CHECK(count("conv_dgrad_norm") == 0);
      // Biases' gradients need no pass over dy of their own.
      CHECK((count("pixel_sum") == 0) == fused);
      if (!fused) CHECK(count("conv_wgrad_sums") == 0);
    }
  }
}

TEST_CASE("graph: every product knows its multiply-adds", "[graph]") {
  RecordingBackend backend(RecordingBackend::Options{.fused_convolution = false});
  const TrainingGraph t = training_graph(backend, find_preset("cifar10"), 2);
  std::map<std::string, int64_t> macs;
  for (const Step& s : t.graph.steps()) macs[s.call.op] += s.call.macs;
  // By hand from the network: five attentions at 16x16 and one at 4x4, whose backward is 5
  // products, not 2; a gradient of a convolution's input or filter is as many as the convolution,
  // but conv_in's input needs none.
  const int64_t attention = int64_t{2} * 256 * (5 * 256 * 256 + 16 * 16);
  const int64_t conv_in = 2 * 1024 * 9 * 3 * 128;
  CHECK(macs["attention_forward"] == 2 * attention);
  CHECK(macs["attention_backward"] == 5 * attention);
  CHECK(macs["conv_wgrad"] == macs["conv_forward"]);
  CHECK(macs["conv_dgrad"] == macs["conv_forward"] - conv_in);
  // Linear layers: forward, dx, dw; the time embedding's own input needs no gradient.
  const int64_t first_linear = 2 * 128 * 512;
  const int64_t linear = (macs["gemm"] + first_linear) / 3;
  CHECK(macs["conv_forward"] + linear + macs["attention_forward"] == t.graph.macs());
  CHECK(macs["group_norm_backward"] == 0);
}

TEST_CASE("graph: a convolution is n p q k r s c multiply-adds, and its shortcut more", "[graph]") {
  for (bool fused : {true, false}) {
    INFO((fused ? "fused" : "composed"));
    RecordingBackend backend(RecordingBackend::Options{.fused_convolution = fused});
    Graph g(backend, Mode::kTraining);
    const Tensor x = g.activation({2, 9, 7, 3});
    g.set_requires_grad(x, true);
    const Tensor y = ops::conv(g, x, "first", {.k = 5, .stride = 2});
    REQUIRE(g.shape(y) == Shape{2, 5, 4, 5});
    const Tensor z =
        ops::conv(g, y, "second", {.k = 6, .shortcut = y, .shortcut_name = "shortcut"});
    g.set_grad(z, g.activation(g.shape(z)));
    g.backward();
    const int64_t first = 2 * 5 * 4 * 5 * 3 * 3 * 3, second = 2 * 5 * 4 * 6 * 3 * 3 * 5,
                  shortcut = 2 * 5 * 4 * 6 * 5;
    std::map<std::string, std::multiset<int64_t>> macs;
    for (const Step& s : g.steps())
      if (s.call.macs > 0) macs[s.call.op].insert(s.call.macs);
    CHECK(macs["conv_forward"] == (fused ? std::multiset<int64_t>{first, second + shortcut}
                                         : std::multiset<int64_t>{first, second, shortcut}));
    CHECK(macs["conv_wgrad"] == (fused ? std::multiset<int64_t>{shortcut}
                                       : std::multiset<int64_t>{first, second, shortcut}));
    if (fused) CHECK(macs["conv_wgrad_sums"] == std::multiset<int64_t>{first, second});
    CHECK(macs["conv_dgrad"] == std::multiset<int64_t>{first, second, shortcut});
    CHECK(macs.size() == (fused ? 4 : 3));
    CHECK(g.macs() == first + second + shortcut);
  }
}

TEST_CASE("graph: a step's bytes are those of its tensors, each once", "[graph]") {
  RecordingBackend backend;
  Graph g(backend, Mode::kInference);
  const Tensor x = g.tensor({2, 3, 5, 7}), y = g.tensor({2, 3, 5, 7}, DType::kBF16);
  const Tensor images = g.held({100, 3, 5, 7}, DType::kU8, "images");
  const Tensor sum = g.tensor({2, 3, 5, 7});
  g.add({"made up", {x, images, x}, {y, x}, 0, nullptr});
  g.add(backend.copy(210, DType::kF32, x, sum, Write::kAccumulate));
  CHECK(g.bytes_moved(g.steps()[0]) == 210 * (4 + 2));
  CHECK(g.bytes_moved(g.steps()[1]) == 210 * (4 + 4));
}

TEST_CASE("graph: sampling steps are device work too", "[graph]") {
  for (const Preset& p : presets()) {
    RecordingBackend backend;
    SamplingGraph s = build_sampling_graph(backend, p.unet, 1000, 2, 50);
    ParamStore store(backend, s.graph.params(), {Arena::kWeights});
    Executor executor(std::move(s.graph), store.arenas());
    backend.take_events();
    executor.step();
    const auto first = backend.take_events();
    executor.step();
    CHECK(backend.take_events() == first);
    CHECK(first.size() == executor.graph().steps().size());
  }
}

namespace {

std::map<std::string, int> count_ops(const std::vector<Step>& steps) {
  std::map<std::string, int> count;
  for (const Step& s : steps) ++count[s.call.op];
  return count;
}

}  // namespace

TEST_CASE("graph: a sampling step looks its time projections up", "[graph]") {
  for (const Preset& p : presets()) {
    RecordingBackend backend;
    SamplingGraph s = build_sampling_graph(backend, p.unet, 1000, 2, 50);
    auto setup = count_ops(s.graph.steps(Phase::kSetup)), step = count_ops(s.graph.steps());
    INFO(p.name);
    CHECK(setup["time_embedding"] == 1);
    CHECK(setup["gemm"] == 3);
    CHECK(step["step_row"] == 1);
    CHECK(step["time_embedding"] + step["silu"] + step["sampler_timestep"] == 0);
    CHECK(step["gemm"] == 2 * step["attention_forward"]);
    const TrainingGraph training = training_graph(backend, p, 2);
    CHECK(s.graph.macs() < training.graph.macs());
    // For good: the three layers' weights and biases are read by nothing else.
    ParamStore store(backend, s.graph.params(), {Arena::kWeights});
    Executor executor(std::move(s.graph), store.arenas());
    backend.take_events();
    executor.setup_for_good();
    std::set<const void*> discarded;
    for (const auto& e : backend.take_events())
      if (e.what == "discard") discarded.insert(e.pointers[0]);
    CHECK(discarded.size() == 6);
    executor.step();
    for (const auto& e : backend.take_events())
      for (const void* read : e.pointers) CHECK(discarded.count(read) == 0);

    // Images in rows of their own look them up by their timestep.
    const SamplingGraph own = build_sampling_graph(backend, p.unet, 1000, 2, 2000, Pace::kOwn);
    auto mixed = count_ops(own.graph.steps());
    CHECK(own.graph.shape(own.timesteps).count() == 1000);
    CHECK(mixed["sampler_timestep"] == 1);
    CHECK(mixed["embedding"] == 1);
    CHECK(mixed["time_embedding"] + mixed["silu"] + mixed["step_row"] == 0);

    // A class is known with the image only.
    UNetConfig classes = p.unet;
    classes.num_class_embeds = 10;
    const SamplingGraph c = build_sampling_graph(backend, classes, 1000, 2, 50);
    CHECK(c.graph.steps(Phase::kSetup).empty());
    CHECK(!c.timesteps);
    auto with_classes = count_ops(c.graph.steps());
    CHECK(with_classes["time_embedding"] == 1);
    CHECK(with_classes["step_row"] == 0);
    CHECK(with_classes["gemm"] == 2 * with_classes["attention_forward"] + 3);
  }
}

TEST_CASE("graph: what the setup works out is kept for the step, or not found there", "[graph]") {
  RecordingBackend backend;
  for (bool kept : {true, false}) {
    Graph g(backend, Mode::kInference);
    const Tensor x = g.persistent({1, 1, 1, 4}, DType::kF32, "x");
    Tensor y, z;
    {
      const Graph::PhaseScope setup(g, Phase::kSetup);
      y = ops::silu(g, x);
      if (kept) g.keep(y);
    }
    z = ops::silu(g, y);
    CHECK(g.steps(Phase::kSetup).size() == 1);
    CHECK(g.steps().size() == 1);
    if (kept) {
      CHECK_THROWS_AS(g.keep(y), Error);
      CHECK_NOTHROW(Executor(std::move(g), {}));
    } else {
      CHECK_THROWS_WITH(Executor(std::move(g), {}), Catch::Contains("before it is written"));
    }
  }
  Graph g(backend, Mode::kInference);
  const Tensor x = g.persistent({1, 1, 1, 4}, DType::kF32, "x"), y = g.tensor({1, 1, 1, 4});
  g.add(backend.silu(4, x, y), Phase::kSetup);
  g.add(backend.silu(4, x, y));
  CHECK_THROWS_WITH(Executor(std::move(g), {}), Catch::Contains("two phases"));
}

TEST_CASE("plan: close to the bound, and every read finds what was written", "[plan]") {
  for (bool fused : {true, false}) {
    for (const Preset& p : presets()) {
      RecordingBackend backend(RecordingBackend::Options{.fused_convolution = fused});
      for (int batch : {1, 8}) {
        const TrainingGraph t = training_graph(backend, p, batch);
        const Plan plan = make_plan(t.graph.tensors(), t.graph.steps());
        INFO(p.name << " training, batch " << batch << ", " << plan.bytes << " bytes over "
                    << plan.lower_bound);
        CHECK(static_cast<double>(plan.bytes) <= 1.02 * static_cast<double>(plan.lower_bound));
        if (plan.bytes > (size_t{1} << 29)) continue;  // following every line would take seconds
        check_plan(t.graph, plan);
        const SamplingGraph s = build_sampling_graph(backend, p.unet, 1000, batch, 10);
        for (Phase phase : kAllPhases)
          check_plan(s.graph, make_plan(s.graph.tensors(), s.graph.steps(phase)), phase);
      }
    }
  }
}

TEST_CASE("graph: a constant is there from the start, and stays", "[graph]") {
  auto backend = make_cpu_backend({});
  Graph g(*backend, Mode::kInference);
  const std::vector<float> values = {1, 2, 3, 4, 5, 6};
  const Tensor t = g.constant(values, 2, "table");
  CHECK(g.shape(t) == Shape{3, 1, 1, 2});
  CHECK_THROWS_AS(g.constant(values, 4, "ragged"), Error);
  Graph moved = std::move(g);
  Executor executor(std::move(moved), {}, {.poison = true});
  executor.step();
  std::vector<float> held(6);
  executor.download(held.data(), t);
  CHECK(held == values);
}

TEST_CASE("plan: a read before any write is refused", "[plan]") {
  RecordingBackend backend;
  Graph g(backend, Mode::kInference);
  const Tensor x = g.tensor({1, 1, 1, 4}), y = g.tensor({1, 1, 1, 4});
  g.add(backend.silu(4, x, y));
  CHECK_THROWS_WITH(make_plan(g.tensors(), g.steps()), Catch::Contains("before it is written"));
}

namespace {

// Rank 0 of 2 that only notes what is summed, and after how many calls of the backend.
class NotedRanks final : public Communicator {
 public:
  struct Sum {
    const void* data;
    int64_t count;
    size_t calls;
  };
  explicit NotedRanks(const size_t& calls) : calls_(calls) {}
  int rank() const override { return 0; }
  int size() const override { return 2; }
  std::string description() const override { return "noted"; }
  void broadcast(void*, size_t) override {}
  void share(void*, size_t) override {}
  void start_sum(void* data, DType type, int64_t count) override {
    sums.push_back({data, count, calls_});
    types.insert(type);
  }
  void finish_sums() override { finished_at = calls_; }
  void exchange_slices(const float* data, int64_t count, float* const* parts) override {
    exchanged = {data, count, calls_};
    slices.assign(parts, parts + size());
  }
  void gather_slices(const float* slice, float* data, int64_t count) override {
    gathered = {data, count, calls_};
    CHECK(slice == slices[0]);
  }
  void share_in_step(void*, size_t) override {}
  std::optional<CommSeconds> seconds() const override { return {}; }
  void announce_failure(const std::string&) override {}

  std::vector<Sum> sums;
  std::set<DType> types;
  Sum exchanged{}, gathered{};
  std::vector<const float*> slices;
  size_t finished_at = 0;

 private:
  const size_t& calls_;
};

// The sums of one step over ranks, and which call of the step writes which gradient last.
struct SummedStep {
  size_t calls = 0;
  NotedRanks ranks{calls};
  std::vector<std::pair<const void*, size_t>> written;  // by parameter, in the arena's order
  const float* gradients = nullptr;
  int64_t count = 0;

  explicit SummedStep(Parts parts) {
    RecordingBackend backend;
    const Preset& p = find_preset("cifar10");
    TrainerOptions o;
    o.batch_size = 2 * parts.total;
    o.parts = parts;
    o.parts.ranks = &ranks;
    TrainingGraph t = build_training_graph(backend, p.unet, p.scheduler, o, 64);
    count = t.graph.params().arena_size();
    ParamStore store(backend, t.graph.params(),
                     {Arena::kWeights, Arena::kGradients, Arena::kM, Arena::kV, Arena::kEma});
    gradients = static_cast<const float*>(store.arenas()[Arena::kGradients]);
    Executor executor(std::move(t.graph), store.arenas());
    const Graph& g = executor.graph();
    std::map<const void*, size_t> last;
    for (size_t i = 0; i < g.steps().size(); ++i)
      for (Out out : g.steps()[i].call.writes)
        if (out && g.info({out.slot}).arena == Arena::kGradients && g.info({out.slot}).param >= 0)
          last[executor.address({out.slot})] = i;
    written.assign(last.begin(), last.end());
    for (const Step& s : g.steps()) {  // the backend notes no sum
      calls += 1;
      if (s.call.collective) s.call.run(Run{pointers(executor).data(), nullptr, nullptr});
    }
    for (const Step& s : g.steps(Phase::kUpdate))
      if (s.call.collective) s.call.run(Run{pointers(executor).data(), nullptr, nullptr});
  }

 private:
  static std::vector<void*> pointers(const Executor& executor) {
    std::vector<void*> all;
    for (size_t i = 0; i < executor.graph().tensors().size(); ++i)
      all.push_back(executor.address({static_cast<int>(i)}));
    return all;
  }
};

}  // namespace

TEST_CASE("graph: a bucket's sum over ranks begins when its last gradient is written", "[graph]") {
  const SummedStep step(Parts{.total = 2});
  const auto& sums = step.ranks.sums;
  CHECK(sums.size() > 20);  // 35.7 M parameters, by 1 M and the rest of a parameter
  const float* at = step.gradients;
  for (const auto& sum : sums) {
    CHECK(sum.data == at);
    size_t last = 0;
    for (const auto& [gradient, call] : step.written)
      if (gradient >= at && gradient < at + sum.count) last = std::max(last, call);
    // Behind the last writer, and before any other work.
    CHECK(last + 1 < sum.calls);
    CHECK(last + 4 > sum.calls);
    at += sum.count;
  }
  CHECK(at == step.gradients + step.count);
  CHECK(sums.front().calls < sums.back().calls * 3 / 4);
  CHECK(step.ranks.finished_at == step.calls);
  CHECK(step.ranks.types == std::set<DType>{DType::kF32});
  const SummedStep rounded(Parts{.total = 2, .sum_type = DType::kBF16});
  CHECK(rounded.ranks.types == std::set<DType>{DType::kBF16});
  REQUIRE(rounded.ranks.sums.size() == sums.size());
  for (size_t i = 0; i < sums.size(); ++i) {
    CHECK(rounded.ranks.sums[i].count == sums[i].count);
    // Behind a cast for itself and for each bucket that was complete before.
    CHECK(rounded.ranks.sums[i].calls > sums[i].calls);
    CHECK(rounded.ranks.sums[i].calls <= sums[i].calls + 2 * sums.size());
  }
  // With more parts on a rank, or in order, the sum comes after the last part.
  const SummedStep parts(Parts{.total = 4, .own = 2}), ordered(Parts{.total = 2, .in_order = true});
  CHECK(parts.ranks.sums.size() == sums.size());
  for (const auto& sum : parts.ranks.sums) CHECK(sum.calls == parts.calls);
  CHECK(ordered.ranks.sums.empty());
  for (const auto& sum : {ordered.ranks.exchanged, ordered.ranks.gathered}) {
    CHECK(sum.data == ordered.gradients);
    CHECK(sum.count == ordered.count);
    CHECK(sum.calls == ordered.calls);
  }
}

// What a step keeps for its backward pass is the raw outputs and their statistics, never a copy
// behind a norm.
TEST_CASE("graph: the fused bf16 step of cifar10 fits its memory", "[graph]") {
  RecordingBackend::Options o;
  o.compute_type = DType::kBF16;
  RecordingBackend backend(o);
  const TrainingGraph t = training_graph(backend, find_preset("cifar10"), 128);
  const Plan plan = make_plan(t.graph.tensors(), t.graph.steps());
  CHECK(static_cast<double>(plan.bytes) / (1 << 30) < 1.3);  // 1.22; twice that with such copies
}

TEST_CASE("graph: a step in parts is device work with the same arguments every time", "[graph]") {
  RecordingBackend backend;
  const Preset& p = find_preset("tiny");
  TrainerOptions o;
  o.batch_size = 10;
  o.parts = {.total = 5, .own = 5};
  TrainingGraph t = build_training_graph(backend, p.unet, p.scheduler, o, 64);
  ParamStore store(backend, t.graph.params(),
                   {Arena::kWeights, Arena::kGradients, Arena::kM, Arena::kV, Arena::kEma});
  Executor executor(std::move(t.graph), store.arenas());
  backend.take_events();
  executor.step();
  const auto first = backend.take_events();
  executor.step();
  CHECK(backend.take_events() == first);
  const auto count = [&](const std::string& op) {
    return std::count_if(first.begin(), first.end(), [&](const auto& e) { return e.what == op; });
  };
  CHECK(count("end_part") == 5);
  CHECK(count("adam_ema") == 1);
  CHECK(count("noise_loss") == 5);
  CHECK(count("allocate") == 0);
}

TEST_CASE("graph: gradients close in the order of the arena", "[graph]") {
  RecordingBackend backend;
  const TrainingGraph t = training_graph(backend, find_preset("cifar10"), 2);
  const Graph& g = t.graph;
  std::vector<int> last_write(g.params().all().size(), -1);
  for (size_t s = 0; s < g.steps().size(); ++s)
    for (Out out : g.steps()[s].call.writes) {
      if (!out) continue;
      const TensorSpec& info = g.info({out.slot});
      if (info.kind == TensorKind::kArena && info.arena == Arena::kGradients && info.param >= 0)
        last_write[static_cast<size_t>(info.param)] = static_cast<int>(s);
    }
  // Arena order is reverse definition order; a gradient is done at most a few steps after its
  // neighbours, so that buckets of them close one after the other.
  int latest = 0, inversions = 0;
  for (size_t i = last_write.size(); i-- > 0;) {
    REQUIRE(last_write[i] >= 0);
    if (last_write[i] < latest - 12) ++inversions;
    latest = std::max(latest, last_write[i]);
  }
  CHECK(inversions == 0);
}
