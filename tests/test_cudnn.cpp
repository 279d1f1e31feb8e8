// Convolutions by cuDNN, planned for a GPU that is described instead of there: every convolution of
// the presets has an engine; graphs, workspace and passes are right, computed by the reference in
// the engines' place; choices survive a restart. What an engine computes, only a GPU can tell.
#include <catch2/catch.hpp>

#include <dlfcn.h>

#include <nlohmann/json.hpp>

#include "kernels/cuda/cudnn_conv.h"
#include "model/objective.h"
#include "model/presets.h"
#include "tests/cudnn_stand_in.h"
#include "tests/recording_backend.h"
#include "tests/simt/simt_backend.h"
#include "tests/support.h"

using namespace ddpm;
using cuda::ConvVariant;
using cuda::CudnnConvolutions;
using cuda::CudnnConvOptions;
using cuda::CudnnConvPlan;
using cuda::CudnnTarget;
using cuda::PlanTable;
using test::random_values;
using test::relative_error;
using test::to_double;

namespace {

const std::string kH100 =
    R"({"deviceName":"NVIDIA H100 80GB HBM3","deviceVer":900,"driverVer":13000,)"
    R"("multiProcessorCount":132,"maxGridSize":[2147483647,65535,65535],)"
    R"("maxBlockSize":[1024,1024,64],"cudaDeviceId":0,"pciDeviceId":0,"isTccDriver":0,)"
    R"("l2CacheSize":52428800,"maxCtasPerSM":32,"maxRegistersPerSM":65536,"regsPerBlock":65536,)"
    R"("maxSharedMemoryPerBlock":49152,"maxSharedMemoryPerBlockOptin":232448,)"
    R"("reservedSharedMemoryPerBlock":1024,"maxThreadsPerBlock":1024,"maxThreadsPerSM":2048,)"
    R"("memClockRateKHz":2619000,"smClockRateKHz":1980000,"supportCoopLaunch":1,)"
    R"("totalGlobalMem":85000000000,"warpSize":32})";

CudnnConvOptions options(DType type) {
  return {.compute_type = type, .exact_fp32 = type == DType::kF32, .device = "H100"};
}

// Engines that are compiled at run time look for the driver's library. A machine without one has
// the toolkit's stub of it, which has the same name.
bool load_driver() {
  static const bool loaded = dlopen("libcuda.so.1", RTLD_NOW | RTLD_GLOBAL) != nullptr ||
                             dlopen(DDPM_CUDA_DRIVER_STUB, RTLD_NOW | RTLD_GLOBAL) != nullptr;
  return loaded;
}

// ---- the presets' convolutions ----

struct Convolution {
  ConvPass pass;
  ConvDesc desc;
};

// Notes what a network asks of a backend that fuses nothing before the taps.
class CollectingBackend final : public test::RecordingBackend {
 public:
  explicit CollectingBackend(DType type)
      : RecordingBackend({.fused_convolution = false, .compute_type = type}) {}

  std::optional<Call> conv_forward(const ConvDesc& d, const ConvSlots& s, Out y,
                                   Out stats) override {
    auto call = RecordingBackend::conv_forward(d, s, y, stats);
    if (call) found.push_back({ConvPass::kForward, d});
    return call;
  }
  std::optional<Call> conv_dgrad(const ConvDesc& d, const ConvSlots& s, In dy, Out dx,
                                 Write w) override {
    found.push_back({ConvPass::kDgrad, d});
    return RecordingBackend::conv_dgrad(d, s, dy, dx, w);
  }
  std::optional<Call> conv_wgrad(const ConvDesc& d, const ConvSlots& s, In dy, Out dfilter,
                                 Write w) override {
    auto call = RecordingBackend::conv_wgrad(d, s, dy, dfilter, w);
    if (call) found.push_back({ConvPass::kWgrad, d});
    return call;
  }

  std::vector<Convolution> found;
};

std::vector<Convolution> convolutions(const std::string& preset, DType type) {
  const Preset& p = find_preset(preset);
  CollectingBackend backend(type);
  Graph g(backend, Mode::kTraining);
  const int n = p.train.batch_size;
  const Shape s{n, p.unet.sample_height, p.unet.sample_width, p.unet.in_channels};
  TrainingBatch batch;
  batch.x0 = g.persistent(s, DType::kF32, "x0");
  batch.noise = g.persistent(s, DType::kF32, "noise");
  batch.timestep = g.persistent({1, 1, 1, n}, DType::kI32, "timestep");
  add_objective(g, p.unet, p.scheduler, {}, batch);
  return backend.found;
}

Call prepare(CudnnConvolutions& conv, const Convolution& c, Write write = Write::kOverwrite) {
  ConvSlots s;
  s.x = {0};
  s.filter = {1};
  std::optional<Call> call;
  if (c.pass == ConvPass::kForward) {
    if (c.desc.bias) s.bias = {3};
    if (c.desc.sample_bias_stride > 0) s.sample_bias = {4};
    if (c.desc.residual) s.residual = {5};
    call = conv.forward(c.desc, s, {2});
  } else if (c.pass == ConvPass::kDgrad) {
    call = conv.dgrad(c.desc, s, {2}, {0}, write);
  } else {
    call = conv.wgrad(c.desc, s, {2}, {1}, write);
  }
  REQUIRE(call.has_value());
  return std::move(*call);
}

void check_preset(const std::string& preset, DType type, size_t at_least) {
  CudnnConvolutions conv(CudnnTarget::described(kH100), options(type));
  for (const Convolution& c : convolutions(preset, type)) {
    const Call call = prepare(conv, c);
    // Scratch for a result in another type is at most the largest filter's.
    CHECK(call.workspace <= (size_t{1} << 30) + (size_t{64} << 20));
  }
  CHECK(conv.table().choices.size() >= at_least);
  CHECK(conv.replaced() == 0);
}

}  // namespace

TEST_CASE("cudnn.presets: tiny has an engine for every convolution and pass", "[cudnn]") {
  check_preset("tiny", DType::kBF16, 30);
  check_preset("tiny", DType::kF32, 30);
}
TEST_CASE("cudnn.presets: cifar10 has an engine for every convolution and pass", "[cudnn]") {
  check_preset("cifar10", DType::kBF16, 60);
  check_preset("cifar10", DType::kF32, 60);
}
TEST_CASE("cudnn.presets: celebahq256 in bf16", "[cudnn]") {
  check_preset("celebahq256", DType::kBF16, 100);
}
TEST_CASE("cudnn.presets: celebahq256 in fp32", "[cudnn]") {
  check_preset("celebahq256", DType::kF32, 100);
}
TEST_CASE("cudnn.presets: cifar10's forward pass at batches of sampling", "[cudnn]") {
  CudnnConvolutions conv(CudnnTarget::described(kH100), options(DType::kBF16));
  for (Convolution c : convolutions("cifar10", DType::kBF16)) {
    if (c.pass != ConvPass::kForward) continue;
    for (const int n : {1, 64, 256}) {
      c.desc.x.n = n;
      CHECK(prepare(conv, c).workspace <= size_t{1} << 30);
    }
  }
  CHECK(conv.table().choices.size() >= 60);
}

// ---- graphs and what surrounds them ----

namespace {

ConvDesc make_desc(const Shape& x, int k, int kernel = 3, int stride = 1, int before = 1,
                   int after = 1) {
  ConvDesc d;
  d.x = x;
  d.k = k;
  d.r = d.s = kernel;
  d.stride = stride;
  d.pad_top = d.pad_left = before;
  d.pad_bottom = d.pad_right = after;
  return d;
}

const std::vector<ConvDesc> kDescs = {
    make_desc({2, 8, 8, 16}, 24),
    make_desc({2, 8, 8, 3}, 16),
    make_desc({2, 8, 8, 16}, 3),
    make_desc({2, 8, 8, 16}, 16, 3, 2, 0, 1),
    make_desc({1, 7, 5, 8}, 8, 3, 2),
    make_desc({3, 4, 4, 32}, 8, 1, 1, 0, 0),
    make_desc({1, 1, 1, 8}, 8),
    make_desc({1, 5, 9, 7}, 13),
    make_desc({2, 6, 6, 8}, 16, 5, 1, 2, 2),
};

// Relative L2 error: the stand-in sums in double, passes of ours in fp32; and as many roundings to
// the compute type as the result has, each within 2^-8 of an element.
double tolerance(DType type, int roundings) {
  return type == DType::kBF16 ? roundings * 0x1p-8 + 1e-6 : 1e-6;
}

struct ConvData {
  std::vector<float> x, filter, bias, sample_bias, residual, dy;
  ConvData(const Backend& backend, const ConvDesc& d)
      : x(test::rounded(backend, random_values(d.x.count(), 11))),
        filter(test::rounded(backend, random_values(d.filter().count(), 12))),
        bias(random_values(d.bias ? d.k : 0, 13)),
        sample_bias(random_values(int64_t{d.x.n} * d.sample_bias_stride, 14)),
        residual(test::rounded(backend, random_values(d.residual ? d.y().count() : 0, 15))),
        dy(test::rounded(backend, random_values(d.y().count(), 16))) {}
  ref::ConvTensors reference() const {
    return {.x = to_double(x),
            .filter = to_double(filter),
            .bias = to_double(bias),
            .sample_bias = to_double(sample_bias),
            .residual = to_double(residual)};
  }
};

void check_forward(CudnnConvolutions& conv, Backend& backend, const ConvDesc& d, int roundings) {
  const ConvData t(backend, d);
  test::Bench bench(backend);
  ConvSlots s;
  s.x = bench.activation(t.x);
  s.filter = bench.activation(t.filter);
  if (d.bias) s.bias = bench.in(t.bias);
  if (d.sample_bias_stride > 0) s.sample_bias = bench.in(t.sample_bias);
  if (d.residual) s.residual = bench.activation(t.residual);
  const Out y = bench.activation_out(d.y().count());
  const auto call = conv.forward(d, s, y);
  REQUIRE(call.has_value());
  CHECK(call->reads.size() == 2u + d.bias + d.residual + (d.sample_bias_stride > 0));
  bench.run(*call);
  INFO("forward " << to_string(d.x) << " k " << d.k << " bias " << d.bias << " residual "
                  << d.residual << " sample bias " << d.sample_bias_stride);
  CHECK(relative_error(bench.get_activation(y), ref::conv_forward(d, t.reference())) <=
        tolerance(backend.compute_type(), roundings));
}

std::vector<double> plus(std::vector<double> a, const std::vector<float>& b, Write write) {
  if (write == Write::kAccumulate)
    for (size_t i = 0; i < a.size(); ++i) a[i] += static_cast<double>(b[i]);
  return a;
}

void check_wgrad(CudnnConvolutions& conv, Backend& backend, const ConvDesc& d, Write write,
                 int roundings) {
  const ConvData t(backend, d);
  const auto before = random_values(d.filter().count(), 18);
  test::Bench bench(backend);
  ConvSlots s;
  s.x = bench.activation(t.x);
  const In dy = bench.activation(t.dy);
  const Out df = write == Write::kAccumulate ? bench.inout(before) : bench.out(d.filter().count());
  bench.run(*conv.wgrad(d, s, dy, df, write));
  INFO("wgrad " << to_string(d.x) << " k " << d.k);
  CHECK(relative_error(bench.get(df),
                       plus(ref::conv_wgrad(d, to_double(t.x), to_double(t.dy)), before, write)) <=
        tolerance(roundings > 0 ? DType::kBF16 : DType::kF32, roundings));
}

void check_dgrad(CudnnConvolutions& conv, Backend& backend, const ConvDesc& d, Write write) {
  const ConvData t(backend, d);
  const bool add = write == Write::kAccumulate;
  const auto before = test::rounded(backend, random_values(d.x.count(), 17));
  test::Bench bench(backend);
  ConvSlots s;
  s.filter = bench.activation(t.filter);
  const In dy = bench.activation(t.dy);
  const Out dx = add ? bench.activation_inout(before) : bench.activation_out(d.x.count());
  bench.run(*conv.dgrad(d, s, dy, dx, write));
  INFO("dgrad " << to_string(d.x) << " k " << d.k);
  CHECK(relative_error(bench.get_activation(dx),
                       plus(ref::conv_dgrad(d, to_double(t.filter), to_double(t.dy)), before,
                            write)) <= tolerance(backend.compute_type(), add ? 2 : 1));
}

ConvDesc with_addends(ConvDesc d, int addends) {
  d.bias = addends & 1;
  d.residual = addends & 2;
  d.sample_bias_stride = addends & 4 ? 2 * d.k + 3 : 0;
  d.sample_bias_offset = addends & 4 ? d.k + 1 : 0;
  return d;
}

}  // namespace

TEST_CASE("cudnn.conv: graphs, scratch and passes give the reference's result", "[cudnn]") {
  for (const DType type : {DType::kF32, DType::kBF16}) {
    const auto backend = test::make_simt_backend(type);
    CudnnConvolutions conv(CudnnTarget::described(kH100, test::interpret_cudnn), options(type));
    for (const ConvDesc& d : kDescs) {
      // A pass of ours rounds once more; the epilogue's bias is rounded beforehand.
      for (int addends = 0; addends < 8; ++addends)
        check_forward(conv, *backend, with_addends(d, addends), 2);
      for (const Write write : {Write::kOverwrite, Write::kAccumulate}) {
        check_dgrad(conv, *backend, d, write);
        check_wgrad(conv, *backend, d, write, type == DType::kBF16 ? 1 : 0);
      }
    }
  }
}

TEST_CASE("cudnn.conv: engines compiled at run time take every addend", "[cudnn]") {
  REQUIRE(load_driver());
  const DType type = DType::kBF16;
  const auto backend = test::make_simt_backend(type);
  const auto target = CudnnTarget::described(kH100, test::interpret_cudnn);
  const ConvDesc desc = with_addends(make_desc({2, 8, 8, 64}, 64), 7);
  // Of several candidates, the last fuses all: it becomes the table's choice.
  CudnnConvOptions o = options(type);
  CudnnConvolutions chooser(target, o);
  prepare(chooser, {ConvPass::kForward, desc});
  prepare(chooser, {ConvPass::kWgrad, desc});
  PlanTable table = chooser.table();
  for (auto& [key, choice] : table.choices) {
    const bool forward = key.starts_with("conv_forward");
    const auto plans = chooser.plans(forward ? ConvPass::kForward : ConvPass::kWgrad,
                                     forward ? desc : with_addends(desc, 0), 2);
    REQUIRE(plans.size() == 2);
    CHECK(plans[0].variant == ConvVariant::kPlain);
    CHECK_FALSE(plans[0].notes.runtime_compiled);
    CHECK(plans[1].variant == ConvVariant::kFused);
    CHECK(plans[1].notes.runtime_compiled);
    choice = {cuda::name_of(plans[1].variant), plans[1].engine};
  }
  CudnnConvolutions conv(target, o);
  conv.use(table);
  check_forward(conv, *backend, desc, 1);  // one rounding in all
  for (const Write write : {Write::kOverwrite, Write::kAccumulate})
    check_wgrad(conv, *backend, desc, write, 0);  // and none
  CHECK(conv.replaced() == 0);
  CHECK((conv.table() == table));
}

TEST_CASE("cudnn.conv: exact fp32 has no engine that rounds more", "[cudnn]") {
  const auto target = CudnnTarget::described(kH100);
  const CudnnConvolutions exact(target, options(DType::kF32));
  const CudnnConvolutions tf32(target, {.compute_type = DType::kF32});
  const ConvDesc d = make_desc({128, 32, 32, 128}, 128);
  for (const ConvPass pass : {ConvPass::kForward, ConvPass::kDgrad, ConvPass::kWgrad}) {
    const auto plans = exact.plans(pass, d, 4);
    CHECK_FALSE(plans.empty());
    for (const CudnnConvPlan& p : plans) {
      CHECK_FALSE(p.notes.tensor_core);
      CHECK_FALSE(p.notes.down_convert_inputs);
      CHECK_FALSE(p.notes.winograd);
      CHECK_FALSE(p.notes.fft);
      CHECK_FALSE(p.notes.nondeterministic);
    }
    CHECK(tf32.plans(pass, d, 1).at(0).notes.tensor_core);
  }
}

TEST_CASE("cudnn.conv: the bias rides in an engine that needs no compiling", "[cudnn]") {
  const CudnnConvolutions conv(CudnnTarget::described(kH100), options(DType::kBF16));
  for (const int addends : {1, 3}) {
    const auto plans = conv.plans(ConvPass::kForward,
                                  with_addends(make_desc({128, 32, 32, 128}, 128), addends), 1);
    REQUIRE(plans.size() == 1);
    CHECK(plans[0].variant == ConvVariant::kEpilogue);
    CHECK(plans[0].notes.tensor_core);
    CHECK_FALSE(plans[0].notes.runtime_compiled);
  }
}

TEST_CASE("cudnn.conv: a limit of workspace is kept", "[cudnn]") {
  const ConvDesc d = make_desc({64, 256, 256, 128}, 128);
  CudnnConvOptions o = options(DType::kF32);
  o.workspace_limit = size_t{1} << 40;
  size_t most = 0;
  const auto target = CudnnTarget::described(kH100);
  for (const CudnnConvPlan& p : CudnnConvolutions(target, o).plans(ConvPass::kForward, d, 4))
    most = std::max(most, p.plan->workspace());
  CHECK(most > size_t{1} << 30);  // there is one to be left out
  o.workspace_limit = 1 << 20;
  const auto plans = CudnnConvolutions(target, o).plans(ConvPass::kForward, d, 4);
  CHECK_FALSE(plans.empty());
  for (const CudnnConvPlan& p : plans) CHECK(p.plan->workspace() <= 1 << 20);
}

TEST_CASE("cudnn.conv: leaves to the caller what it does not take, refuses what means nothing",
          "[cudnn]") {
  CudnnConvolutions conv(CudnnTarget::described(kH100), options(DType::kBF16));
  const ConvDesc plain = make_desc({1, 4, 4, 8}, 8);
  std::vector<ConvDesc> more(5, plain);
  more[0].c2 = 8;
  more[1].transform.silu = true;
  more[2].upsample = true;
  more[3].shortcut_c = 8;
  more[4].statistics = true;
  for (const ConvDesc& d : more) {
    CHECK_FALSE(conv.forward(d, {}, {0}).has_value());
    CHECK_FALSE(conv.dgrad(d, {}, {0}, {1}, Write::kOverwrite).has_value());
    CHECK_FALSE(conv.wgrad(d, {}, {0}, {1}, Write::kOverwrite).has_value());
  }
  ConvSlots s;
  s.x = {0};
  s.filter = {1};
  CHECK_NOTHROW(conv.forward(plain, s, {2}));
  CHECK_THROWS_AS(conv.forward(with_addends(plain, 1), s, {2}), Error);
  CHECK_THROWS_AS(conv.forward(make_desc({0, 4, 4, 8}, 8), s, {2}), Error);
  CHECK_THROWS_AS(conv.forward(make_desc({1, 4, 4, 8}, 8, 7), s, {2}), Error);
  CHECK_THROWS_AS(conv.forward(plain, s, {}), Error);
  CHECK_THROWS_AS(CudnnConvolutions(CudnnTarget::described(kH100),
                                    {.compute_type = DType::kBF16, .exact_fp32 = true}),
                  Error);
}

TEST_CASE("cudnn.target: a device that is only described runs nothing", "[cudnn]") {
  const auto backend = test::make_simt_backend(DType::kBF16);
  CudnnConvolutions conv(CudnnTarget::described(kH100), options(DType::kBF16));
  CHECK_FALSE(CudnnTarget::described(kH100).live());
  CHECK_THROWS_WITH(check_forward(conv, *backend, kDescs[0], 1),
                    Catch::Contains("(2,8,8,16)") && Catch::Contains("not there"));
  for (const char* nonsense : {"", "{", "{\"deviceVer\":\"nine\"}"}) {
    INFO(nonsense);
    try {
      CudnnTarget::described(nonsense);
      FAIL("taken");
    } catch (const Error& e) {
      CHECK(e.status() == Status::kDevice);
      CHECK_THAT(e.what(), Catch::Contains("CUDNN_STATUS"));
    }
  }
}

// ---- the table of choices ----

namespace {

PlanTable through_text(const PlanTable& table) {
  return cuda::plan_table_from_json(nlohmann::json::parse(cuda::to_json(table).dump()), "m.json");
}

const Convolution kAsked[] = {
    {ConvPass::kForward, with_addends(make_desc({128, 16, 16, 256}, 256), 3)},
    {ConvPass::kForward, with_addends(make_desc({128, 16, 16, 256}, 256), 5)},
    {ConvPass::kDgrad, make_desc({128, 16, 16, 256}, 256)},
    {ConvPass::kWgrad, make_desc({128, 16, 16, 256}, 256)},
};

}  // namespace

TEST_CASE("cudnn.table: a second start makes the first one's choices", "[cudnn]") {
  const auto target = CudnnTarget::described(kH100);
  CudnnConvOptions o = options(DType::kBF16);
  CudnnConvolutions first(target, o);
  for (const Convolution& c : kAsked) prepare(first, c);
  REQUIRE(first.table().choices.size() == 4);
  CHECK((through_text(first.table()) == first.table()));

  // A choice that would not be made again unasked.
  PlanTable table = through_text(first.table());
  for (auto& [key, choice] : table.choices)
    if (key.starts_with("conv_dgrad"))
      choice.engine = first.plans(ConvPass::kDgrad, kAsked[2].desc, 2).at(1).engine;
  REQUIRE_FALSE((table == first.table()));
  CudnnConvolutions again(target, o);
  again.use(table);
  for (const Convolution& c : kAsked) prepare(again, c);
  CHECK((again.table() == table));
  CHECK(again.replaced() == 0);
}

TEST_CASE("cudnn.table: choices that cannot be used are made anew and counted", "[cudnn]") {
  const auto target = CudnnTarget::described(kH100);
  CudnnConvOptions o = options(DType::kBF16);
  CudnnConvolutions first(target, o);
  for (const Convolution& c : kAsked) prepare(first, c);
  const auto replaced = [&](const PlanTable& table) {
    CudnnConvolutions next(target, o);
    next.use(table);
    for (const Convolution& c : kAsked) prepare(next, c);
    CHECK((next.table() == first.table()));
    return next.replaced();
  };
  CHECK(replaced({}) == 0);
  CHECK(replaced(first.table()) == 0);
  PlanTable other = first.table();
  CHECK_THAT(other.library, Catch::StartsWith("cuDNN 9.") && Catch::EndsWith(", H100"));
  other.library = "cuDNN 8.0.0, H100";
  CHECK(replaced(other) == 4);
  other = first.table();
  for (auto& [key, choice] : other.choices) choice.engine.id = 12345;
  CHECK(replaced(other) == 4);
  other = first.table();
  other.choices.begin()->second.engine.knobs = {{2, 1 << 20}};
  CHECK(replaced(other) == 1);
  other.choices.begin()->second.engine.knobs = {{60000, 1}};
  CHECK(replaced(other) == 1);
  other = first.table();
  other.choices.begin()->second.variant = "no such";
  CHECK(replaced(other) == 1);
}

TEST_CASE("cudnn.table: a damaged table is refused, naming the place", "[cudnn]") {
  const std::string good =
      R"({"library":"l","plans":{"a":{"variant":"plain","engine":3,"knobs":[[1,2],[3,-4]]}}})";
  const PlanTable table = cuda::plan_table_from_json(nlohmann::json::parse(good), "m.json");
  CHECK(table.choices.at("a").engine.id == 3);
  CHECK((table.choices.at("a").engine.knobs ==
         std::vector<std::pair<int, int64_t>>{{1, 2}, {3, -4}}));
  for (const auto& [text, place] : std::vector<std::pair<std::string, std::string>>{
           {"[]", "library"},
           {R"({"library":1,"plans":{}})", "library"},
           {R"({"library":"l"})", "plans"},
           {R"({"library":"l","plans":[]})", "plans"},
           {R"({"library":"l","plans":{"a":1}})", "a"},
           {R"({"library":"l","plans":{"a":{"variant":1}}})", "a.variant"},
           {R"({"library":"l","plans":{"a":{"variant":"p","engine":-1,"knobs":[]}}})", "a.engine"},
           {R"({"library":"l","plans":{"a":{"variant":"p","engine":"1","knobs":[]}}})", "a.engine"},
           {R"({"library":"l","plans":{"a":{"variant":"p","engine":1,"knobs":[[1]]}}})", "a.knobs"},
           {R"({"library":"l","plans":{"a":{"variant":"p","engine":1,"knobs":{}}}})", "a.knobs"},
       }) {
    INFO(text);
    try {
      cuda::plan_table_from_json(nlohmann::json::parse(text), "m.json");
      FAIL("taken");
    } catch (const Error& e) {
      CHECK(e.status() == Status::kConfig);
      CHECK_THAT(e.what(), Catch::Contains("m.json") && Catch::Contains(place));
    }
  }
}
