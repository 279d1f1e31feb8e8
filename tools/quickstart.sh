#!/usr/bin/env bash
# From a clone to pictures: builds the program, trains the `tiny` preset on the built-in shapes for
# some five minutes (the last fifth at a lower learning rate, which cleans the colours), samples 64
# images and prints the path of the grid. SEED=1 draws others from the same model.
set -euo pipefail
cd "$(dirname "$0")/.."
build=${DDPM_BUILD_DIR:-build}
DDPM_TARGET=ddpm tools/build.sh -DDDPM_TESTS=OFF >&2

out=runs/quickstart
"$build/ddpm" train --preset tiny --data shapes --out "$out/first" --steps 4000
if [[ ! -e $out/config.json ]]; then
  start=(--resume "$out/first/checkpoints/step-00004000")
fi
"$build/ddpm" train --preset tiny --data shapes --out "$out" --steps 5000 --learning-rate 2e-4 \
  "${start[@]:---resume=auto}"
"$build/ddpm" sample --model "$out" --out "$out/samples.png" --num 64 --sampler ddim \
  --seed "${SEED:-0}"
