#!/usr/bin/env bash
# The library under ThreadSanitizer: threads share a model and a pool, make, free and cancel, and
# their images are compared with one thread's to the bit. check_threads.sh [THREADS SAMPLES]
# Nothing is suppressed: with one thread each, no OpenMP region is entered, whose library
# ThreadSanitizer cannot see into.
set -euo pipefail
cd "$(dirname "$0")/.."
build=${DDPM_BUILD_DIR:-build}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# The smallest network there is: a step is little but calls.
"$build/ddpm" train --preset tiny --data shapes --steps 1 --batch-size 1 --sample-every 0 \
  --set unet.sample_size=4 --set unet.layers_per_block=1 --set 'unet.block_out_channels=[8]' \
  --set 'unet.down_block_types=["DownBlock2D"]' --set 'unet.up_block_types=["UpBlock2D"]' \
  --set unet.norm_num_groups=4 --out "$work/run" 2>"$work/train.log" ||
  { cat "$work/train.log"; exit 1; }
DDPM_BUILD_DIR=$build/tsan DDPM_TARGET=ddpm_c_api_soak tools/build.sh -DDDPM_CUDA=OFF \
  -DDDPM_TESTS=ON -DDDPM_SANITIZE=thread "-DCMAKE_CXX_FLAGS_RELEASE=-O1 -g1" >"$work/build.log" ||
  { cat "$work/build.log"; exit 1; }
TSAN_OPTIONS=exitcode=66 \
  "$build/tsan/ddpm_c_api_soak" threads "$work/run" "${1:-8}" "${2:-10}"
