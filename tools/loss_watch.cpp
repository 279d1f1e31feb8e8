#include "tools/loss_watch.h"

#include <algorithm>
#include <cmath>
#include <vector>

namespace ddpm::tools {
namespace {

double median_of(std::vector<double> values) {
  if (values.empty()) return 0;
  const auto middle = values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  return *middle;
}

}  // namespace

double LossWatch::median() const { return median_of({window_.begin(), window_.end()}); }

bool LossWatch::is_spike(double loss) const {
  if (!std::isfinite(loss)) return true;
  if (window_.size() < kFewest) return false;
  const double middle = median();
  std::vector<double> distances;
  for (double v : window_) distances.push_back(std::abs(v - middle));
  constexpr double kDeviations = 1.4826;  // of a normal distribution, per median distance
  // Losses that hardly differ are no reason to call a tenth more a spike.
  const double spread = std::max(kDeviations * median_of(std::move(distances)), 0.02 * middle);
  return loss - middle > kSpikeScore * spread;
}

LossWatch::Verdict LossWatch::add(double loss) {
  const bool spike = is_spike(loss);
  spikes_ = spike ? spikes_ + 1 : 0;
  useless_ = loss <= useless_loss_ ? 0 : useless_ + 1;
  if (!spike) {
    window_.push_back(loss);
    if (window_.size() > kWindow) window_.pop_front();
  }
  if (spikes_ == kRow || useless_ == kRow) {
    *this = LossWatch(useless_loss_);  // what follows is the new measure
    return Verdict::kDiverged;
  }
  return spikes_ == 1 ? Verdict::kSpike : Verdict::kOrdinary;
}

}  // namespace ddpm::tools
