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

install_package() {  # install_package COMMAND-OR-HEADER PACKAGE: what a check can do without
  if ! command -v "$1" >/dev/null && [[ ! -e $1 ]] && ((EUID == 0)); then
    apt-get update -qq
    apt-get install -y -qq --no-install-recommends "$2" >/dev/null
  fi
}

# Every way must make the same picture.
make_picture() {  # make_picture NAME PROGRAM
  LD_LIBRARY_PATH=$lib "$2" "$work/run" "$work/$1.png" 5
  cmp "$work/$1.png" "$work/cmake.png" || fail "$1: another picture"
  echo "$1: ok"
}

install_package /usr/include/microhttpd.h libmicrohttpd-dev
cmake -S "$examples" -B "$work/cmake" -DCMAKE_PREFIX_PATH="$prefix" >/dev/null
cmake --build "$work/cmake" >/dev/null
"$work/cmake/sample" "$work/run" "$work/cmake.png" 5
[[ $(head -c 4 "$work/cmake.png" | tail -c 3) = PNG ]] || fail "no PNG"
make_picture cmake "$work/cmake/sample"
make_picture "cmake, archive" "$work/cmake/sample_static"
twice() {  # twice NAME LINES: the same lines in two runs
  "$work/cmake/$1" "$work/run" >"$work/a.txt"
  "$work/cmake/$1" "$work/run" >"$work/b.txt"
  cmp "$work/a.txt" "$work/b.txt" || fail "$1: another result in another run"
  [[ $(wc -l <"$work/a.txt") = "$2" ]] || fail "$1: not $2 lines"
  echo "$1: ok"
}
twice threads 8
twice service 12

get() {  # get PATH FILE: the answer's body; prints its status
  exec 3<>"/dev/tcp/127.0.0.1/$port"
  printf 'GET %s HTTP/1.0\r\n\r\n' "$1" >&3
  cat <&3 >"$2.answer"
  exec 3>&-
  sed -e '1,/^\r*$/d' "$2.answer" >"$2"
  head -1 "$2.answer" | tr -d '\r' | cut -d ' ' -f 2
}
if [[ ! -x $work/cmake/http_server ]]; then
  echo "http_server: not checked, libmicrohttpd-dev is not installed"
else
  "$work/cmake/http_server" "$work/run" >"$work/url.txt" &
  server=$!
  trap 'kill $server 2>/dev/null || true; rm -rf "$work"' EXIT
  for _ in {1..300}; do
    [[ -s $work/url.txt ]] && break
    sleep 0.1
  done
  port=$(sed 's/.*://' "$work/url.txt")
  clients=()
  for k in 1 2; do
    get "/sample?n=4&steps=5" "$work/http$k.png" >"$work/status$k" &
    clients+=($!)
  done
  wait "${clients[@]}"
  [[ $(cat "$work/status1" "$work/status2") = $'200\n200' ]] || fail "http_server: no picture"
  cmp "$work/http1.png" "$work/http2.png" || fail "http_server: another picture"
  [[ $(get "/sample?steps=5&n=0" "$work/text") = 400 ]] || fail "http_server: n=0 is not refused"
  [[ $(get "/sample?steps=x" "$work/text") = 400 ]] || fail "http_server: steps=x is not refused"
  [[ $(get "/nowhere" "$work/text") = 404 ]] || fail "http_server: /nowhere"
  [[ $(get "/status" "$work/text") = 200 ]] || fail "http_server: /status"
  grep -q '"running": 0, "waiting": 0, "images": 8' "$work/text" || fail "http_server: status"
  kill -TERM "$server"
  wait "$server" || fail "http_server: does not end well"
  trap 'rm -rf "$work"' EXIT
  echo "http_server: ok"
fi

strict="-std=c99 -pedantic-errors -Wall -Wextra -Werror"
export PKG_CONFIG_PATH=$lib/pkgconfig
install_package pkg-config pkg-config
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

# The CUDA program is compiled; where there is no GPU it says so.
if command -v nvcc >/dev/null; then
  nvcc -arch=sm_90 "$examples/sample_cuda.cu" -I"$prefix/include" -L"$lib" -lddpm \
    -o "$work/sample_cuda"
  if [[ ! -e /dev/nvidiactl ]]; then
    status=0
    LD_LIBRARY_PATH=$lib "$work/sample_cuda" "$work/run" 2>"$work/cuda.log" || status=$?
    [[ $status = 6 ]] || fail "sample_cuda: status $status, $(cat "$work/cuda.log")"
  fi
  echo "sample_cuda: compiled"
fi

# As a subfolder there are neither tests nor program; tools/check_subfolder.sh builds it.
tools/check_subfolder.sh configure

install_package doxygen doxygen
if ! command -v doxygen >/dev/null; then
  echo "doxygen: not checked, it is not installed"
else
  sed "s|^OUTPUT_DIRECTORY.*|OUTPUT_DIRECTORY = $work/doxygen|" docs/Doxyfile | doxygen - ||
    fail "doxygen warns of ddpm.h"
  [[ -s $work/doxygen/html/ddpm_8h.html ]] || fail "doxygen wrote no page of ddpm.h"
  echo "doxygen: ok"
fi

# What hardening leaves in the library.
dynamic=$(readelf -dW "$lib/libddpm.so")
grep -q BIND_NOW <<<"$dynamic" || fail "libddpm.so is not linked with -z now"
grep -q 'SONAME.*\[libddpm.so.0\]' <<<"$dynamic" || fail "libddpm.so has another SONAME"
segments=$(readelf -lW "$lib/libddpm.so")
grep -q GNU_RELRO <<<"$segments" || fail "libddpm.so is not linked with -z relro"
grep GNU_STACK <<<"$segments" | grep -q 'RWE' && fail "libddpm.so has an executable stack"
symbols=$(nm -D --undefined-only "$lib/libddpm.so")
for symbol in __stack_chk_fail __snprintf_chk _ZSt21__glibcxx_assert_fail; do
  grep -q "$symbol" <<<"$symbols" || fail "libddpm.so does not call $symbol"
done
echo "hardening: ok"
