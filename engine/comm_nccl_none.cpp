// In place of comm_nccl.cpp, where there is no NCCL.
#include "engine/comm.h"

namespace ddpm {

std::unique_ptr<Communicator> make_nccl_communicator(Backend&, Communicator& control,
                                                     const CommOptions&) {
  fail(
      Status::kUsage,
      "%d ranks on GPUs, but this program was built without NCCL; install libnccl-dev and build it "
      "again, or use --device cpu",
      control.size());
}

std::string nccl_library() { return {}; }

}  // namespace ddpm
