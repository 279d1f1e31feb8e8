#include "tools/feature_sums.h"

#include <algorithm>
#include <cmath>

#include "kernels/error.h"

namespace ddpm::tools {

void FeatureSums::add(const float* values, int64_t images) {
  const size_t d = features();
  const std::vector<double> x(values, values + static_cast<size_t>(images) * d);
  count += images;
  for (size_t n = 0; n < x.size(); n += d)
    for (size_t i = 0; i < d; ++i) sum[i] += x[n + i];
  for (size_t i = 0; i < d; ++i) {  // a row of products stays in cache for all images
    double* row = products.data() + i * d;
    for (size_t n = 0; n < x.size(); n += d) {
      const double factor = x[n + i];
      for (size_t j = 0; j <= i; ++j) row[j] += factor * x[n + j];
    }
  }
}

FeatureStatistics FeatureSums::statistics() const {
  DDPM_CHECK(count >= 2, "statistics of %lld images", static_cast<long long>(count));
  const size_t d = features();
  const auto n = static_cast<double>(count);
  FeatureStatistics s{count, sum, std::vector<double>(d * d)};
  for (double& m : s.mean) m /= n;
  for (size_t i = 0; i < d; ++i)
    for (size_t j = 0; j <= i; ++j) {
      const double c = (products[i * d + j] - n * s.mean[i] * s.mean[j]) / (n - 1);
      s.covariance[i * d + j] = s.covariance[j * d + i] = c;
    }
  return s;
}

void ScoreSums::add(const float* logits, int64_t images) {
  const size_t k = classes();
  std::vector<double> e(k);
  for (int64_t i = 0; i < images; ++i, logits += k, ++count) {
    int64_t part = count * kParts / total;
    while (part + 1 < kParts && begin(part + 1) <= count) ++part;
    const double most = static_cast<double>(*std::max_element(logits, logits + k));
    double sum = 0, weighted = 0;
    for (size_t c = 0; c < k; ++c) sum += e[c] = std::exp(static_cast<double>(logits[c]) - most);
    const double log_sum = std::log(sum);
    for (size_t c = 0; c < k; ++c) {
      const double share = e[c] / sum;
      p[static_cast<size_t>(part) * k + c] += share;
      weighted += share * (static_cast<double>(logits[c]) - most - log_sum);
    }
    p_log_p[static_cast<size_t>(part)] += weighted;
  }
}

ScoreSums::Score ScoreSums::score() const {
  DDPM_CHECK(count == total && total >= kParts, "score of %lld of %lld images",
             static_cast<long long>(count), static_cast<long long>(total));
  double sum = 0, squares = 0;
  for (int64_t part = 0; part < kParts; ++part) {
    const auto n = static_cast<double>(begin(part + 1) - begin(part));
    double divergence = p_log_p[static_cast<size_t>(part)] / n;
    for (size_t c = 0; c < classes(); ++c) {
      const double mean = p[static_cast<size_t>(part) * classes() + c] / n;
      if (mean > 0) divergence -= mean * std::log(mean);
    }
    const double score = std::exp(divergence);
    sum += score;
    squares += score * score;
  }
  const double mean = sum / kParts;
  return {mean, std::sqrt(std::max(squares / kParts - mean * mean, 0.0))};
}

}  // namespace ddpm::tools
