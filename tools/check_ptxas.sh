#!/usr/bin/env bash
# Compiles every CUDA kernel for sm_80 and sm_90a and reads the compiler's resource report: fails on
# a register spill, on local memory and on any warning. `-v` prints the whole table.
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

compile() {  # compile SOURCE ARCH
  local log=$work/$(basename "$1").$2
  nvcc -std=c++20 -O3 --expt-relaxed-constexpr -Werror all-warnings -arch="$2" -I. -Ikernels/cuda \
    -Xptxas -v -cubin -o "$log.out" "$1" >"$log" 2>&1 && return
  cat "$log" >&2
  return 1
}
export work
export -f compile
status=0
for source in kernels/cuda/*.cu; do printf '%s %s\n' "$source" sm_80 "$source" sm_90a; done |
  xargs -P "$(nproc)" -n 2 bash -c 'compile "$@"' compile || status=1

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
  }' "$work"/*.cu.sm_{80,90a} || status=1
exit $status
