#!/usr/bin/env bash
# Compiles every CUDA kernel for sm_80 and sm_90a and reads the compiler's resource report: fails on
# a register spill, on local memory and on any warning. `-v` prints the whole table.
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

status=0
for source in kernels/cuda/*.cu; do
  for arch in sm_80 sm_90a; do
    log=$work/$(basename "$source").$arch
    if ! nvcc -std=c++20 -O3 --expt-relaxed-constexpr -Werror all-warnings -arch="$arch" -I. \
        -Ikernels/cuda -Xptxas -v -cubin -o "$work/out" "$source" >"$log" 2>&1; then
      cat "$log" >&2
      status=1
    fi
  done
done

# One line a kernel: registers, stack, spills, shared memory known at compile time.
awk -v verbose="${1:-}" '
  FNR == 1 { split(FILENAME, part, "/"); file = part[length(part)] }
  /Compiling entry function/ { name = $0; sub(/.*function .|. for .*/, "", name); sub(/. for .*/, "", name) }
  /bytes stack frame/ { stack = $1; stores = $5; loads = $9 }
  /Used [0-9]+ registers/ {
    for (i = 1; i < NF; ++i) if ($i == "Used") registers = $(i + 1)
    ++kernels
    if (registers > most) most = registers
    bad = stack > 0 || stores > 0 || loads > 0
    wrong += bad
    if (bad || verbose == "-v")
      printf "%s %s: %d registers, %d bytes stack, %d stored, %d loaded in spills\n", file, name, registers, stack, stores, loads
  }
  END {
    printf "%d kernels for two architectures, %d with local memory, at most %d registers\n", kernels, wrong, most
    exit wrong > 0 || kernels == 0
  }' "$work"/*.cu.* || status=1
exit $status
