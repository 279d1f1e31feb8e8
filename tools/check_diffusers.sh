#!/usr/bin/env bash
# Checks model folders against diffusers: tools/check_diffusers.sh [PROGRAM, default build/ddpm]
# Makes .venv from tools/bench/requirements.txt; DDPM_PYTHON names an interpreter to use instead.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
program=${1:-${DDPM_BUILD_DIR:-$root/build}/ddpm}
if [[ ! -x $program ]]; then
  echo "check_diffusers: $program is not a program; build it with tools/build.sh" >&2
  exit 2
fi

python=${DDPM_PYTHON:-$root/.venv/bin/python}
if [[ -z ${DDPM_PYTHON:-} ]]; then
  wanted=$root/tools/bench/requirements.txt
  installed=$root/.venv/requirements.txt # copied when all of it is installed
  if ! cmp -s "$wanted" "$installed"; then
    python3 -m venv "$root/.venv"
    "$python" -m pip install --quiet --requirement "$wanted"
    cp "$wanted" "$installed"
  fi
fi
exec "$python" -B "$root/tools/python/check_diffusers.py" "$program"
