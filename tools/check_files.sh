#!/usr/bin/env bash
# What `ddpm sample` touches, by strace: its model, its output and what the system's libraries read.
# No network, no other program. Without strace, or where it may not trace, nothing is checked.
set -euo pipefail
cd "$(dirname "$0")/.."
build=${DDPM_BUILD_DIR:-build}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

if ! command -v strace >/dev/null && ((EUID == 0)); then
  apt-get update -qq
  apt-get install -y -qq --no-install-recommends strace >/dev/null
fi
if ! strace -e trace=none true 2>/dev/null; then
  echo "check_files.sh: nothing is checked without strace"
  exit 0
fi

"$build/ddpm" train --preset tiny --data shapes --steps 1 --batch-size 1 --out "$work/run" \
  --sample-every 0 2>"$work/train.log" || { cat "$work/train.log"; exit 1; }
strace -f -qq -e trace=%network,%process,open,openat,openat2,creat,rename,renameat,renameat2,unlink \
  -o "$work/calls" "$build/ddpm" sample --model "$work/run" --out "$work/grid.png" --num 2 \
  --sampler ddim --steps 3 --device cpu >/dev/null 2>&1

if grep -E 'socket|connect|bind|sendto|recvfrom' "$work/calls"; then
  echo "check_files.sh: the network" >&2
  exit 1
fi
if [[ $(grep -c execve "$work/calls") != 1 ]]; then
  echo "check_files.sh: another program was started" >&2
  exit 1
fi
# Paths that were opened, renamed or removed, without failures.
sed -n '/ = -1 /!s/.*\(open\|openat\|openat2\|creat\|rename[a-z0-9]*\|unlink\)(//p' "$work/calls" |
  grep -o '"[^"]*"' | tr -d '"' | sort -u >"$work/paths"
grep -q "$work/grid.png" "$work/paths"
grep -q "diffusion_pytorch_model.safetensors" "$work/paths"
# The system's, ours, and what lies beside the libraries that the program is linked with (CUDA's).
{
  printf '%s\n' "^($work/run|$work/\.?grid\.png|$work\$)" \
    '^(/lib|/usr/lib|/etc/ld\.so|/proc/|/sys/|/dev/(null|nvidia))'
  ldd "$build/ddpm" | sed -n 's/.*=> \(\/.*\)\/[^/]* (.*/\1/p' | sort -u | sed 's/[.+]/\\&/g; s/.*/^&\/lib[^\/]*$/'
} >"$work/allowed"
if grep -vE -f "$work/allowed" "$work/paths"; then
  echo "check_files.sh: these files were opened too" >&2
  exit 1
fi
echo "files: $(grep -c "^$work" "$work/paths") of ours, $(grep -vc "^$work" "$work/paths") of the system"
