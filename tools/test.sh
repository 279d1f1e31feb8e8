#!/usr/bin/env bash
# Everything the project proves on a machine without a GPU, from a fresh clone: installs what it
# needs, builds with warnings as errors, runs the tests under ASan and UBSan, then as built.
# Prints seconds per group and closes with ctest's summary.
set -euo pipefail
cd "$(dirname "$0")/.."
build=${DDPM_BUILD_DIR:-build}

group() {  # group NAME COMMAND...: runs it and says how long it took
  local name=$1 start=$SECONDS
  shift
  echo "== $name"
  "$@"
  echo "== $name: $((SECONDS - start)) s"
}

check_format() {
  if command -v clang-format >/dev/null; then
    git ls-files '*.h' '*.hpp' '*.c' '*.cpp' '*.cu' | xargs clang-format --dry-run --Werror
  fi
}

# Without warnings as errors: under sanitizers GCC 12 warns of values that are set.
build_sanitized() {
  DDPM_BUILD_DIR=$build/sanitized tools/build.sh -DDDPM_WERROR=OFF -DDDPM_TESTS=ON -DDDPM_CUDA=OFF \
    -DDDPM_SANITIZE=address,undefined "-DCMAKE_CXX_FLAGS_RELEASE=-O1 -g1"
}

check_ptxas() {
  if command -v nvcc >/dev/null; then tools/check_ptxas.sh; fi
}

# As on a machine with a GPU, from .deps alone: no header of a package may come from the system.
# What is compiled and linked is the proof, not what the optimizer makes of it.
build_for_gpu() {
  if ! command -v nvcc >/dev/null; then return; fi
  if [[ ! -d .deps/usr ]]; then
    if ((EUID == 0)); then apt-get update -qq; fi
    tools/fetch_deps.sh
  fi
  local -x DDPM_BUILD_DIR=$build/gpu DDPM_GPU_OUT=$build/gpu-out
  tools/gpu_validate.sh configure
  cmake "$build/gpu" -DCMAKE_CXX_FLAGS_RELEASE=-O0 "-DCMAKE_CUDA_FLAGS_RELEASE=-O0 -Xptxas -O0" >/dev/null
  tools/gpu_validate.sh build
  if ninja -C "$build/gpu" -t deps |
    grep -E '^ */usr/include/(boost|catch2|CLI|eigen3|hwy|nlohmann|dnnl|png|jpeg|xxhash|zip)'; then
    echo "test.sh: the build from .deps has read these headers of the system" >&2
    return 1
  fi
}

group "format" check_format
group "build" tools/build.sh -DDDPM_WERROR=ON -DDDPM_TESTS=ON \
  "-DCMAKE_CUDA_ARCHITECTURES=90a-real"  # check_ptxas compiles for sm_80 as well
group "install tree and examples" tools/check_install.sh
group "Python package" tools/check_python.sh
group "files of ddpm sample" tools/check_files.sh
group "resources of the CUDA kernels" check_ptxas
group "coverage of the CUDA kernels on the host" "$build/ddpm_tests" --simt-coverage
group "build with sanitizers" build_sanitized
group "build as on a machine with a GPU" build_for_gpu
group "fuzzed parsers" tools/fuzz.sh 10
# Groups run side by side, and most of their time is one thread's; threads that wait must not spin.
export OMP_WAIT_POLICY=passive
group "tests with sanitizers" env UBSAN_OPTIONS=print_stacktrace=1 \
  ctest --test-dir "$build/sanitized" -j "$(nproc)" --output-on-failure
echo "== tests"
ctest --test-dir "$build" -j "$(nproc)" --output-on-failure
