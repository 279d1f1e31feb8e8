// Runs of N consecutive elements, fp32 or bf16 in memory and fp32 in registers, moved by the widest
// accesses that N elements allow. N is 1, 2, 4 or 8; the address is aligned to N elements.
#pragma once

#include <device/launch.h>
#include <device/math.h>
#include <device/memory.h>

namespace ddpm::cuda {

template <int N, typename Pointer>
__device__ __forceinline__ void load_floats(const Pointer& from, float (&to)[N], const float*) {
  constexpr int kWords = N < 4 ? N : 4;
#pragma unroll
  for (int i = 0; i < N; i += kWords) {
    const auto words = load_words<kWords>(from + i);
#pragma unroll
    for (int j = 0; j < kWords; ++j) to[i + j] = std::bit_cast<float>(words.w[j]);
  }
}
template <int N, typename Pointer>
__device__ __forceinline__ void load_floats(const Pointer& from, float (&to)[N], const bf16*) {
  if constexpr (N == 1) {
    to[0] = to_float(from[0]);
  } else {
    const auto words = load_words<N / 2>(from);
#pragma unroll
    for (int i = 0; i < N; i += 2) {
      to[i] = std::bit_cast<float>(words.w[i / 2] << 16);
      to[i + 1] = std::bit_cast<float>(words.w[i / 2] & 0xFFFF0000u);
    }
  }
}

template <int N, typename Pointer>
__device__ __forceinline__ void store_floats(const Pointer& to, const float (&from)[N], float*) {
  constexpr int kWords = N < 4 ? N : 4;
#pragma unroll
  for (int i = 0; i < N; i += kWords) {
    Words<kWords> words;
#pragma unroll
    for (int j = 0; j < kWords; ++j) words.w[j] = std::bit_cast<uint32_t>(from[i + j]);
    store_words(to + i, words);
  }
}
template <int N, typename Pointer>
__device__ __forceinline__ void store_floats(const Pointer& to, const float (&from)[N], bf16*) {
  if constexpr (N == 1) {
    to[0] = to_bf16(from[0]);
  } else {
    Words<N / 2> words;
#pragma unroll
    for (int i = 0; i < N; i += 2) words.w[i / 2] = pack_bf16(from[i], from[i + 1]);
    store_words(to, words);
  }
}

// to = from[0..N); T is the element type in memory.
template <typename T, int N, typename Pointer>
__device__ __forceinline__ void load_floats(const Pointer& from, float (&to)[N]) {
  load_floats(from, to, static_cast<const T*>(nullptr));
}
template <typename T, int N, typename Pointer>
__device__ __forceinline__ void store_floats(const Pointer& to, const float (&from)[N]) {
  store_floats(to, from, static_cast<T*>(nullptr));
}

// Threads over `count` elements, N each; the last run may be shorter, so it goes one by one.
// f.template operator()<N>(index) for a whole run, <1>(index) for an element of the rest.
template <int N, typename F>
__device__ __forceinline__ void for_run(int64_t count, F f) {
  const int64_t i = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) * N;
  if (i + N <= count) {
    f.template operator()<N>(i);
  } else {
    for (int64_t j = i; j < count; ++j) f.template operator()<1>(j);
  }
}

// Blocks of `block` threads over `count` elements, N per thread.
constexpr unsigned blocks_for(int64_t count, int n, unsigned block = 256) {
  const int64_t per_block = int64_t{block} * n;
  return static_cast<unsigned>((count + per_block - 1) / per_block);
}

}  // namespace ddpm::cuda
