#include "tools/frechet.h"

#include <Eigen/Eigenvalues>
#include <algorithm>

#include "kernels/error.h"

namespace ddpm::tools {
namespace {

using Matrix = Eigen::MatrixXd;

Eigen::Map<const Matrix> covariance(const FeatureStatistics& s) {
  const auto d = static_cast<Eigen::Index>(s.features());
  return {s.covariance.data(), d, d};
}

}  // namespace

bool frechet_built() { return true; }

double frechet_distance(const FeatureStatistics& a, const FeatureStatistics& b) {
  DDPM_CHECK(a.features() == b.features(), "distance of %zu and %zu features", a.features(),
             b.features());
  Eigen::SelfAdjointEigenSolver<Matrix> solver(covariance(a));
  DDPM_CHECK(solver.info() == Eigen::Success, "eigenvalues of %zu features", a.features());
  const Matrix root =
      solver.eigenvectors() * solver.eigenvalues().cwiseMax(0.0).cwiseSqrt().asDiagonal();
  const Matrix product = root.transpose() * covariance(b) * root;
  solver.compute(product, Eigen::EigenvaluesOnly);
  DDPM_CHECK(solver.info() == Eigen::Success, "eigenvalues of %zu features", a.features());
  double distance = covariance(a).trace() + covariance(b).trace() -
                    2 * solver.eigenvalues().cwiseMax(0.0).cwiseSqrt().sum();
  for (size_t i = 0; i < a.features(); ++i)
    distance += (a.mean[i] - b.mean[i]) * (a.mean[i] - b.mean[i]);
  return std::max(distance, 0.0);  // of equal sets rounding may leave less
}

}  // namespace ddpm::tools
