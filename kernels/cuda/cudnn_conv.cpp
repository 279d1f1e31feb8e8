#include "kernels/cuda/cudnn_conv.h"

#include <algorithm>
#include <array>

#include "kernels/cuda/bias.h"
#include "kernels/cuda/call_timer.h"
#include "kernels/error.h"

namespace ddpm::cuda {
namespace {

constexpr ConvVariant kVariants[] = {ConvVariant::kPlain, ConvVariant::kEpilogue,
                                     ConvVariant::kFused};

constexpr const char* kPasses[] = {"conv_forward", "conv_dgrad", "conv_wgrad"};

void check(const ConvDesc& d, const char* op) {
  DDPM_CHECK(d.x.positive() && d.c2 >= 0 && d.k > 0, "%s: x %s, c2 %d, k %d", op,
             to_string(d.x).c_str(), d.c2, d.k);
  DDPM_CHECK(d.r > 0 && d.s > 0 && d.stride > 0 && d.pad_top >= 0 && d.pad_left >= 0 &&
                 d.pad_bottom >= 0 && d.pad_right >= 0,
             "%s: filter %dx%d, stride %d, pads %d %d %d %d", op, d.r, d.s, d.stride, d.pad_top,
             d.pad_left, d.pad_bottom, d.pad_right);
  DDPM_CHECK(
      d.in_h() + d.pad_top + d.pad_bottom >= d.r && d.in_w() + d.pad_left + d.pad_right >= d.s,
      "%s: a %dx%d filter does not fit %s", op, d.r, d.s, to_string(d.x).c_str());
  DDPM_CHECK(d.sample_bias_stride == 0 ||
                 (d.sample_bias_offset >= 0 && d.sample_bias_offset + d.k <= d.sample_bias_stride),
             "%s: sample bias %d + %d of stride %d", op, d.sample_bias_offset, d.k,
             d.sample_bias_stride);
}

// What is taken at all. Statistics and everything before the taps are composed outside.
bool takes(const ConvDesc& d) {
  return d.c2 == 0 && !d.transform.any() && !d.upsample && d.shortcut_c == 0 &&
         d.shortcut_c2 == 0 && !d.statistics;
}

// A gradient knows nothing of what was added to the result.
ConvDesc taps(ConvDesc d) {
  d.bias = d.residual = false;
  d.sample_bias_stride = d.sample_bias_offset = 0;
  return d;
}

int sample_bias_alignment(const ConvDesc& d) {
  return d.sample_bias_stride % 4 == 0 && d.sample_bias_offset % 4 == 0 ? 16 : 4;
}

// The ways to compute a pass, the one to be preferred first.
std::vector<ConvVariant> variants(ConvPass pass, const ConvDesc& d, DType type) {
  if (pass == ConvPass::kWgrad && type == DType::kBF16)
    return {ConvVariant::kPlain, ConvVariant::kFused};
  if (pass != ConvPass::kForward) return {ConvVariant::kPlain};
  if (d.sample_bias_stride > 0) return {ConvVariant::kPlain, ConvVariant::kFused};
  if (d.bias) return {ConvVariant::kEpilogue, ConvVariant::kPlain, ConvVariant::kFused};
  if (d.residual) return {ConvVariant::kPlain, ConvVariant::kFused};
  return {ConvVariant::kPlain};
}

// What is added to a forward result, in fp32 between the operations; the last one writes y.
void build_addends(CudnnGraph& g, const ConvDesc& d, ConvVariant variant, DType type,
                   ConvTensorIds& ids) {
  const bool fused = variant == ConvVariant::kFused;
  std::vector<int> addends;
  const auto residual = [&] {
    if (d.residual) addends.push_back(ids.residual = g.tensor(d.y(), type));
  };
  DDPM_CHECK(d.bias || d.residual || d.sample_bias_stride > 0, "%s: nothing is added",
             name_of(variant));
  if (!fused) residual();  // engines that are compiled already know this order alone
  if (d.bias) addends.push_back(ids.bias = g.tensor({1, 1, 1, d.k}, fused ? DType::kF32 : type));
  if (d.sample_bias_stride > 0)
    addends.push_back(ids.sample_bias = g.rows(d.x.n, d.k, DType::kF32, d.sample_bias_stride,
                                               sample_bias_alignment(d)));
  if (fused) residual();

  int sum = g.tensor(d.y(), DType::kF32, true);
  g.convolution(ConvPass::kForward, d, ids.x, ids.filter, sum);
  for (size_t i = 0; i < addends.size(); ++i) {
    const bool last = i + 1 == addends.size();
    const int next = last ? g.tensor(d.y(), type) : g.tensor(d.y(), DType::kF32, true);
    g.add(sum, addends[i], next);
    sum = next;
  }
  ids.y = sum;
}

ConvTensorIds build(CudnnGraph& g, ConvPass pass, const ConvDesc& d, ConvVariant variant,
                    DType type) {
  ConvTensorIds ids;
  ids.x = g.tensor(d.x, type);
  const bool wide_gradient = pass == ConvPass::kWgrad && variant == ConvVariant::kFused;
  if (pass == ConvPass::kForward && variant != ConvVariant::kPlain) {
    ids.filter = g.tensor(d.filter(), type);
    build_addends(g, d, variant, type, ids);
  } else if (wide_gradient) {
    ids.y = g.tensor(d.y(), type);
    const int accumulators = g.tensor(d.filter(), DType::kF32, true);
    g.convolution(pass, d, ids.x, accumulators, ids.y);
    ids.filter = g.tensor(d.filter(), DType::kF32);
    g.identity(accumulators, ids.filter);
  } else {
    ids.filter = g.tensor(d.filter(), type);
    ids.y = g.tensor(d.y(), type);
    g.convolution(pass, d, ids.x, ids.filter, ids.y);
  }
  g.finish();
  return ids;
}

// ---- calls ----

constexpr size_t kAlignment = 256;  // of parts of the workspace

// Parts of a Call's workspace; the last is the engine's own.
class Workspace {
 public:
  size_t take(size_t bytes) {
    const size_t at = used_;
    used_ += (bytes + kAlignment - 1) / kAlignment * kAlignment;
    return at;
  }
  // A Call's workspace is aligned to less.
  size_t bytes() const { return used_ > 0 ? used_ + kAlignment : 0; }
  static char* base(const Run& r) {
    const auto address = reinterpret_cast<uintptr_t>(r.workspace);
    return reinterpret_cast<char*>((address + kAlignment - 1) / kAlignment * kAlignment);
  }

 private:
  size_t used_ = 0;
};

// Runs a plan on the tensors that its graph has.
struct ConvPointers {
  const void *x = nullptr, *filter = nullptr, *y = nullptr;
  const void *bias = nullptr, *sample_bias = nullptr, *residual = nullptr;
};
void run(const CudnnConvPlan& c, const ConvPointers& p, const Run& r, size_t engine_part) {
  constexpr int kMost = 16;  // tensors of a graph
  std::array<void*, kMost> pointers{};
  const auto put = [&](int id, const void* pointer) {
    if (id >= 0) pointers.at(static_cast<size_t>(id)) = const_cast<void*>(pointer);
  };
  put(c.ids.x, p.x);
  put(c.ids.filter, p.filter);
  put(c.ids.y, p.y);
  put(c.ids.bias, p.bias);
  put(c.ids.sample_bias, p.sample_bias);
  put(c.ids.residual, p.residual);
  c.plan->run(r.stream, pointers, Workspace::base(r) + engine_part);
}

std::vector<In> present(std::initializer_list<In> slots) {
  std::vector<In> v(slots);
  std::erase_if(v, [](In s) { return !s; });
  return v;
}

Call forward_call(const CudnnConvPlan& c, const ConvDesc& d, DType type, const ConvSlots& s,
                  Out y) {
  Workspace parts;
  const bool narrow_bias = c.variant == ConvVariant::kEpilogue && d.bias && type != DType::kF32;
  const size_t bias_part = parts.take(narrow_bias ? size_of(type) * static_cast<size_t>(d.k) : 0);
  const size_t engine_part = parts.take(c.plan->workspace());
  const bool pass =
      c.variant == ConvVariant::kPlain && (d.bias || d.residual || d.sample_bias_stride > 0);
  const BiasPass epilogue{d.y(), type, d.sample_bias_stride, d.sample_bias_offset};
  check(epilogue);
  return {"conv_forward",
          present({s.x, s.filter, s.bias, s.sample_bias, s.residual}),
          {y},
          parts.bytes(),
          [=](const Run& r) {
            ConvPointers p{r.in<void>(s.x), r.in<void>(s.filter), r.out<void>(y)};
            p.bias = r.in<float>(s.bias);
            p.residual = r.in<void>(s.residual);
            if (s.sample_bias) p.sample_bias = r.in<float>(s.sample_bias) + d.sample_bias_offset;
            if (narrow_bias) {
              void* narrow = Workspace::base(r) + bias_part;
              convert(r.stream, d.k, DType::kF32, p.bias, type, narrow, Write::kOverwrite);
              p.bias = narrow;
            }
            run(c, p, r, engine_part);
            if (pass)
              add_bias(epilogue, r.stream, r.out<void>(y), r.in<float>(s.bias),
                       r.in<float>(s.sample_bias), p.residual);
          }};
}

Call dgrad_call(const CudnnConvPlan& c, const ConvDesc& d, DType type, const ConvSlots& s, In dy,
                Out dx, Write write) {
  const bool accumulate = write == Write::kAccumulate;
  Workspace parts;
  const size_t count = static_cast<size_t>(d.x.count());
  const size_t sum_part = parts.take(accumulate ? size_of(type) * count : 0);
  const size_t engine_part = parts.take(c.plan->workspace());
  return {"conv_dgrad", {s.filter, dy}, {dx}, parts.bytes(), [=](const Run& r) {
            void* target = accumulate ? Workspace::base(r) + sum_part : r.out<void>(dx);
            run(c, {target, r.in<void>(s.filter), r.in<void>(dy)}, r, engine_part);
            if (accumulate)
              convert(r.stream, static_cast<int64_t>(count), type, target, type, r.out<void>(dx),
                      write);
          }};
}

Call wgrad_call(const CudnnConvPlan& c, const ConvDesc& d, DType type, const ConvSlots& s, In dy,
                Out dfilter, Write write) {
  const DType result = c.variant == ConvVariant::kFused ? DType::kF32 : type;
  const bool direct = result == DType::kF32 && write == Write::kOverwrite;
  Workspace parts;
  const size_t count = static_cast<size_t>(d.filter().count());
  const size_t result_part = parts.take(direct ? 0 : size_of(result) * count);
  const size_t engine_part = parts.take(c.plan->workspace());
  return {"conv_wgrad", {s.x, dy}, {dfilter}, parts.bytes(), [=](const Run& r) {
            void* target = direct ? r.out<void>(dfilter) : Workspace::base(r) + result_part;
            run(c, {r.in<void>(s.x), target, r.in<void>(dy)}, r, engine_part);
            if (!direct)
              convert(r.stream, static_cast<int64_t>(count), result, target, DType::kF32,
                      r.out<void>(dfilter), write);
          }};
}

}  // namespace

const char* name_of(ConvVariant v) {
  constexpr const char* kNames[] = {"plain", "epilogue", "fused"};
  return kNames[static_cast<size_t>(v)];
}

CudnnConvolutions::CudnnConvolutions(CudnnTarget target, CudnnConvOptions options)
    : target_(std::move(target)), options_(std::move(options)) {
  DDPM_CHECK(options_.compute_type == DType::kF32 || options_.compute_type == DType::kBF16,
             "convolutions in %s", ddpm::name_of(options_.compute_type));
  DDPM_CHECK(!options_.exact_fp32 || options_.compute_type == DType::kF32,
             "exact fp32 convolutions in %s", ddpm::name_of(options_.compute_type));
  table_.library = "cuDNN " + cudnn_version() + ", " + options_.device;
}

void CudnnConvolutions::use(PlanTable given) {
  given_ = std::move(given);
  replaced_ = 0;
}

std::optional<Call> CudnnConvolutions::forward(const ConvDesc& d, const ConvSlots& s, Out y) {
  check(d, "conv_forward");
  if (!takes(d)) return std::nullopt;
  DDPM_CHECK(s.x && s.filter && y, "conv_forward %s: x, filter and y must be present",
             to_string(d.x).c_str());
  DDPM_CHECK(d.bias == static_cast<bool>(s.bias) && d.residual == static_cast<bool>(s.residual) &&
                 (d.sample_bias_stride > 0) == static_cast<bool>(s.sample_bias),
             "conv_forward %s: biases and residual must be present as the desc says",
             to_string(d.x).c_str());
  return forward_call(choose(ConvPass::kForward, d), d, options_.compute_type, s, y);
}

std::optional<Call> CudnnConvolutions::dgrad(const ConvDesc& d, const ConvSlots& s, In dy, Out dx,
                                             Write write) {
  check(d, "conv_dgrad");
  if (!takes(d)) return std::nullopt;
  DDPM_CHECK(s.filter && dy && dx, "conv_dgrad %s: filter, dy and dx must be present",
             to_string(d.x).c_str());
  const ConvDesc t = taps(d);
  return dgrad_call(choose(ConvPass::kDgrad, t), t, options_.compute_type, s, dy, dx, write);
}

std::optional<Call> CudnnConvolutions::wgrad(const ConvDesc& d, const ConvSlots& s, In dy,
                                             Out dfilter, Write write) {
  check(d, "conv_wgrad");
  if (!takes(d)) return std::nullopt;
  DDPM_CHECK(s.x && dy && dfilter, "conv_wgrad %s: x, dy and dfilter must be present",
             to_string(d.x).c_str());
  const ConvDesc t = taps(d);
  return wgrad_call(choose(ConvPass::kWgrad, t), t, options_.compute_type, s, dy, dfilter, write);
}

// ---- choice ----

std::string CudnnConvolutions::describe(ConvPass pass, const ConvDesc& d) const {
  const char* type = options_.compute_type == DType::kBF16 ? "bf16"
                     : options_.exact_fp32                 ? "fp32"
                                                           : "tf32";
  std::string text =
      format("%s %s x%s w%s stride %d pads %d,%d,%d,%d", kPasses[static_cast<size_t>(pass)], type,
             to_string(d.x).c_str(), to_string(d.filter()).c_str(), d.stride, d.pad_top, d.pad_left,
             d.pad_bottom, d.pad_right);
  if (d.bias) text += " bias";
  if (d.sample_bias_stride > 0)
    text += format(" sample_bias %d/%d", d.sample_bias_stride, sample_bias_alignment(d));
  if (d.residual) text += " residual";
  return text;
}

bool CudnnConvolutions::allowed(const CudnnNotes& n) const {
  if (n.nondeterministic || n.reduced_precision_reduction) return false;
  if (!options_.exact_fp32) return true;
  return !n.tensor_core && !n.down_convert_inputs && !n.fft && !n.winograd;
}

// Appends plans of one variant until there are `most`.
void CudnnConvolutions::collect(ConvPass pass, const ConvDesc& d, ConvVariant variant,
                                bool runtime_compiled, size_t most,
                                std::vector<CudnnConvPlan>& found) const {
  CudnnGraph g(target_, describe(pass, d));
  const ConvTensorIds ids = build(g, pass, d, variant, options_.compute_type);
  const auto known = [&](const CudnnEngine& e) {
    return std::any_of(found.begin(), found.end(), [&](const CudnnConvPlan& c) {
      return c.variant == variant && c.engine == e;
    });
  };
  for (const CudnnHeuristic mode :
       {CudnnHeuristic::kAccurate, CudnnHeuristic::kFast, CudnnHeuristic::kFallback}) {
    if (found.size() >= most) return;
    for (const CudnnCandidate& c : g.candidates(mode)) {
      if (found.size() >= most) return;
      if (!allowed(c.notes) || c.notes.runtime_compiled != runtime_compiled || known(c.engine))
        continue;
      auto plan = g.plan(c.engine);
      if (!plan || plan->workspace() > options_.workspace_limit) continue;
      found.push_back({variant, c.engine, c.notes, ids, std::move(plan)});
    }
  }
}

std::vector<CudnnConvPlan> CudnnConvolutions::plans(ConvPass pass, const ConvDesc& d,
                                                    size_t most) const {
  const std::vector<ConvVariant> order = variants(pass, d, options_.compute_type);
  std::vector<CudnnConvPlan> found;
  const auto compiled = [&](size_t limit) {
    for (const ConvVariant v : order)
      if (v != ConvVariant::kFused) collect(pass, d, v, false, limit, found);
  };
  // Where there is something to compare with, a place is kept for an engine that fuses more and has
  // to be compiled.
  if (most > 1 && order.back() == ConvVariant::kFused) {
    compiled(most - 1);
    collect(pass, d, ConvVariant::kFused, true, found.size() + 1, found);
  }
  compiled(most);
  if (found.empty())
    for (const ConvVariant v : order) collect(pass, d, v, true, most, found);
  return found;
}

// The choice of the given table, if it can be made again.
std::optional<CudnnConvPlan> CudnnConvolutions::recall(ConvPass pass, const ConvDesc& d,
                                                       const std::string& key) {
  const auto entry = given_.choices.find(key);
  if (entry == given_.choices.end()) return std::nullopt;
  for (const ConvVariant v : variants(pass, d, options_.compute_type)) {
    if (given_.library != table_.library || entry->second.variant != name_of(v)) continue;
    try {
      const CudnnEngine& engine = entry->second.engine;
      CudnnGraph g(target_, key);
      CudnnConvPlan c{v, engine, {}, build(g, pass, d, v, options_.compute_type), g.plan(engine)};
      if (!c.plan || c.plan->workspace() > options_.workspace_limit) continue;
      c.notes = g.notes(engine);
      if (allowed(c.notes)) return c;
    } catch (const Error&) {
      // Numbers that cuDNN never gave out.
    }
  }
  ++replaced_;
  return std::nullopt;
}

CudnnConvPlan CudnnConvolutions::choose(ConvPass pass, const ConvDesc& d) {
  const std::string key = describe(pass, d);
  if (const auto known = chosen_.find(key); known != chosen_.end()) return known->second;
  std::optional<CudnnConvPlan> choice = recall(pass, d, key);
  if (!choice) {
    const bool measure = target_.live() && options_.budget && options_.budget->left();
    std::optional<TuningBudget::Spending> spending;
    if (measure) spending.emplace(*options_.budget);
    constexpr size_t kCandidates = 3;
    std::vector<CudnnConvPlan> found = plans(pass, d, measure ? kCandidates : 1);
    if (found.empty())
      fail(Status::kDevice, "%s has no deterministic engine within %zu MiB of workspace for %s",
           table_.library.c_str(), options_.workspace_limit >> 20, key.c_str());
    choice = measure ? fastest(pass, d, std::move(found)) : found.front();
  }
  table_.choices[key] = {name_of(choice->variant), choice->engine};
  return chosen_.emplace(key, *choice).first->second;
}

// Only a GPU runs this.
CudnnConvPlan CudnnConvolutions::fastest(ConvPass pass, const ConvDesc& d,
                                         std::vector<CudnnConvPlan> plans) {
  const DType type = options_.compute_type;
  const size_t element = size_of(type);
  const std::vector<size_t> bytes = {
      element * static_cast<size_t>(d.x.count()),
      sizeof(float) * static_cast<size_t>(d.filter().count()),
      element * static_cast<size_t>(d.y().count()),
      sizeof(float) * static_cast<size_t>(d.k),
      sizeof(float) * static_cast<size_t>(int64_t{d.x.n} * d.sample_bias_stride),
      element * static_cast<size_t>(d.residual ? d.y().count() : 0)};
  ConvSlots s;
  s.x = {0};
  s.filter = {1};
  if (d.bias) s.bias = {3};
  if (d.sample_bias_stride > 0) s.sample_bias = {4};
  if (d.residual) s.residual = {5};
  const auto call = [&](const CudnnConvPlan& c) {
    if (pass == ConvPass::kForward) return forward_call(c, d, type, s, {2});
    if (pass == ConvPass::kDgrad) return dgrad_call(c, d, type, s, {2}, {0}, Write::kOverwrite);
    return wgrad_call(c, d, type, s, {2}, {1}, Write::kOverwrite);
  };
  size_t best = 0;
  double best_seconds = 0;
  for (size_t i = 0; i < plans.size(); ++i) {
    const double seconds = time_call(call(plans[i]), bytes);
    if (i > 0 && seconds >= best_seconds) continue;
    best = i;
    best_seconds = seconds;
  }
  return std::move(plans[best]);
}

}  // namespace ddpm::cuda
