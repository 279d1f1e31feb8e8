// Scalars for TensorBoard: one of its event files, a sequence of checksummed records that each hold
// an Event message of protocol buffers.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "engine/file_io.h"

namespace ddpm::tools {

// Only grows, a record at a time. Of steps from `first_step` on, what other files of the same
// folder hold is void to a reader: so a run that goes on from a checkpoint shows no step twice.
class EventFile {
 public:
  // `wall_time` in seconds since 1970.
  EventFile(const std::string& path, double wall_time, uint64_t first_step);

  using Scalar = std::pair<const char*, double>;  // tag, value
  void add(double wall_time, uint64_t step, const std::vector<Scalar>& scalars);

 private:
  AppendFile file_;
};

// The CRC-32C that records carry (RFC 3720, appendix B.4).
uint32_t crc32c(const std::string& bytes);

}  // namespace ddpm::tools
