// The one place that speaks to oneDNN (v2 API): convolutions, reorders of filters, matrix products.
// Primitives are made for one thread count and kept by key, so equal layers share one.
#pragma once

#include <cstddef>
#include <memory>
#include <string>

#include "kernels/desc.h"

namespace ddpm::cpu {

// What a primitive reads and writes. Convolution forward: src x, weights filter, dst y. Dgrad: src
// dy, weights filter, dst dx. Wgrad: src x, weights dy, dst dfilter. Product: src a, weights b,
// dst c. Reorder: src, dst. Unused ones stay null.
struct DnnPointers {
  const void* src = nullptr;
  const void* weights = nullptr;
  const void* bias = nullptr;
  const void* addend = nullptr;  // added to dst: a residual
  void* dst = nullptr;
  void* scratchpad = nullptr;  // 64-byte aligned
};

// A prepared primitive with memory objects of its own, which every run points anew: it must not run
// concurrently with itself.
class DnnPrimitive {
 public:
  struct Impl;
  explicit DnnPrimitive(std::unique_ptr<Impl>);
  ~DnnPrimitive();
  size_t scratchpad_bytes() const;
  const char* implementation() const;  // oneDNN's name of the algorithm
  void run(const DnnPointers&) const;

 private:
  std::unique_ptr<Impl> impl_;
};
using DnnPrimitivePtr = std::shared_ptr<const DnnPrimitive>;

class OneDnn {
 public:
  explicit OneDnn(int threads);
  ~OneDnn();

  // Direct convolution; forward adds bias and residual where the desc has them.
  DnnPrimitivePtr conv(const ConvDesc&, ConvPass);
  // Bytes of the filter in the format that pass's primitive wants; kWgrad: of the gradient it
  // writes. 0 = (K,R,S,C).
  size_t filter_bytes(const ConvDesc&, ConvPass);
  // (K,R,S,C) to that format; kWgrad: back.
  DnnPrimitivePtr reorder_filter(const ConvDesc&, ConvPass);
  // Adds to c instead of overwriting it if `accumulate`.
  DnnPrimitivePtr matmul(const GemmDesc&, bool accumulate);

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

std::string onednn_version();

}  // namespace ddpm::cpu
