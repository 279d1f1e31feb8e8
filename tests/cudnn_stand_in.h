// What a graph told to cuDNN computes, by the double-precision reference: stands in for plans where
// there is no GPU.
#pragma once

#include <cstring>
#include <span>
#include <vector>

#include "kernels/bf16.h"
#include "kernels/cuda/cudnn.h"
#include "tests/reference/conv.h"

namespace ddpm::test {

class CudnnInterpreter {
 public:
  CudnnInterpreter(const cuda::CudnnProgram& program, std::span<void* const> pointers)
      : program_(program), pointers_(pointers), values_(program.tensors.size()) {}

  void run() {
    for (const cuda::CudnnOperation& op : program_.operations) {
      const auto [a, b, c] = op.tensors;
      switch (op.kind) {
        case cuda::CudnnOperation::kConvolution:
          convolve(op, a, b, c);
          break;
        case cuda::CudnnOperation::kAdd:
          put(c, sum(a, b));
          break;
        case cuda::CudnnOperation::kIdentity:
          put(b, get(a));
          break;
      }
    }
  }

 private:
  const cuda::CudnnTensor& tensor(int id) const {
    return program_.tensors.at(static_cast<size_t>(id));
  }
  static double element(const void* data, int64_t i, DType type) {
    return type == DType::kBF16 ? static_cast<double>(to_float(static_cast<const bf16*>(data)[i]))
                                : static_cast<double>(static_cast<const float*>(data)[i]);
  }

  ref::Vector get(int id) const {
    const cuda::CudnnTensor& t = tensor(id);
    if (t.is_virtual) return values_.at(static_cast<size_t>(id));
    const void* data = pointers_[static_cast<size_t>(id)];
    DDPM_CHECK(data != nullptr, "tensor %d has no memory", id);
    const int64_t row = t.shape.count() / t.shape.n;
    ref::Vector v;
    for (int64_t n = 0; n < t.shape.n; ++n)
      for (int64_t i = 0; i < row; ++i) v.push_back(element(data, n * t.row_stride + i, t.type));
    return v;
  }
  void put(int id, const ref::Vector& v) {
    const cuda::CudnnTensor& t = tensor(id);
    DDPM_CHECK(static_cast<int64_t>(v.size()) == t.shape.count(), "tensor %d: %zu values", id,
               v.size());
    if (t.is_virtual) {
      values_.at(static_cast<size_t>(id)) = v;
      return;
    }
    void* data = pointers_[static_cast<size_t>(id)];
    DDPM_CHECK(data != nullptr, "tensor %d has no memory", id);
    for (size_t i = 0; i < v.size(); ++i) {
      const auto value = static_cast<float>(v[i]);
      if (t.type == DType::kBF16)
        static_cast<bf16*>(data)[i] = to_bf16(value);
      else
        static_cast<float*>(data)[i] = value;
    }
  }

  void convolve(const cuda::CudnnOperation& op, int x, int filter, int y) {
    ConvDesc d = op.desc;
    d.bias = d.residual = false;
    d.sample_bias_stride = 0;
    if (op.pass == ConvPass::kForward)
      put(y, ref::conv_forward(d, {.x = get(x), .filter = get(filter)}));
    else if (op.pass == ConvPass::kDgrad)
      put(x, ref::conv_dgrad(d, get(filter), get(y)));
    else
      put(filter, ref::conv_wgrad(d, get(x), get(y)));
  }

  // b is as large as a, or has one value per channel, or one per image and channel.
  ref::Vector sum(int a, int b) const {
    const Shape &s = tensor(a).shape, &more = tensor(b).shape;
    ref::Vector v = get(a);
    const ref::Vector w = get(b);
    const int64_t image = s.pixels() * s.c;
    for (size_t i = 0; i < v.size(); ++i) {
      const auto at = static_cast<int64_t>(i);
      const int64_t from = more == s ? at : more.n == 1 ? at % s.c : at / image * s.c + at % s.c;
      v[i] += w.at(static_cast<size_t>(from));
    }
    return v;
  }

  const cuda::CudnnProgram& program_;
  std::span<void* const> pointers_;
  std::vector<ref::Vector> values_;  // of virtual tensors
};

// Overwrites all of its workspace, as an engine may, before and after it computes.
inline void interpret_cudnn(const cuda::CudnnProgram& program, std::span<void* const> pointers,
                            void* workspace, size_t bytes) {
  if (bytes > 0) std::memset(workspace, 0xFF, bytes);
  CudnnInterpreter(program, pointers).run();
  if (bytes > 0) std::memset(workspace, 0xFF, bytes);
}

}  // namespace ddpm::test
