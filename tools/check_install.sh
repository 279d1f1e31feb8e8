#!/usr/bin/env bash
# Installs the build into a prefix, moves the prefix, and builds and runs the examples of
# docs/examples from there by CMake, by pkg-config and by the plain compiler, with the shared
# library and with the archive. Also configures a project that has this one as a subfolder.
set -euo pipefail
cd "$(dirname "$0")/.."
build=${DDPM_BUILD_DIR:-build}
examples=$PWD/docs/examples
program=$PWD/$build/ddpm
[[ $build = /* ]] && program=$build/ddpm
source=$PWD
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

fail() {
  echo "check_install.sh: $*" >&2
  exit 1
}

"$program" train --preset tiny --data shapes --steps 1 --batch-size 1 --out "$work/run" \
  --sample-every 0 >"$work/train.log" 2>&1 || fail "training of a model: $(cat "$work/train.log")"

cmake --install "$build" --prefix "$work/first" >/dev/null
mv "$work/first" "$work/moved"
prefix=$work/moved
lib=$(dirname "$(find "$prefix" -name libddpm.so)")
for file in bin/ddpm include/ddpm.h include/ddpm.hpp "${lib#"$prefix"/}/libddpm.a" \
  "${lib#"$prefix"/}/libddpm.so.0" "${lib#"$prefix"/}/pkgconfig/ddpm.pc" \
  "${lib#"$prefix"/}/cmake/ddpm/ddpm-config.cmake"; do
  [[ -e $prefix/$file ]] || fail "$file is not installed"
done
if grep -rIl -e "$work/first" -e "$source" "$prefix"; then
  fail "these installed files name the prefix or the source folder"
fi

# Every way must make the same picture.
make_picture() {  # make_picture NAME PROGRAM
  LD_LIBRARY_PATH=$lib "$2" "$work/run" "$work/$1.png" 5
  cmp "$work/$1.png" "$work/cmake.png" || fail "$1: another picture"
  echo "$1: ok"
}

cmake -S "$examples" -B "$work/cmake" -DCMAKE_PREFIX_PATH="$prefix" >/dev/null
cmake --build "$work/cmake" >/dev/null
"$work/cmake/sample" "$work/run" "$work/cmake.png" 5
[[ $(head -c 4 "$work/cmake.png" | tail -c 3) = PNG ]] || fail "no PNG"
make_picture cmake "$work/cmake/sample"
make_picture "cmake, archive" "$work/cmake/sample_static"
"$work/cmake/threads" "$work/run" >"$work/a.txt"
"$work/cmake/threads" "$work/run" >"$work/b.txt"
cmp "$work/a.txt" "$work/b.txt" || fail "threads: another result in another run"
[[ $(wc -l <"$work/a.txt") = 8 ]] || fail "threads: not eight images"
echo "threads: ok"

strict="-std=c99 -pedantic-errors -Wall -Wextra -Werror"
export PKG_CONFIG_PATH=$lib/pkgconfig
if ! command -v pkg-config >/dev/null && ((EUID == 0)); then
  apt-get update -qq
  apt-get install -y -qq --no-install-recommends pkg-config >/dev/null
fi
if ! command -v pkg-config >/dev/null; then
  echo "pkg-config: not checked, it is not installed"
else
  # shellcheck disable=SC2046,SC2086
  cc $strict "$examples/sample.c" -o "$work/by_pkg" $(pkg-config --cflags --libs ddpm)
  make_picture pkg-config "$work/by_pkg"
  archive=$(pkg-config --cflags --libs --static ddpm | sed "s|-lddpm|$lib/libddpm.a|")
  # shellcheck disable=SC2086
  cc $strict "$examples/sample.c" -o "$work/by_pkg_static" $archive
  make_picture "pkg-config, archive" "$work/by_pkg_static"
fi
# shellcheck disable=SC2086
cc $strict "$examples/sample.c" -I"$prefix/include" -L"$lib" -lddpm -o "$work/by_cc"
make_picture cc "$work/by_cc"

# As a subfolder: the library, no program, no tests.
mkdir "$work/outer"
cat >"$work/outer/CMakeLists.txt" <<END
cmake_minimum_required(VERSION 3.25)
project(outer LANGUAGES C CXX)
add_subdirectory($source ddpm)
add_executable(sample $examples/sample.c)
target_link_libraries(sample PRIVATE ddpm::ddpm)
if(TARGET ddpm_tests OR TARGET ddpm_tools)
  message(FATAL_ERROR "tests or tools in a subproject")
endif()
END
cmake -S "$work/outer" -B "$work/outer/build" -DDDPM_CUDA=OFF >"$work/outer.log" 2>&1 ||
  fail "as a subfolder: $(cat "$work/outer.log")"
echo "subfolder: ok"

# What hardening leaves in the library.
dynamic=$(readelf -dW "$lib/libddpm.so")
grep -q BIND_NOW <<<"$dynamic" || fail "libddpm.so is not linked with -z now"
grep -q 'SONAME.*\[libddpm.so.0\]' <<<"$dynamic" || fail "libddpm.so has another SONAME"
segments=$(readelf -lW "$lib/libddpm.so")
grep -q GNU_RELRO <<<"$segments" || fail "libddpm.so is not linked with -z relro"
grep GNU_STACK <<<"$segments" | grep -q 'RWE' && fail "libddpm.so has an executable stack"
echo "hardening: ok"
