// The distance of two sets of images by the statistics of their features; Eigen computes it.
#pragma once

#include "tools/feature_sums.h"

namespace ddpm::tools {

// Whether this program has it.
bool frechet_built();

// |m1 - m2|^2 + tr(S1 + S2 - 2 sqrt(S1 S2)) of two Gaussians (Heusel et al. 2017), in double. With
// S1 = A A^T the root's trace is the sum of the roots of the eigenvalues of A^T S2 A, which is
// symmetric; those that rounding left below zero count as zero. Of D features it takes 10 to 20 D^3
// operations, on one thread.
double frechet_distance(const FeatureStatistics&, const FeatureStatistics&);

}  // namespace ddpm::tools
