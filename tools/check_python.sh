#!/usr/bin/env bash
# Installs the Python package from the source tree by pip, and checks it against ddpm.h, the built
# library and a model. Without numpy and pip (Debian: python3-numpy python3-pip) nothing is checked.
set -euo pipefail
cd "$(dirname "$0")/.."
build=${DDPM_BUILD_DIR:-build}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

python=/usr/bin/python3  # Debian's own, which Debian's numpy is for
if ! "$python" -c 'import setuptools, pip, numpy' 2>/dev/null && ((EUID == 0)); then
  export DEBIAN_FRONTEND=noninteractive
  apt-get update -qq
  apt-get install -y -qq --no-install-recommends \
    python3-numpy python3-pip python3-setuptools python3-wheel >/dev/null
fi
if ! "$python" -c 'import setuptools, pip, numpy'; then
  echo "check_python.sh: nothing is checked without python3-numpy, python3-pip, python3-setuptools"
  exit 0
fi

"$build/ddpm" train --preset tiny --data shapes --steps 1 --batch-size 1 --out "$work/run" \
  --sample-every 0 2>"$work/train.log" || { cat "$work/train.log"; exit 1; }
cp -r tools/python "$work/source"
"$python" -m pip install -q --no-deps --no-build-isolation --no-index --root-user-action=ignore \
  --target "$work/site" "$work/source"
DDPM_LIBRARY=$(realpath "$build/libddpm.so") PYTHONPATH=$work/site PYTHONSAFEPATH=1 \
  "$python" tools/python/check_package.py model/ddpm.h "$work/run"
DDPM_LIBRARY=$(realpath "$build/libddpm.so") PYTHONPATH=$work/site \
  "$python" docs/examples/sample.py "$work/run" "$work/images.npy" --steps 5
"$python" -c 'import numpy, sys
images = numpy.load(sys.argv[1])
assert images.ndim == 4 and images.dtype == numpy.uint8 and images.std() > 10' "$work/images.npy"
echo "example: ok"
