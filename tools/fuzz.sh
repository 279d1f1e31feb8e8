#!/usr/bin/env bash
# Fuzzes every parser of files from elsewhere: tools/fuzz.sh [SECONDS a target, default 10].
# Needs clang with libFuzzer. Prints inputs tried and code reached, per target; what breaks one is
# kept in DDPM_BUILD_DIR/fuzz/found, and inputs that reach something new in .../fuzz/corpus.
set -euo pipefail
cd "$(dirname "$0")/.."
build=${DDPM_BUILD_DIR:-build}/fuzz
export seconds=${1:-10}

packages=(clang-14 libclang-rt-14-dev zlib1g-dev)
if ! dpkg-query -W "${packages[@]}" >/dev/null 2>&1; then
  if ((EUID != 0)); then
    echo "fuzz.sh: as root: apt-get install ${packages[*]}" >&2
    exit 3
  fi
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${packages[@]}" >/dev/null
fi

launcher=()
if command -v ccache >/dev/null; then launcher=(-DCMAKE_CXX_COMPILER_LAUNCHER=ccache); fi
cmake -S tests/fuzz -B "$build" -G Ninja -DCMAKE_CXX_COMPILER=clang++-14 "${launcher[@]}" >/dev/null
cmake --build "$build"
cd "$build"
./fuzz_seeds seeds
mkdir -p found corpus

fuzz() {  # fuzz TARGET
  local log=fuzz_$1.log
  mkdir -p "corpus/$1"
  if ! "./fuzz_$1" -max_total_time="$seconds" -print_final_stats=1 -timeout=10 \
    -rss_limit_mb=1536 -max_len=16384 -artifact_prefix="found/$1-" "corpus/$1" "seeds/$1" \
    >"$log" 2>&1; then
    tail -n 40 "$log" >&2
    echo "fuzz.sh: $1 broke; the input is in $PWD/found" >&2
    return 1
  fi
  awk -v target="$1" '
    /number_of_executed_units/ { inputs = $2 }
    /peak_rss_mb/ { rss = $2 }
    match($0, /cov: [0-9]+/) { cov = substr($0, RSTART + 5, RLENGTH - 5) }
    END { printf "%-12s %9d inputs, %5d edges, %4d MB\n", target, inputs, cov, rss
          exit inputs == 0 }' "$log"
}
export -f fuzz
printf '%s\n' safetensors config manifest packed cifar png jpeg progress suspended |
  xargs -P "$(nproc)" -I{} bash -c 'fuzz {}'
