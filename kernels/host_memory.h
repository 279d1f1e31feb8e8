// How much of the host's memory is left.
#pragma once

#include <cstddef>

namespace ddpm {

// Bytes that can be taken without pushing other memory out, or that the control group still allows;
// the largest size_t where the system does not say.
size_t available_host_memory();

}  // namespace ddpm
