#!/usr/bin/env bash
# For a machine with an NVIDIA GPU but without network or root: downloads the Debian packages that
# the build needs beside CUDA, header-only and static ones, and unpacks them into .deps/. Copy the
# tree with it; tools/gpu_validate.sh builds from there.
set -euo pipefail
cd "$(dirname "$0")/.."

packages=(catch2 nlohmann-json3-dev libcli11-dev libxxhash-dev libboost1.74-dev
          libboost-context1.74-dev libeigen3-dev)
rm -rf .deps
mkdir -p .deps/download
(
  cd .deps/download
  if ((EUID == 0)); then  # apt's own user cannot write here
    apt-get -o APT::Sandbox::User=root download "${packages[@]}" >/dev/null
  else
    apt-get download "${packages[@]}" >/dev/null
  fi
)
for package in .deps/download/*.deb; do dpkg -x "$package" .deps; done
rm -rf .deps/download .deps/usr/share/doc

# Of Boost, Context alone and what it includes.
boost=.deps/usr/include/boost
find "$boost" -mindepth 1 -maxdepth 1 ! -name assert.hpp ! -name assert ! -name config \
  ! -name config.hpp ! -name detail ! -name context ! -name cstdint.hpp ! -name version.hpp \
  ! -name intrusive_ptr.hpp ! -name smart_ptr ! -name throw_exception.hpp -exec rm -rf {} +
rm -rf .deps/usr/include/eigen3/unsupported
find .deps -name '*.so*' -delete
echo "$(du -sm .deps | cut -f1) MB in .deps"
