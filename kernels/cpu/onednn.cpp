// Every primitive is made by a prepare_* function, which lists its arguments; DnnPrimitive binds
// pointers to them and runs it.
#include "kernels/cpu/onednn.h"

#include <map>
#include <utility>
#include <vector>

#include <omp.h>

#include <oneapi/dnnl/dnnl.hpp>

#include "kernels/error.h"

namespace ddpm::cpu {
namespace {

using Desc = dnnl::memory::desc;
using Dims = dnnl::memory::dims;
using Tag = dnnl::memory::format_tag;
constexpr auto kF32 = dnnl::memory::data_type::f32;

// oneDNN takes its thread count from OpenMP's setting of the calling thread, when a primitive is
// made and when it runs, and the two must agree.
class ThreadCount {
 public:
  explicit ThreadCount(int threads) : before_(omp_get_max_threads()) {
    if (before_ != threads) omp_set_num_threads(threads);
    changed_ = before_ != threads;
  }
  ~ThreadCount() {
    if (changed_) omp_set_num_threads(before_);
  }
  ThreadCount(const ThreadCount&) = delete;
  ThreadCount& operator=(const ThreadCount&) = delete;

 private:
  int before_;
  bool changed_ = false;
};

// A tensor of a primitive: oneDNN's number for it, its format, and where its pointer comes from.
struct Argument {
  int number;
  Desc desc;
  const void* DnnPointers::*in = nullptr;
  void* DnnPointers::*out = nullptr;
};

// What equal layers share.
struct Prepared {
  dnnl::primitive primitive;
  std::vector<Argument> arguments;
  Desc filter;  // as a convolution wants it
  size_t scratchpad_bytes = 0;
  const char* implementation = "";
};

struct ConvTensors {
  Desc x, filter, plain_filter, bias, y;
  Dims strides, pads_before, pads_after;
};

ConvTensors conv_tensors(const ConvDesc& d) {
  const Shape y = d.y();
  const Dims filter{d.k, d.x.c, d.r, d.s};
  return {.x = {{d.x.n, d.x.c, d.x.h, d.x.w}, kF32, Tag::nhwc},
          .filter = {filter, kF32, Tag::any},
          .plain_filter = {filter, kF32, Tag::ohwi},
          .bias = d.bias ? Desc({d.k}, kF32, Tag::x) : Desc(),
          .y = {{y.n, y.c, y.h, y.w}, kF32, Tag::nhwc},
          .strides = {d.stride, d.stride},
          .pads_before = {d.pad_top, d.pad_left},
          .pads_after = {d.pad_bottom, d.pad_right}};
}

dnnl::convolution_forward::desc forward_desc(const ConvTensors& t, bool bias) {
  constexpr auto kind = dnnl::prop_kind::forward_training;
  constexpr auto direct = dnnl::algorithm::convolution_direct;
  if (bias)
    return {kind, direct, t.x, t.filter, t.bias, t.y, t.strides, t.pads_before, t.pads_after};
  return {kind, direct, t.x, t.filter, t.y, t.strides, t.pads_before, t.pads_after};
}

dnnl::primitive_attr user_scratchpad() {
  dnnl::primitive_attr attributes;
  attributes.set_scratchpad_mode(dnnl::scratchpad_mode::user);
  return attributes;
}

template <typename PrimitiveDesc>
void finish(Prepared& p, const PrimitiveDesc& desc, dnnl::primitive primitive) {
  p.primitive = std::move(primitive);
  p.scratchpad_bytes = desc.scratchpad_desc().get_size();
  p.implementation = desc.impl_info_str();
  p.arguments.push_back({.number = DNNL_ARG_SCRATCHPAD,
                         .desc = desc.scratchpad_desc(),
                         .out = &DnnPointers::scratchpad});
}

Prepared prepare_forward(const dnnl::engine& engine, const ConvDesc& d) {
  const ConvTensors t = conv_tensors(d);
  dnnl::primitive_attr attributes = user_scratchpad();
  if (d.residual) {
    dnnl::post_ops post;
    post.append_binary(dnnl::algorithm::binary_add, t.y);
    attributes.set_post_ops(post);
  }
  const dnnl::convolution_forward::primitive_desc desc(forward_desc(t, d.bias), attributes, engine);
  Prepared p;
  p.filter = desc.weights_desc();
  p.arguments = {{.number = DNNL_ARG_SRC, .desc = t.x, .in = &DnnPointers::src},
                 {.number = DNNL_ARG_WEIGHTS, .desc = p.filter, .in = &DnnPointers::weights},
                 {.number = DNNL_ARG_DST, .desc = t.y, .out = &DnnPointers::dst}};
  if (d.bias)
    p.arguments.push_back({.number = DNNL_ARG_BIAS, .desc = t.bias, .in = &DnnPointers::bias});
  if (d.residual)
    p.arguments.push_back({.number = DNNL_ARG_ATTR_MULTIPLE_POST_OP(0) | DNNL_ARG_SRC_1,
                           .desc = t.y,
                           .in = &DnnPointers::addend});
  finish(p, desc, dnnl::convolution_forward(desc));
  return p;
}

Prepared prepare_dgrad(const dnnl::engine& engine, const ConvDesc& d) {
  const ConvTensors t = conv_tensors(d);
  const dnnl::convolution_forward::primitive_desc hint(forward_desc(t, false), engine);
  const dnnl::convolution_backward_data::primitive_desc desc(
      {dnnl::algorithm::convolution_direct, t.x, t.filter, t.y, t.strides, t.pads_before,
       t.pads_after},
      user_scratchpad(), engine, hint);
  Prepared p;
  p.filter = desc.weights_desc();
  p.arguments = {{.number = DNNL_ARG_DIFF_DST, .desc = t.y, .in = &DnnPointers::src},
                 {.number = DNNL_ARG_WEIGHTS, .desc = p.filter, .in = &DnnPointers::weights},
                 {.number = DNNL_ARG_DIFF_SRC, .desc = t.x, .out = &DnnPointers::dst}};
  finish(p, desc, dnnl::convolution_backward_data(desc));
  return p;
}

Prepared prepare_wgrad(const dnnl::engine& engine, const ConvDesc& d) {
  const ConvTensors t = conv_tensors(d);
  const dnnl::convolution_forward::primitive_desc hint(forward_desc(t, false), engine);
  const dnnl::convolution_backward_weights::primitive_desc desc(
      {dnnl::algorithm::convolution_direct, t.x, t.filter, t.y, t.strides, t.pads_before,
       t.pads_after},
      user_scratchpad(), engine, hint);
  Prepared p;
  p.filter = desc.diff_weights_desc();
  p.arguments = {{.number = DNNL_ARG_SRC, .desc = t.x, .in = &DnnPointers::src},
                 {.number = DNNL_ARG_DIFF_DST, .desc = t.y, .in = &DnnPointers::weights},
                 {.number = DNNL_ARG_DIFF_WEIGHTS, .desc = p.filter, .out = &DnnPointers::dst}};
  finish(p, desc, dnnl::convolution_backward_weights(desc));
  return p;
}

Prepared prepare_reorder(const dnnl::engine& engine, const Desc& from, const Desc& to) {
  const dnnl::reorder::primitive_desc desc(engine, from, engine, to, user_scratchpad());
  Prepared p;
  p.arguments = {{.number = DNNL_ARG_FROM, .desc = from, .in = &DnnPointers::src},
                 {.number = DNNL_ARG_TO, .desc = to, .out = &DnnPointers::dst}};
  finish(p, desc, dnnl::reorder(desc));
  return p;
}

Prepared prepare_matmul(const dnnl::engine& engine, const GemmDesc& g, bool accumulate) {
  // Two dimensions where two are enough: oneDNN has better kernels for them.
  const auto matrix = [&](int rows, int columns, bool transposed) {
    if (g.batch == 1) return Desc({rows, columns}, kF32, transposed ? Tag::ba : Tag::ab);
    return Desc({g.batch, rows, columns}, kF32, transposed ? Tag::acb : Tag::abc);
  };
  const Desc a = matrix(g.m, g.k, g.transpose_a), b = matrix(g.k, g.n, g.transpose_b);
  const Desc c = matrix(g.m, g.n, false);
  const Desc bias =
      g.batch == 1 ? Desc({1, g.n}, kF32, Tag::ab) : Desc({1, 1, g.n}, kF32, Tag::abc);
  dnnl::post_ops post;
  if (accumulate) post.append_sum(1.0f);
  if (g.residual) post.append_binary(dnnl::algorithm::binary_add, c);
  dnnl::primitive_attr attributes = user_scratchpad();
  attributes.set_post_ops(post);
  const dnnl::matmul::primitive_desc desc(
      g.bias ? dnnl::matmul::desc(a, b, bias, c) : dnnl::matmul::desc(a, b, c), attributes, engine);
  Prepared p;
  p.arguments = {{.number = DNNL_ARG_SRC, .desc = a, .in = &DnnPointers::src},
                 {.number = DNNL_ARG_WEIGHTS, .desc = b, .in = &DnnPointers::weights},
                 {.number = DNNL_ARG_DST, .desc = c, .out = &DnnPointers::dst}};
  if (g.bias)
    p.arguments.push_back({.number = DNNL_ARG_BIAS, .desc = bias, .in = &DnnPointers::bias});
  if (g.residual)
    p.arguments.push_back(
        {.number = DNNL_ARG_ATTR_MULTIPLE_POST_OP(accumulate ? 1 : 0) | DNNL_ARG_SRC_1,
         .desc = c,
         .in = &DnnPointers::addend});
  finish(p, desc, dnnl::matmul(desc));
  return p;
}

}  // namespace

// ---- one primitive ----

struct DnnPrimitive::Impl {
  std::shared_ptr<const Prepared> prepared;
  int threads;
  dnnl::stream stream;
  std::vector<dnnl::memory> memory;  // one per argument
  std::vector<dnnl_exec_arg_t> bound;
};

DnnPrimitive::DnnPrimitive(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
DnnPrimitive::~DnnPrimitive() = default;
size_t DnnPrimitive::scratchpad_bytes() const { return impl_->prepared->scratchpad_bytes; }
const char* DnnPrimitive::implementation() const { return impl_->prepared->implementation; }

void DnnPrimitive::run(const DnnPointers& pointers) const {
  const auto& arguments = impl_->prepared->arguments;
  for (size_t i = 0; i < arguments.size(); ++i) {
    const Argument& a = arguments[i];
    // oneDNN has no const handles; what it reads it leaves alone.
    void* at = a.out ? pointers.*a.out : const_cast<void*>(pointers.*a.in);
    impl_->memory[i].set_data_handle(at);
  }
  const ThreadCount count(impl_->threads);
  const dnnl_status_t status =
      dnnl_primitive_execute(impl_->prepared->primitive.get(), impl_->stream.get(),
                             static_cast<int>(impl_->bound.size()), impl_->bound.data());
  if (status != dnnl_success)
    fail(Status::kBug, "oneDNN %s: status %d", impl_->prepared->implementation, status);
}

// ---- making and sharing them ----

struct OneDnn::Impl {
  using Key = std::vector<int>;
  int threads;
  dnnl::engine engine{dnnl::engine::kind::cpu, 0};
  dnnl::stream stream{engine};
  std::map<Key, std::shared_ptr<const Prepared>> cache;

  template <typename Make>
  std::shared_ptr<const Prepared> prepared(const Key& key, const std::string& what,
                                           const Make& make) {
    if (const auto found = cache.find(key); found != cache.end()) return found->second;
    const ThreadCount count(threads);
    try {
      return cache[key] = std::make_shared<const Prepared>(make());
    } catch (const dnnl::error& e) {
      fail(e.status == dnnl_out_of_memory ? Status::kMemory : Status::kBug, "%s: oneDNN: %s",
           what.c_str(), e.what());
    }
  }

  std::shared_ptr<const Prepared> conv(const ConvDesc& d, ConvPass pass) {
    const bool forward = pass == ConvPass::kForward;
    const Key key{0,
                  static_cast<int>(pass),
                  forward && d.bias,
                  forward && d.residual,
                  d.x.n,
                  d.x.h,
                  d.x.w,
                  d.x.c,
                  d.k,
                  d.r,
                  d.s,
                  d.stride,
                  d.pad_top,
                  d.pad_left,
                  d.pad_bottom,
                  d.pad_right};
    const std::string what = "convolution of " + to_string(d.x) + " by " + to_string(d.filter());
    return prepared(key, what, [&] {
      if (forward) return prepare_forward(engine, d);
      return pass == ConvPass::kDgrad ? prepare_dgrad(engine, d) : prepare_wgrad(engine, d);
    });
  }

  DnnPrimitivePtr instance(std::shared_ptr<const Prepared> p) const {
    auto impl = std::make_unique<DnnPrimitive::Impl>(
        DnnPrimitive::Impl{std::move(p), threads, stream, {}, {}});
    for (const Argument& a : impl->prepared->arguments) {
      impl->memory.emplace_back(a.desc, engine, nullptr);
      impl->bound.push_back({a.number, impl->memory.back().get()});
    }
    return std::make_shared<const DnnPrimitive>(std::move(impl));
  }
};

OneDnn::OneDnn(int threads) : impl_(new Impl{.threads = threads, .cache = {}}) {}
OneDnn::~OneDnn() = default;

DnnPrimitivePtr OneDnn::conv(const ConvDesc& d, ConvPass pass) {
  return impl_->instance(impl_->conv(d, pass));
}

size_t OneDnn::filter_bytes(const ConvDesc& d, ConvPass pass) {
  const Desc wanted = impl_->conv(d, pass)->filter;
  return wanted == conv_tensors(d).plain_filter ? 0 : wanted.get_size();
}

DnnPrimitivePtr OneDnn::reorder_filter(const ConvDesc& d, ConvPass pass) {
  const Desc plain = conv_tensors(d).plain_filter;
  const Desc blocked = impl_->conv(d, pass)->filter;
  const ThreadCount count(impl_->threads);
  const bool back = pass == ConvPass::kWgrad;
  return impl_->instance(std::make_shared<const Prepared>(
      prepare_reorder(impl_->engine, back ? blocked : plain, back ? plain : blocked)));
}

DnnPrimitivePtr OneDnn::matmul(const GemmDesc& g, bool accumulate) {
  const Impl::Key key{1,       accumulate,    g.m,           g.n,    g.k,
                      g.batch, g.transpose_a, g.transpose_b, g.bias, g.residual};
  return impl_->instance(
      impl_->prepared(key, format("matrix product %d x (%d,%d,%d)", g.batch, g.m, g.n, g.k),
                      [&] { return prepare_matmul(impl_->engine, g, accumulate); }));
}

std::string onednn_version() {
  const dnnl_version_t* v = dnnl_version();
  return format("oneDNN %d.%d.%d", v->major, v->minor, v->patch);
}

}  // namespace ddpm::cpu
