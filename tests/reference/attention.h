// Self-attention in double, one query at a time.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels/desc.h"

namespace ddpm::ref {

using Vector = std::vector<double>;

struct Attention {
  Vector o, lse;  // (N,L,heads*D), (N,heads,L)
};

// Offset of element 0 of q (part 0), k (1) or v (2) of a token's head in qkv (N,L,3*heads*D).
inline int64_t qkv_at(const AttentionDesc& d, int64_t n, int64_t token, int64_t part,
                      int64_t head) {
  return ((n * d.tokens + token) * 3 + part) * d.width() + head * d.head_dim;
}

// softmax(q k^T / sqrt(D)) of one query, and its log-sum-exp.
inline Vector probabilities(const AttentionDesc& d, const Vector& qkv, int64_t n, int64_t head,
                            int64_t query, double* lse) {
  Vector s;
  for (int64_t j = 0; j < d.tokens; ++j) {
    double sum = 0;
    for (int64_t e = 0; e < d.head_dim; ++e)
      sum += qkv[qkv_at(d, n, query, 0, head) + e] * qkv[qkv_at(d, n, j, 1, head) + e];
    s.push_back(sum / std::sqrt(static_cast<double>(d.head_dim)));
  }
  const double max = *std::max_element(s.begin(), s.end());
  double sum = 0;
  for (const double v : s) sum += std::exp(v - max);
  *lse = max + std::log(sum);
  for (double& v : s) v = std::exp(v - *lse);
  return s;
}

inline Attention attention(const AttentionDesc& d, const Vector& qkv) {
  Attention out;
  out.o.assign(static_cast<size_t>(d.n) * d.tokens * d.width(), 0.0);
  for (int64_t n = 0; n < d.n; ++n)
    for (int64_t head = 0; head < d.heads; ++head)
      for (int64_t i = 0; i < d.tokens; ++i) {
        double lse = 0;
        const Vector p = probabilities(d, qkv, n, head, i, &lse);
        out.lse.push_back(lse);
        double* o = out.o.data() + (n * d.tokens + i) * d.width() + head * d.head_dim;
        for (int64_t j = 0; j < d.tokens; ++j)
          for (int64_t e = 0; e < d.head_dim; ++e) o[e] += p[j] * qkv[qkv_at(d, n, j, 2, head) + e];
      }
  return out;
}

// By the softmax's Jacobian: ds_j = p_j (dp_j - sum_k p_k dp_k). The sum is do . o; with
// `stored_o`, of that o, which may have been rounded.
inline Vector attention_backward(const AttentionDesc& d, const Vector& qkv, const Vector& d_o,
                                 const Vector& stored_o = {}) {
  Vector g(qkv.size(), 0.0);
  for (int64_t n = 0; n < d.n; ++n)
    for (int64_t head = 0; head < d.heads; ++head)
      for (int64_t i = 0; i < d.tokens; ++i) {
        double lse = 0, mean = 0;
        const Vector p = probabilities(d, qkv, n, head, i, &lse);
        const double* from = d_o.data() + (n * d.tokens + i) * d.width() + head * d.head_dim;
        const int64_t q = qkv_at(d, n, i, 0, head);
        Vector dp;
        for (int64_t j = 0; j < d.tokens; ++j) {
          const int64_t v = qkv_at(d, n, j, 2, head);
          double sum = 0;
          for (int64_t e = 0; e < d.head_dim; ++e) {
            sum += from[e] * qkv[v + e];
            g[v + e] += p[j] * from[e];
          }
          dp.push_back(sum);
          mean += p[j] * sum;
        }
        if (!stored_o.empty()) {
          const auto at = static_cast<size_t>(from - d_o.data());
          mean = 0;
          for (int64_t e = 0; e < d.head_dim; ++e) mean += from[e] * stored_o[at + e];
        }
        for (int64_t j = 0; j < d.tokens; ++j) {
          const int64_t k = qkv_at(d, n, j, 1, head);
          const double ds = p[j] * (dp[j] - mean) / std::sqrt(static_cast<double>(d.head_dim));
          for (int64_t e = 0; e < d.head_dim; ++e) {
            g[q + e] += ds * qkv[k + e];
            g[k + e] += ds * qkv[q + e];
          }
        }
      }
  return g;
}

}  // namespace ddpm::ref
