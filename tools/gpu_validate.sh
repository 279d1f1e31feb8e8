#!/usr/bin/env bash
# Everything that only a machine with an NVIDIA GPU can prove, without network or root.
#
#   tools/fetch_deps.sh                 # beforehand, where there is a network: fills .deps/
#   tools/gpu_validate.sh [PHASE...]    # all: configure build ceilings test sanitize bench train
#
# Each phase takes less than 10 minutes on 16 cores and leaves its log in $DDPM_GPU_OUT (default
# runs/gpu). A phase that has passed is skipped when the command is repeated; naming a phase runs it
# again. The last line is the report's path. A missing tool is a failure, not a skip.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${DDPM_GPU_OUT:-runs/gpu}
build=${DDPM_BUILD_DIR:-build/gpu}
phases=(configure build ceilings test sanitize bench train)
mkdir -p "$out"

need() {
  command -v "$1" >/dev/null && return
  echo "gpu_validate.sh: $1 is missing" >&2
  exit 3
}

# Where a Python wheel keeps cuDNN or NCCL: nvidia/NAME/{include,lib}, libraries by their versioned
# names.
wheel_folder() {
  python3 - "$1" <<'PY' 2>/dev/null || true
import importlib.util, os, sys
spec = importlib.util.find_spec("nvidia." + sys.argv[1])
print(list(spec.submodule_search_locations)[0] if spec else "")
PY
}

configure() {
  need nvcc
  need cmake
  need ninja
  local options=(-DDDPM_CUDA=ON -DDDPM_CPU=AUTO -DDDPM_IMAGES=AUTO -DDDPM_TESTS=ON
                 -DCMAKE_BUILD_TYPE=Release "-DCMAKE_PREFIX_PATH=$PWD/.deps/usr"
                 "-DCMAKE_CUDA_ARCHITECTURES=${DDPM_GPU_ARCH:-90a-real}")
  local wheel
  wheel=$(wheel_folder cudnn)
  if [[ -n $wheel ]]; then
    options+=("-DCUDNN_INCLUDE_DIR=$wheel/include" "-DCUDNN_LIBRARY=$wheel/lib/libcudnn.so.9")
  fi
  wheel=$(wheel_folder nccl)
  if [[ -n $wheel ]]; then
    options+=("-DNCCL_INCLUDE_DIR=$wheel/include" "-DNCCL_LIBRARY=$wheel/lib/libnccl.so.2")
  fi
  # Where .deps is, it is all there is: the same build everywhere, whatever the system has.
  if [[ -d .deps/usr ]]; then
    options+=("-DCMAKE_IGNORE_PREFIX_PATH=/usr;/" "-DCMAKE_MAKE_PROGRAM=$(command -v ninja)"
              "-DGIT_EXECUTABLE=$(command -v git)")
  fi
  cmake -S . -B "$build" -G Ninja "${options[@]}"
}

build() { cmake --build "$build" -j "$(nproc)"; }

# The two ceilings that every figure is held against, and one kernel of each kind.
ceilings() {
  nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,power.draw --format=csv
  "$build/ddpm" doctor
  "$build/ddpm" bench ceilings --device cuda --json "$out/ceilings.json"
  "$build/ddpm_tests" --device cuda "simt.cast*,simt.copy*,simt.silu*"
}

# The kernels' cases, whole grids, by groups so that one failure does not hide the rest.
test() {
  local failed=0
  while read -r name; do
    if "$build/ddpm_tests" --device cuda -d yes "$name" >"$out/case.log" 2>&1; then
      echo "ok      $name"
    else
      echo "FAILED  $name"
      tail -40 "$out/case.log"
      failed=1
    fi
  done < <("$build/ddpm_tests" --list-test-names-only "simt.*,cuda.*" | grep -v '^simt.machine')
  soak || failed=1
  return $failed
}

# Threads that share a model and a pool on the GPU, each image equal to one thread's; memory that grows.
soak() {
  rm -rf "$out/soak"
  "$build/ddpm" train --preset tiny --data shapes --device cuda --steps 1 --batch-size 1 \
    --sample-every 0 --out "$out/soak"
  SOAK_DEVICE=cuda "$build/ddpm_c_api_soak" threads "$out/soak" 8 200
  SOAK_DEVICE=cuda "$build/ddpm_c_api_soak" growth "$out/soak" 2000
}

sanitize() {
  need compute-sanitizer
  local tool
  for tool in memcheck racecheck initcheck synccheck; do
    echo "== $tool"
    compute-sanitizer --tool "$tool" --error-exitcode 1 "$build/ddpm_tests" --device cuda \
      "simt.*~simt.machine*~*networks' shapes*" | tail -20
  done
}

bench() {
  "$build/ddpm" bench ops --preset cifar10 --batch-size 128 --device cuda --json "$out/ops.json"
  "$build/ddpm" bench train --preset cifar10 --batch-size 128 --steps 100 --device cuda \
    --json "$out/train.json"
  "$build/ddpm" bench sample --preset cifar10 --batch-size 256 --steps 100 --device cuda \
    --json "$out/sample.json"
  "$build/ddpm" bench sample --preset cifar10 --batch-size 1 --steps 500 --device cuda \
    --json "$out/sample1.json"
  python3 tools/bench/pytorch_peer.py --ddpm "$build/ddpm" --device cuda
  # Worth something where the test phase has found its results right.
  "$build/ddpm" bench ops --preset cifar10 --batch-size 128 --device cuda --wgmma \
    --json "$out/ops_wgmma.json"
  "$build/ddpm" bench train --preset cifar10 --batch-size 128 --steps 100 --device cuda --wgmma \
    --json "$out/train_wgmma.json"
}

# Five minutes of the paper's network on 32x32 shapes, and what it draws then.
train() {
  timeout 300 "$build/ddpm" train --preset cifar10 --data shapes --device cuda --out "$out/shapes" \
    --steps 1000000 --save-every 2000 --set train.sample_every=0 --set train.warmup_steps=500 \
    --set train.ema_decay=0.999 || (($? == 124))
  "$build/ddpm" sample --model "$out/shapes" --device cuda --sampler ddim --num 64 \
    --out "$out/samples.safetensors"
  python3 tools/python/draw_grid.py "$out/samples.safetensors" "$out/samples.png"
}

run_phase() {
  local start=$SECONDS status=0
  echo "== $1"
  ("$1") > >(tee "$out/$1.log") 2>&1 || status=$?
  echo "== $1: $((SECONDS - start)) s, exit $status"
  rm -f "$out/$1.passed"
  if ((status == 0)); then touch "$out/$1.passed"; fi
  return $status
}

failed=0
if (($# > 0)); then
  for phase in "$@"; do
    if [[ ! " ${phases[*]} " == *" $phase "* ]]; then
      echo "gpu_validate.sh: unknown phase $phase; known: ${phases[*]}" >&2
      exit 2
    fi
    run_phase "$phase" || failed=1
  done
else
  for phase in "${phases[@]}"; do
    if [[ -e $out/$phase.passed ]]; then continue; fi
    run_phase "$phase" || failed=1
    # Nothing runs without a build.
    if ((failed)) && [[ $phase == configure || $phase == build ]]; then break; fi
  done
fi
if command -v nvidia-smi >/dev/null; then python3 tools/python/gpu_report.py "$out" "$build/ddpm"; fi
exit $failed
