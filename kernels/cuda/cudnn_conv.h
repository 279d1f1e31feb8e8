// Convolutions by cuDNN: which graphs compute one, which engine runs it, and the passes of our own
// around it. Everything is chosen when a Call is prepared.
//
// Of the ways to compute a result, in order of preference:
//   plain     taps alone. forward: then one pass of ours adds biases and residual. wgrad in bf16:
//             into scratch, which a pass of ours turns into fp32. Always there.
//   epilogue  forward: residual, then a bias of the compute type, as engines that are compiled
//             already take them. Not with a per-(n,k) bias, whose pass can add the rest as well.
//   fused     forward: fp32 biases, per (n,k) too, and residual; wgrad in bf16: fp32 from the
//             accumulators. By engines that cuDNN compiles at run time, a second each.
// Without measuring, the first that has a deterministic engine is taken.
#pragma once

#include <cstddef>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "kernels/cuda/conv_library.h"
#include "kernels/cuda/cudnn.h"
#include "kernels/cuda/plan_table.h"

namespace ddpm::cuda {

struct CudnnConvOptions {
  DType compute_type = DType::kBF16;
  // kF32: neither tensor cores nor anything else that rounds more than fp32 sums do.
  bool exact_fp32 = false;
  size_t workspace_limit = size_t{1} << 30;  // bytes, of one engine
  std::shared_ptr<TuningBudget> budget;      // for measuring on a live target; null = never
  std::string device;                        // its name: another one's choices are not reused
};

enum class ConvVariant { kPlain, kEpilogue, kFused };
const char* name_of(ConvVariant);

// A graph that computes a convolution, and the numbers of its tensors there; -1 = absent.
struct ConvTensorIds {
  int x = -1, filter = -1, y = -1;  // y: what is in memory at y's place
  int bias = -1, sample_bias = -1, residual = -1;
};
struct CudnnConvPlan {
  ConvVariant variant = ConvVariant::kPlain;
  CudnnEngine engine;
  CudnnNotes notes;
  ConvTensorIds ids;
  std::shared_ptr<const CudnnPlan> plan;
};

class CudnnConvolutions final : public ConvLibrary {
 public:
  CudnnConvolutions(CudnnTarget target, CudnnConvOptions options);

  std::optional<Call> forward(const ConvDesc&, const ConvSlots&, Out y) override;
  std::optional<Call> dgrad(const ConvDesc&, const ConvSlots&, In dy, Out dx, Write) override;
  std::optional<Call> wgrad(const ConvDesc&, const ConvSlots&, In dy, Out dfilter, Write) override;

  // All choices made so far.
  const PlanTable& table() const { return table_; }
  // Choices of an earlier start, to be made again.
  void use(PlanTable given);
  // Of them, those that were asked for and could not be made again.
  int replaced() const { return replaced_; }

  // What could be chosen for a pass, the best guess first; at most `most` of them. All are
  // deterministic and within the limit of workspace.
  std::vector<CudnnConvPlan> plans(ConvPass pass, const ConvDesc& desc, size_t most) const;

 private:
  CudnnConvPlan choose(ConvPass pass, const ConvDesc& desc);
  std::optional<CudnnConvPlan> recall(ConvPass pass, const ConvDesc& desc, const std::string& key);
  CudnnConvPlan fastest(ConvPass pass, const ConvDesc& desc, std::vector<CudnnConvPlan> plans);
  void collect(ConvPass pass, const ConvDesc& desc, ConvVariant variant, bool runtime_compiled,
               size_t most, std::vector<CudnnConvPlan>& found) const;
  bool allowed(const CudnnNotes& notes) const;
  std::string describe(ConvPass pass, const ConvDesc& desc) const;

  CudnnTarget target_;
  CudnnConvOptions options_;
  PlanTable table_, given_;
  int replaced_ = 0;
  std::map<std::string, CudnnConvPlan> chosen_;
};

}  // namespace ddpm::cuda
