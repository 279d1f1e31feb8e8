// The host's version of kernels/cuda/device/launch.h.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <string_view>
#include <type_traits>

#include "kernels/error.h"
#include "tests/simt/machine.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __restrict__
#define __launch_bounds__(...)

#define threadIdx (::ddpm::simt::thread_index())
#define blockIdx (::ddpm::simt::block_index())
#define blockDim (::ddpm::simt::block_dim())
#define gridDim (::ddpm::simt::grid_dim())

namespace ddpm::cuda {

struct LaunchShape {
  unsigned grid_x = 1, grid_y = 1, grid_z = 1;
  unsigned block = 256;
  size_t shared = 0;
};

// "silu_kernel<float>", from the compiler's name of this function.
template <auto Kernel>
std::string_view kernel_name() {
  std::string_view name = __PRETTY_FUNCTION__;
  name.remove_prefix(name.find("Kernel = ") + 9);
  name = name.substr(0, name.rfind("; std::string_view"));
  const size_t arguments = name.find('<');
  const size_t scope = name.substr(0, arguments).rfind("::");
  return scope == std::string_view::npos ? name : name.substr(scope + 2);
}

template <auto Kernel>
struct Registered {
  static inline const bool value = (simt::register_kernel(kernel_name<Kernel>()), true);
};

template <typename... P, typename... Args>
auto bind_arguments(void (*kernel)(P...), Args... args) {
  return [kernel, ... bound = P(args)] { kernel(bound...); };
}

template <auto Kernel, typename... Args>
void launch(const LaunchShape& s, void*, Args... args) {
  static_cast<void>(Registered<Kernel>::value);
  const std::string_view name = kernel_name<Kernel>();
  simt::note_run(name);  // before it: a planted error ends a kernel that did run
  simt::run({name, {s.grid_x, s.grid_y, s.grid_z}, s.block, s.shared},
            bind_arguments(Kernel, args...));
}

}  // namespace ddpm::cuda
