// The convolutions of the paper's networks, as their kernels meet them.
#pragma once

#include <vector>

#include "kernels/desc.h"

namespace ddpm::test {

// h is the output's; 3x3 unless said otherwise.
struct Layer {
  int c1, c2, k, h;
  bool up = false;
  int stride = 1, kernel = 3;
};

inline const std::vector<Layer> kCifar10 = {
    {3, 0, 128, 32},
    {128, 0, 128, 32},
    {128, 0, 128, 16, false, 2},
    {128, 0, 256, 16},
    {256, 0, 256, 16},
    {256, 0, 256, 8, false, 2},
    {256, 0, 256, 8},
    {256, 0, 256, 4, false, 2},
    {256, 0, 256, 4},
    {256, 256, 256, 4},
    {256, 0, 256, 8, true},
    {256, 256, 256, 8},
    {256, 0, 256, 16, true},
    {256, 256, 256, 16},
    {256, 128, 256, 16},
    {256, 0, 256, 32, true},
    {256, 128, 128, 32},
    {128, 128, 128, 32},
    {128, 0, 3, 32},
    {128, 0, 256, 16, false, 1, 1},
    {256, 256, 256, 8, false, 1, 1},
    {256, 128, 128, 32, false, 1, 1},
};
inline const std::vector<Layer> kLarge = {
    {3, 0, 128, 256},
    {128, 0, 128, 256},
    {128, 0, 128, 128, false, 2},
    {128, 0, 128, 128},
    {128, 0, 256, 64},
    {256, 0, 256, 64},
    {256, 0, 256, 32, false, 2},
    {256, 0, 512, 16},
    {512, 0, 512, 16},
    {512, 0, 512, 8},
    {512, 512, 512, 8},
    {512, 0, 512, 16, true},
    {512, 256, 512, 16},
    {512, 256, 256, 32},
    {256, 256, 256, 32},
    {256, 0, 256, 64, true},
    {256, 128, 256, 64},
    {256, 128, 128, 128},
    {128, 0, 128, 256, true},
    {128, 128, 128, 256},
    {128, 0, 3, 256},
    {128, 128, 128, 256, false, 1, 1},
    {512, 256, 256, 32, false, 1, 1},
};

// `images` of it, read as they are.
inline ConvDesc desc_of(const Layer& l, int images) {
  ConvDesc d;
  const int in = l.up ? l.h / 2 : l.h * l.stride;
  d.x = {images, in, in, l.c1};
  d.c2 = l.c2;
  d.k = l.k;
  d.r = d.s = l.kernel;
  d.stride = l.stride;
  d.upsample = l.up;
  d.pad_top = d.pad_left = l.stride == 2 || l.kernel == 1 ? 0 : 1;
  d.pad_bottom = d.pad_right = l.kernel == 1 ? 0 : 1;
  d.bias = true;
  return d;
}

}  // namespace ddpm::test
