// Whether a convolution is our own kernel's or the library's. Ours takes the whole desc in one
// call; where the library is chosen and the desc is fused, the answer is nullopt, the op lists the
// composite, and its plain convolutions are asked for, and chosen, in turn.
//
// The faster way is taken, as measured: our one call against all calls of the composite, run one
// after the other. Where nothing is measured a few rules decide (conv_choice.cpp). A choice is
// remembered, and kept with the library's own in the table of plans.
#pragma once

#include <cstddef>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "kernels/cuda/conv.h"
#include "kernels/cuda/conv_library.h"
#include "kernels/cuda/plan_table.h"

namespace ddpm::cuda {

struct ConvChoiceOptions {
  std::string precision;         // of products: "bf16", "tf32", "fp32"
  std::string library;           // and device: another one's choices are not reused
  size_t shared_bytes = 0;       // that a block may have
  int wgmma_blocks = 0;          // as ConvChip's
  bool batch_invariant = false;  // ours always, with sums cut as for one image
  // Seconds that a call takes on slots of these sizes; null: nothing is measured.
  std::function<double(const Call&, const std::vector<size_t>& bytes)> timer;
  std::shared_ptr<TuningBudget> budget;
};

class ConvChoice {
 public:
  // backend: what the composite's calls are asked of. It and the library must outlive this.
  ConvChoice(Backend& backend, ConvLibrary& library, ConvChoiceOptions options)
      : backend_(backend), library_(library), options_(std::move(options)) {
    table_.library = options_.library;
  }

  // As Backend's.
  std::optional<Call> forward(const ConvDesc&, const ConvSlots&, Out y, Out statistics);
  std::optional<Call> dgrad(const ConvDesc&, const ConvSlots&, In dy, Out dx, Write);
  // Against dgrad, with what is left of the norm's backward pass behind each.
  std::optional<Call> dgrad_norm(const ConvDesc&, const ConvSlots&, const GroupNormDesc&,
                                 In mean_rstd, In dy, Out dz, Out sums);
  std::optional<Call> wgrad(const ConvDesc&, const ConvSlots&, In dy, Out dfilter, Write);
  // Against wgrad and a pass for the sums.
  std::optional<Call> wgrad_sums(const ConvDesc&, const ConvSlots&, In dy, Out dfilter, Write,
                                 Out sums, int stride, int offset);

  // As CudnnConvolutions'.
  const PlanTable& table() const { return table_; }
  void use(PlanTable given);
  int replaced() const { return replaced_; }

 private:
  class Slots;
  ConvChip chip() const { return {options_.shared_bytes, options_.wgmma_blocks}; }
  // What is asked for beyond the pass.
  struct With {
    int groups = 0;     // of the norm that a gradient is led back through
    bool sums = false;  // of dy, beside a filter's gradient
  };
  bool own(ConvPass, const ConvDesc&, Write, With with);
  bool faster(ConvPass, const ConvDesc&, Write, With with);
  Call own_call(ConvPass, const ConvDesc&, Write, const Slots&) const;
  Call composite(ConvPass, const ConvDesc&, Write, Slots&);
  Call own_norm_call(const ConvDesc&, const Slots&) const;
  Call norm_composite(const ConvDesc&, const Slots&);
  std::optional<Call> own_sums_call(const ConvDesc&, Write, const Slots&) const;
  Call sums_composite(const ConvDesc&, Write, Slots&);

  Backend& backend_;
  ConvLibrary& library_;
  ConvChoiceOptions options_;
  PlanTable table_, given_;
  int replaced_ = 0;
};

}  // namespace ddpm::cuda
