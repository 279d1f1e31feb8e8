// The ranks of a training run: who they are, and what each takes of its machine.
#pragma once

#include <memory>
#include <string>

#include "engine/comm.h"
#include "engine/parts.h"
#include "model/device.h"
#include "model/run_config.h"
#include "tools/launch.h"

namespace ddpm::tools {

// This process among the ranks of its run, and the device it computes on. Ends the process with
// Status::kPeer when another rank is lost: none came for `timeout` seconds.
class Ranks {
 public:
  // Joins the ranks: by MPI, or by NCCL on the device that the options and the launch say.
  Ranks(const Launch&, const DeviceOptions&, double timeout);

  Communicator& communicator() { return nccl_ ? *nccl_ : *control_; }
  // All ranks: opens the device, if joining has not. Where it is a GPU, gradients are summed by
  // NCCL from here on.
  Backend& open_device(const TrainConfig&);

 private:
  Launch launch_;
  DeviceOptions device_;
  CommOptions options_;
  // In this order, so that what speaks of the device ends before it.
  std::unique_ptr<Communicator> control_;  // null where NCCL is all there is
  std::unique_ptr<Backend> backend_;
  std::unique_ptr<Communicator> nccl_;
};

// Error(kUsage) if a launcher has started several processes: each would do all of the work, and
// write the same files.
void require_one_process();

// The batch over ranks and parts; Error(kUsage) naming what does not divide it.
Parts parts_of(const TrainConfig&, Communicator&);

// All ranks: "2 ranks by Open MPI 4.1.4: 0-1 on node7, CPU, 1 thread, AVX-512".
std::string ranks_text(Communicator&, const std::string& device);

}  // namespace ddpm::tools
