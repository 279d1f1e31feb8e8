#!/usr/bin/env bash
# What takes longer than tools/test.sh may: 1,000 kills, 8 threads x 200 samples under
# ThreadSanitizer, the library as another project's subfolder, and SECONDS of fuzzing a parser
# (default 600).
# Hours on two cores; its last counts stand in docs/reliability.md.
set -euo pipefail
cd "$(dirname "$0")/.."
seconds=${1:-600}
build=${DDPM_BUILD_DIR:-build}

tools/build.sh -DDDPM_TESTS=ON -DDDPM_CUDA=OFF
DDPM_TEST_KILLS=1000 "$build/ddpm_tests" "survival: killed*,ranks: killed*"
tools/check_threads.sh 8 200
tools/check_subfolder.sh
tools/fuzz.sh "$seconds"
