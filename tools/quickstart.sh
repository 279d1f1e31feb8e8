#!/usr/bin/env bash
# From a clone to pictures: builds the program, trains the `tiny` preset on the built-in shapes for
# four to seven minutes (the second half at a falling rate, which straightens edges and cleans
# colours), samples 64 images and prints the path of the grid. SEED=1 draws others from the same
# model.
set -euo pipefail
cd "$(dirname "$0")/.."
build=${DDPM_BUILD_DIR:-build}
DDPM_TARGET=ddpm tools/build.sh -DDDPM_TESTS=OFF >&2

out=runs/quickstart
"$build/ddpm" train --preset tiny --data shapes --out "$out" --set train.cooldown_steps=2000
"$build/ddpm" sample --model "$out" --out "$out/samples.png" --num 64 \
  --sampler ddim --steps 100 --eta 1 --seed "${SEED:-0}"
