#!/usr/bin/env bash
# Everything the project proves on a machine without a GPU, from a fresh clone: installs what it
# needs, builds with warnings as errors, runs the tests, then runs them again under ASan and UBSan.
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

build_sanitized() {
  cmake -S . -B "$build/sanitized" -G Ninja -DCMAKE_BUILD_TYPE=RelWithDebInfo \
    -DCMAKE_CXX_FLAGS_RELWITHDEBINFO="-O1 -g1" -DDDPM_SANITIZE=address,undefined \
    -DDDPM_WERROR=ON >/dev/null
  cmake --build "$build/sanitized" --target ddpm ddpm_tests
}

check_format() {
  if command -v clang-format >/dev/null; then
    git ls-files '*.h' '*.cpp' | xargs clang-format --dry-run --Werror
  fi
}

group "build" tools/build.sh -DDDPM_WERROR=ON -DDDPM_TESTS=ON
group "format" check_format
group "sanitized build" build_sanitized
# libgomp and oneDNN keep their thread pools to the end, which is no leak of ours.
group "sanitized tests" env ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
  ctest --test-dir "$build/sanitized" --output-on-failure -L unit
group "tests" ctest --test-dir "$build" --output-on-failure
