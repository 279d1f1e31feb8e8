// What docs/kernels.md says of each convolution of the paper's networks, from the plans themselves.
#pragma once

#include <string>

namespace ddpm::test {

// The tables of both networks, in Markdown.
std::string conv_tables();

}  // namespace ddpm::test
