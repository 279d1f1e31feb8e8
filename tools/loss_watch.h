// Notices losses that are out of the ordinary. What is ordinary is the median of those before and
// their median distance from it, so that neither an outlier nor a NaN can move it.
#pragma once

#include <cstddef>
#include <deque>

namespace ddpm::tools {

class LossWatch {
 public:
  enum class Verdict {
    kOrdinary,
    kSpike,     // over kSpikeScore for the first time in a row
    kDiverged,  // kRow losses in a row were over kSpikeScore, or over the useless one
  };

  static constexpr size_t kWindow = 128, kFewest = 20;
  static constexpr double kSpikeScore = 6;  // in standard deviations, by the median distance
  static constexpr int kRow = 20;
  static constexpr double kUseless = 1.5;  // of L_simple: predicting nothing has a loss of 1

  // `useless`: a loss that says that nothing was learned; infinite where none does, as of the
  // bound.
  explicit LossWatch(double useless = kUseless) : useless_loss_(useless) {}

  // The next loss; one that is not finite counts as a spike.
  Verdict add(double loss);
  double median() const;  // of the window; 0 while it is empty

 private:
  bool is_spike(double loss) const;

  double useless_loss_;
  std::deque<double> window_;     // without spikes
  int spikes_ = 0, useless_ = 0;  // in a row
};

}  // namespace ddpm::tools
