#include "kernels/cuda/conv_choice.h"

#include <algorithm>
#include <optional>

#include "kernels/conv_composite.h"
#include "kernels/error.h"

namespace ddpm::cuda {
namespace {

constexpr const char *kOwn = "own", *kLibrary = "library";

// The parts of a desc that a pass reads, and that its time depends on.
ConvDesc read_by(ConvPass pass, ConvDesc d) {
  if (pass == ConvPass::kForward) return d;
  d.bias = d.residual = d.statistics = false;
  d.sample_bias_stride = d.sample_bias_offset = d.shortcut_c = d.shortcut_c2 = 0;
  return d;
}

std::string describe(ConvPass pass, const ConvDesc& d, Write write, int groups, bool sums,
                     const std::string& precision) {
  constexpr const char* kPasses[] = {"forward", "dgrad", "wgrad"};
  std::string text = format("conv_choice %s %s x%s", kPasses[static_cast<size_t>(pass)],
                            precision.c_str(), to_string(d.x).c_str());
  const auto add = [&](bool is, const std::string& what) {
    if (is) text += " " + what;
  };
  add(d.c2 > 0, format("+%d", d.c2));
  text += format(" w%s stride %d pads %d,%d,%d,%d", to_string(d.filter()).c_str(), d.stride,
                 d.pad_top, d.pad_left, d.pad_bottom, d.pad_right);
  add(d.transform.affine, "norm");
  add(d.transform.silu, "silu");
  add(d.transform.dropout.p > 0, "dropout");
  add(d.upsample, "upsample");
  add(d.bias, "bias");
  add(d.sample_bias_stride > 0, "sample_bias");
  add(d.residual, "residual");
  add(d.shortcut_c > 0, format("shortcut %d+%d", d.shortcut_c, d.shortcut_c2));
  add(d.statistics, "statistics");
  add(write == Write::kAccumulate, "accumulate");
  add(groups > 0, format("through %d groups", groups));
  add(sums, "sums");
  return text;
}

// ---- without measuring ----

struct Asked {
  ConvPass pass;
  const ConvDesc& d;
  Write write;
  bool tensor_cores;
};

struct Rule {
  bool (*applies)(const Asked&);
  bool own;
};

// Of what a pass reads by eight channels.
bool odd_channels(ConvPass pass, const ConvDesc& d) {
  return d.x.c % 8 != 0 || d.c2 % 8 != 0 || d.shortcut_c % 8 != 0 || d.shortcut_c2 % 8 != 0 ||
         (pass != ConvPass::kForward && d.k % 8 != 0);
}

// The first that applies decides. Times are docs/kernels.md's predictions at 32x32x128, batch 128,
// with a library's convolution at 480 TFLOP/s: 80 us.
constexpr Rule kRules[] = {
    // Ours is plain arithmetic in fp32: 25 TFLOP/s.
    {[](const Asked& a) { return !a.tensor_cores; }, false},
    // Pieces come by scalars, and what is fused runs without tensor cores.
    {[](const Asked& a) { return odd_channels(a.pass, a.d); }, false},
    // Not predicted, and larger halos: only 3x3 and 1x1 are laid out for.
    {[](const Asked& a) { return a.d.r != a.d.s || (a.d.r != 3 && a.d.r != 1); }, false},
    // 115 us against 80 and 26 for writing the activation; at 16x16x256 115 against 80 and 13.
    // With the sums of dy, 117 against 120 and 100.
    {[](const Asked& a) { return a.pass == ConvPass::kWgrad; }, false},
    // dy is spread out by the stride: three of four products are with zeros.
    {[](const Asked& a) { return a.pass == ConvPass::kDgrad && a.d.stride > 1; }, false},
    // 77 us, adding included, against 80 and a pass that adds, 38 at least. Overwriting, 77 against
    // 80 is no difference to rely on.
    {[](const Asked& a) { return a.pass == ConvPass::kDgrad && a.write == Write::kAccumulate; },
     true},
    // 88 us and 41 of the norm's backward pass, against 80 and 69.
    {[](const Asked& a) { return a.pass == ConvPass::kDgrad && a.d.transform.affine; }, true},
    // Nothing is fused that the library would not add itself.
    {[](const Asked& a) { return a.d.basic(); }, false},
    // 94 us against 80 and 26 for the activation, 25 for biases, 14 for statistics; at 8x8x256 32
    // against 20 and three launches of at least 3.
    {[](const Asked&) { return true; }, true},
};

bool by_rule(const Asked& a) {
  return std::find_if(std::begin(kRules), std::end(kRules),
                      [&](const Rule& r) { return r.applies(a); })
      ->own;
}

// ---- measuring ----

size_t bytes_of(DType type, int64_t count) { return size_of(type) * static_cast<size_t>(count); }

// All calls as one, in order over one workspace, as a step runs them.
Call together(std::vector<Call> calls) {
  Call all{"composite", {}, {}, 0, nullptr};
  for (const Call& c : calls) {
    all.reads.insert(all.reads.end(), c.reads.begin(), c.reads.end());
    all.writes.insert(all.writes.end(), c.writes.begin(), c.writes.end());
    all.workspace = std::max(all.workspace, c.workspace);
  }
  all.run = [calls = std::move(calls)](const Run& r) {
    for (const Call& c : calls) c.run(r);
  };
  return all;
}

}  // namespace

// Slots of a desc, and their sizes.
class ConvChoice::Slots {
 public:
  Slots(ConvPass pass, const ConvDesc& d, DType type, int groups) : type_(type) {
    const int64_t pixels = d.y().n * d.y().pixels();
    if (pass != ConvPass::kDgrad || groups > 0) {
      s.x = in(type, d.x.count());
      if (d.c2 > 0) s.x2 = in(type, d.x.n * d.x.pixels() * d.c2);
      if (d.transform.affine) s.scale_shift = in(DType::kF32, int64_t{d.x.n} * d.c() * 2);
      if (d.transform.dropout.p > 0) s.state = add(sizeof(StepState));
    }
    if (pass != ConvPass::kWgrad) s.filter = in(type, d.filter().count());
    if (d.bias) s.bias = in(DType::kF32, d.k);
    if (d.sample_bias_stride > 0)
      s.sample_bias = in(DType::kF32, int64_t{d.x.n} * d.sample_bias_stride);
    if (d.residual) s.residual = in(type, d.y().count());
    if (d.shortcut_c > 0) {
      s.shortcut = in(type, pixels * d.shortcut_c);
      if (d.shortcut_c2 > 0) s.shortcut2 = in(type, pixels * d.shortcut_c2);
      s.shortcut_filter = in(type, int64_t{d.k} * (d.shortcut_c + d.shortcut_c2));
      s.shortcut_bias = in(DType::kF32, d.k);
    }
    y = in(type, d.y().count());
    if (pass == ConvPass::kForward && d.statistics)
      result = {in(DType::kF32, StatsDesc{d.y()}.count()).slot};
    if (pass == ConvPass::kDgrad) result = {in(type, int64_t{d.x.n} * d.x.pixels() * d.c()).slot};
    if (pass == ConvPass::kWgrad) result = {in(DType::kF32, d.filter().count()).slot};
    if (groups > 0) add_norm(d, groups);
    if (pass == ConvPass::kWgrad) sums = {in(DType::kF32, int64_t{d.x.n} * d.k).slot};
  }

  Out y_out() const { return {y.slot}; }
  // From the gradient by the norm's output, or, with sums, from what led it further.
  Call norm_backward(Backend& backend, bool summed) const {
    return backend.group_norm_backward(norm, s.x, s.x2, s.scale_shift, mean_rstd, gamma, s.state,
                                       {result.slot}, summed ? In{sums.slot} : In{}, dx,
                                       Write::kOverwrite, dx2, Write::kOverwrite, dgamma, dbeta,
                                       Write::kOverwrite);
  }
  Out activation(const Shape& shape) { return {in(type_, shape.count()).slot}; }
  const std::vector<size_t>& bytes() const { return bytes_; }

  ConvSlots s;
  In y;        // or its gradient
  Out result;  // statistics, dx or dfilter
  GroupNormDesc norm;
  In mean_rstd, gamma;
  Out sums, dx, dx2, dgamma, dbeta;

 private:
  void add_norm(const ConvDesc& d, int groups) {
    norm.x = d.x;
    norm.c2 = d.c2;
    norm.groups = groups;
    norm.silu = d.transform.silu;
    norm.dropout = d.transform.dropout;
    mean_rstd = in(DType::kF32, int64_t{d.x.n} * groups * 2);
    gamma = in(DType::kF32, d.c());
    sums = {in(DType::kF32, StatsDesc{norm.shape()}.count()).slot};
    dx = activation(d.x);
    if (d.c2 > 0) dx2 = activation({d.x.n, d.x.h, d.x.w, d.c2});
    dgamma = {in(DType::kF32, d.c()).slot};
    dbeta = {in(DType::kF32, d.c()).slot};
  }
  In add(size_t bytes) {
    bytes_.push_back(bytes);
    return {static_cast<int>(bytes_.size()) - 1};
  }
  In in(DType type, int64_t count) { return add(bytes_of(type, count)); }

  DType type_;
  std::vector<size_t> bytes_;
};

// Our one call.
Call ConvChoice::own_call(ConvPass pass, const ConvDesc& d, Write write, const Slots& t) const {
  const DType type = backend_.compute_type();
  std::optional<Call> call;
  if (pass == ConvPass::kForward)
    call = conv_forward(type, chip(), d, t.s, t.y_out(), t.result);
  else if (pass == ConvPass::kDgrad)
    call = conv_dgrad(type, chip(), d, t.s, t.y, t.result, write);
  else
    call = conv_wgrad(type, chip(), d, t.s, t.y, t.result, write);
  DDPM_CHECK(call.has_value(), "our own convolution declines %s", to_string(d.x).c_str());
  return *std::move(call);
}

Call ConvChoice::own_norm_call(const ConvDesc& d, const Slots& t) const {
  auto call = conv_dgrad_norm(backend_.compute_type(), chip(), d, t.s, t.norm, t.mean_rstd, t.y,
                              t.result, t.sums);
  DDPM_CHECK(call.has_value(), "our own gradient declines %s", to_string(d.x).c_str());
  Call all = together({*std::move(call), t.norm_backward(backend_, true)});
  all.op = "conv_dgrad_norm";
  return all;
}

Call ConvChoice::norm_composite(const ConvDesc& d, const Slots& t) {
  auto call = dgrad(without_prologue(d), t.s, t.y, t.result, Write::kOverwrite);
  DDPM_CHECK(call.has_value(), "no plain gradient of %s", to_string(d.x).c_str());
  return together({*std::move(call), t.norm_backward(backend_, false)});
}

std::optional<Call> ConvChoice::own_sums_call(const ConvDesc& d, Write write,
                                              const Slots& t) const {
  return conv_wgrad_sums(backend_.compute_type(), chip(), d, t.s, t.y, t.result, write, t.sums, d.k,
                         0);
}

// Without the sums, in the way that is chosen then, and their own pass.
Call ConvChoice::sums_composite(const ConvDesc& d, Write write, Slots& t) {
  auto plain = wgrad(d, t.s, t.y, t.result, write);
  if (!plain) plain = composite(ConvPass::kWgrad, d, write, t);
  return together({*std::move(plain), backend_.pixel_sum(d.y(), t.y, t.sums, d.k, 0)});
}

// What the op lists where the whole is declined; for a basic desc, the library's call.
Call ConvChoice::composite(ConvPass pass, const ConvDesc& d, Write write, Slots& t) {
  std::vector<Call> calls;
  const ConvLister lister{[&](const Shape& shape) { return t.activation(shape); },
                          [&](Call call) { calls.push_back(std::move(call)); },
                          [](const ConvDesc&, In filter) { return filter; }};
  const auto add = [&](std::optional<Call> call) {
    DDPM_CHECK(call.has_value(), "the library declines a plain convolution of %s",
               to_string(d.x).c_str());
    calls.push_back(*std::move(call));
  };
  if (pass == ConvPass::kDgrad) {
    add(library_.dgrad(d, t.s, t.y, t.result, write));
  } else if (pass == ConvPass::kWgrad && d.basic()) {
    add(library_.wgrad(d, t.s, t.y, t.result, write));
  } else if (pass == ConvPass::kWgrad) {
    ConvSlots plain;
    plain.x = list_input(backend_, d, t.s, lister);
    add(backend_.conv_wgrad(without_prologue(d), plain, t.y, t.result, write));
  } else if (d.basic()) {
    add(library_.forward(d, t.s, t.y_out()));
  } else {
    list_forward(backend_, d, t.s, t.y_out(), lister);
    if (d.statistics) calls.push_back(backend_.channel_stats(StatsDesc{d.y()}, t.y, t.result));
  }
  return together(std::move(calls));
}

void ConvChoice::use(PlanTable given) {
  given_ = std::move(given);
  replaced_ = 0;
}

bool ConvChoice::own(ConvPass pass, const ConvDesc& asked, Write write, With with) {
  const ConvDesc d = read_by(pass, asked);
  // Without a choice: what has no composite (or is not taken at all), and an input's gradient,
  // which is not fused.
  if (options_.batch_invariant || d.e4m3 || (d.transform.any() && !d.transform.affine)) return true;
  if (pass == ConvPass::kDgrad && !d.basic() && with.groups == 0) return true;
  const std::string key = describe(pass, d, write, with.groups, with.sums, options_.precision);
  if (const auto known = table_.choices.find(key); known != table_.choices.end())
    return known->second.variant == kOwn;
  std::optional<bool> ours;
  if (const auto kept = given_.choices.find(key); kept != given_.choices.end()) {
    const std::string& variant = kept->second.variant;
    if (given_.library == table_.library && (variant == kOwn || variant == kLibrary))
      ours = variant == kOwn;
    else
      ++replaced_;
  }
  if (!ours) ours = faster(pass, d, write, with);
  table_.choices[key] = {*ours ? kOwn : kLibrary, {.id = 0, .knobs = {}}};
  return *ours;
}

bool ConvChoice::faster(ConvPass pass, const ConvDesc& d, Write write, With with) {
  const DType type = backend_.compute_type();
  const bool rule = by_rule({pass, d, write, type == DType::kBF16});
  if (!options_.timer || !options_.budget->left()) return rule;
  try {
    Slots slots(pass, d, type, with.groups);
    const auto time = [&](const Call& call) {
      const TuningBudget::Spending spending(*options_.budget);
      return options_.timer(call, slots.bytes());
    };
    // Both are prepared first: what is chosen within the composite is measured by then.
    const Call ours = with.groups > 0 ? own_norm_call(d, slots)
                      : with.sums     ? *own_sums_call(d, write, slots)
                                      : own_call(pass, d, write, slots);
    const Call rest = with.groups > 0 ? norm_composite(d, slots)
                      : with.sums     ? sums_composite(d, write, slots)
                                      : composite(pass, d, write, slots);
    const double seconds = time(ours);
    return seconds <= time(rest);
  } catch (const Error& e) {
    if (e.status() != Status::kMemory) throw;
    return rule;  // there is no room to measure in
  }
}

std::optional<Call> ConvChoice::forward(const ConvDesc& d, const ConvSlots& s, Out y,
                                        Out statistics) {
  if (own(ConvPass::kForward, d, Write::kOverwrite, {}))
    return conv_forward(backend_.compute_type(), chip(), d, s, y, statistics,
                        options_.batch_invariant);
  if (!d.basic()) return std::nullopt;
  return library_.forward(d, s, y);
}

std::optional<Call> ConvChoice::dgrad(const ConvDesc& d, const ConvSlots& s, In dy, Out dx,
                                      Write write) {
  if (own(ConvPass::kDgrad, d, write, {}))
    return conv_dgrad(backend_.compute_type(), chip(), d, s, dy, dx, write);
  return library_.dgrad(d, s, dy, dx, write);
}

std::optional<Call> ConvChoice::dgrad_norm(const ConvDesc& d, const ConvSlots& s,
                                           const GroupNormDesc& norm, In mean_rstd, In dy, Out dz,
                                           Out sums) {
  if (d.upsample || !own(ConvPass::kDgrad, d, Write::kOverwrite, {.groups = norm.groups}))
    return std::nullopt;
  return conv_dgrad_norm(backend_.compute_type(), chip(), d, s, norm, mean_rstd, dy, dz, sums);
}

std::optional<Call> ConvChoice::wgrad(const ConvDesc& d, const ConvSlots& s, In dy, Out dfilter,
                                      Write write) {
  if (own(ConvPass::kWgrad, d, write, {}))
    return conv_wgrad(backend_.compute_type(), chip(), d, s, dy, dfilter, write);
  if (!d.basic()) return std::nullopt;
  return library_.wgrad(d, s, dy, dfilter, write);
}

std::optional<Call> ConvChoice::wgrad_sums(const ConvDesc& d, const ConvSlots& s, In dy,
                                           Out dfilter, Write write, Out sums, int stride,
                                           int offset) {
  auto ours = conv_wgrad_sums(backend_.compute_type(), chip(), d, s, dy, dfilter, write, sums,
                              stride, offset);
  if (!ours || !own(ConvPass::kWgrad, d, write, {.sums = true})) return std::nullopt;
  return ours;
}

}  // namespace ddpm::cuda
