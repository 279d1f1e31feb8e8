// What computes plain convolutions beside our own kernels, and how long choosing may take.
#pragma once

#include <chrono>
#include <optional>

#include "kernels/backend.h"

namespace ddpm::cuda {

class ConvLibrary {
 public:
  virtual ~ConvLibrary() = default;
  // nullopt where the desc asks for more than taps, biases and residual.
  virtual std::optional<Call> forward(const ConvDesc&, const ConvSlots&, Out y) = 0;
  virtual std::optional<Call> dgrad(const ConvDesc&, const ConvSlots&, In dy, Out dx, Write) = 0;
  virtual std::optional<Call> wgrad(const ConvDesc&, const ConvSlots&, In dy, Out dfilter,
                                    Write) = 0;
};

// Seconds that measuring may take in all, by the clock on the wall. What is begun is ended.
class TuningBudget {
 public:
  explicit TuningBudget(double seconds) : left_(seconds) {}
  bool left() const { return left_.count() > 0; }

  // Charges the time that it lives.
  class Spending {
   public:
    explicit Spending(TuningBudget& budget) : budget_(budget) {}
    ~Spending() { budget_.left_ -= std::chrono::steady_clock::now() - start_; }
    Spending(const Spending&) = delete;
    Spending& operator=(const Spending&) = delete;

   private:
    TuningBudget& budget_;
    std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
  };

 private:
  std::chrono::duration<double> left_;
};

}  // namespace ddpm::cuda
