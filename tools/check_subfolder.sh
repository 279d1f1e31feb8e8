#!/usr/bin/env bash
# A project that has this one as a subfolder: the library, no program, no tests. With `configure`
# it is not built; else a picture is made with it.
set -euo pipefail
cd "$(dirname "$0")/.."
source=$PWD
build=${DDPM_BUILD_DIR:-build}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

cat >"$work/CMakeLists.txt" <<END
cmake_minimum_required(VERSION 3.25)
project(outer LANGUAGES C CXX)
add_subdirectory($source ddpm)
add_executable(sample $source/docs/examples/sample.c)
target_link_libraries(sample PRIVATE ddpm::ddpm)
if(TARGET ddpm_tests OR TARGET ddpm_tools)
  message(FATAL_ERROR "tests or tools in a subproject")
endif()
END
launcher=()
if command -v ccache >/dev/null; then launcher=(-DCMAKE_CXX_COMPILER_LAUNCHER=ccache); fi
cmake -S "$work" -B "$work/build" -G Ninja -DCMAKE_BUILD_TYPE=Release -DDDPM_CUDA=OFF \
  "${launcher[@]}" >"$work/log" || { cat "$work/log"; exit 1; }
echo "subfolder: configured"
[[ ${1:-} != configure ]] || exit 0

cmake --build "$work/build" >"$work/log" || { cat "$work/log"; exit 1; }
"$build/ddpm" train --preset tiny --data shapes --steps 1 --batch-size 1 --out "$work/run" \
  --sample-every 0 >"$work/log" 2>&1 || { cat "$work/log"; exit 1; }
"$work/build/sample" "$work/run" "$work/picture.png" 5
[[ -s $work/picture.png ]] || { echo "check_subfolder.sh: no picture" >&2; exit 1; }
echo "subfolder: ok"
