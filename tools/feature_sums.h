// What is added up of the features and class logits of images, one after the other: enough for the
// Frechet inception distance and the inception score. Sums are in double and in the images' order,
// so they do not depend on how the images come in batches.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace ddpm::tools {

// Of a set of images: the mean (D) of their features and the covariance (D,D), over count - 1.
struct FeatureStatistics {
  int64_t count = 0;
  std::vector<double> mean, covariance;

  size_t features() const { return mean.size(); }
};

struct FeatureSums {
  explicit FeatureSums(size_t features) : sum(features, 0.0), products(features * features, 0.0) {}

  int64_t count = 0;
  std::vector<double> sum;       // (D)
  std::vector<double> products;  // (D,D) of feature i and feature j <= i; zero above

  size_t features() const { return sum.size(); }
  void add(const float* features, int64_t images);  // (images, D)
  FeatureStatistics statistics() const;             // of two images or more
};

// Salimans et al. 2016: exp of the mean KL(p(y|x) || p(y)) of each of ten parts of the images, in
// their order. Logits are without the bias, as in that paper's code.
struct ScoreSums {
  static constexpr int64_t kParts = 10;

  ScoreSums(int64_t images, size_t classes)
      : total(images), p(kParts * classes, 0.0), p_log_p(kParts, 0.0) {}

  int64_t total = 0, count = 0;  // images that will come, that have come
  std::vector<double> p;         // (parts, classes): sum of p(y|x)
  std::vector<double> p_log_p;   // (parts): sum of p(y|x) ln p(y|x)

  size_t classes() const { return p.size() / kParts; }
  void add(const float* logits, int64_t images);  // (images, classes)

  // Mean and standard deviation over the parts; of kParts images or more, when all have come.
  struct Score {
    double mean = 0, deviation = 0;
  };
  Score score() const;

 private:
  int64_t begin(int64_t part) const { return part * total / kParts; }
};

}  // namespace ddpm::tools
