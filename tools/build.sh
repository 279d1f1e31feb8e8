#!/usr/bin/env bash
# Installs the missing Debian packages (or lists them, when not root), configures a Release build and
# builds it in DDPM_BUILD_DIR (default build/). Further arguments go to cmake's configure step.
# DDPM_TARGET: what to build (default: the program and the tests).
set -euo pipefail
cd "$(dirname "$0")/.."

packages=(g++ cmake ninja-build git libdnnl-dev ocl-icd-opencl-dev libhwy-dev nlohmann-json3-dev
          libxxhash-dev libcli11-dev libpng-dev libjpeg-dev libzip-dev libeigen3-dev catch2
          libboost-context-dev libopenmpi-dev openmpi-bin)

missing=()
for package in "${packages[@]}"; do
  if ! dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q 'ok installed'; then
    missing+=("$package")
  fi
done
if ((${#missing[@]} > 0)); then
  if ((EUID != 0)); then
    echo "build.sh: these Debian packages are missing; install them as root with" >&2
    echo "  apt-get install ${missing[*]}" >&2
    exit 3
  fi
  export DEBIAN_FRONTEND=noninteractive
  apt-get update -qq
  apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
fi

build=${DDPM_BUILD_DIR:-build}
launcher=()
if command -v ccache >/dev/null; then launcher=(-DCMAKE_CXX_COMPILER_LAUNCHER=ccache); fi
cmake -S . -B "$build" -G Ninja -DCMAKE_BUILD_TYPE=Release "${launcher[@]}" "$@"
cmake --build "$build" ${DDPM_TARGET:+--target "$DDPM_TARGET"}
