// Gradients by central differences in double: the truth behind the references' own backward passes.
#pragma once

#include <vector>

namespace ddpm::ref {

// d f / d x of a scalar function of a vector. Error about step^2 plus 1e-16 / step.
template <typename F>
std::vector<double> difference_gradient(const F& f, std::vector<double> x, double step = 1e-5) {
  std::vector<double> gradient;
  gradient.reserve(x.size());
  for (double& v : x) {
    const double at = v;
    v = at + step;
    const double above = f(x);
    v = at - step;
    const double below = f(x);
    v = at;
    gradient.push_back((above - below) / (2 * step));
  }
  return gradient;
}

inline double dot(const std::vector<double>& a, const std::vector<double>& b) {
  double sum = 0;
  for (size_t i = 0; i < a.size(); ++i) sum += a.at(i) * b.at(i);
  return sum;
}

}  // namespace ddpm::ref
