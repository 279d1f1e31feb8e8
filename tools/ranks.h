// The ranks of a command: who they are, and what each takes of its machine.
#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <string>

#include "engine/comm.h"
#include "engine/parts.h"
#include "model/device.h"
#include "model/run_config.h"
#include "tools/launch.h"

namespace ddpm::tools {

// Starts the ranks of --gpus N and returns what became of them, or nothing where this process is a
// rank itself. `advice`: what to do when one was killed. Error(kUsage) where a launcher has started
// others, Error(kDevice) where there are not so many GPUs.
std::optional<Status> start_ranks(const RankOptions&, const DeviceOptions&, const Launch&,
                                  const std::string& advice);

// This process among the ranks of its run, and the device it computes on. Ends the process with
// Status::kPeer, saying why and `advice`, when another rank is lost: none came for the timeout.
class Ranks {
 public:
  // Joins the ranks: by MPI, or by TCP where the launch says that they meet.
  Ranks(const Launch&, const DeviceOptions&, const RankOptions&, const std::string& advice);

  Communicator& communicator() { return nccl_ ? *nccl_ : *control_; }
  bool first() { return communicator().rank() == 0; }  // the rank that writes and speaks
  // All ranks: opens the device. Of a run in shards: see TrainConfig.
  Backend& open_device(int reduction_shards = 0);
  // All ranks, of a training: where the device is a GPU, gradients are summed by NCCL from here on.
  // AgreedError(kUsage) on CPUs that MPI has not started: nothing else sums there.
  void sum_on_device();
  // That is open, with this rank's GPU and threads.
  const DeviceOptions& device() const { return device_; }

  // What this rank does, all of it. By an error of its own the others leave too, with kPeer.
  Status run(const std::function<Status()>& work);

 private:
  Launch launch_;
  DeviceOptions device_;
  CommOptions options_;
  // In this order, so that what speaks of the device ends before it.
  std::unique_ptr<Communicator> control_;
  std::unique_ptr<Backend> backend_;
  std::unique_ptr<Communicator> nccl_;
};

// Error(kUsage) if a launcher has started several processes: each would do all of the work, and
// write the same files.
void require_one_process();

// All ranks: AgreedError(kUsage) where one has other settings than rank 0, as they say.
void require_equal_settings(Communicator&, const std::string& settings);

// All ranks: `make` plans on the backend. A GPU's plans are chosen by time: rank 0 chooses, the
// others take what it has.
void plan_alike(Communicator&, Backend&, const std::function<void()>& make);

// All ranks: "ranks    2 by Open MPI 4.1.4: 0 to 1 on node7, CPU, 1 thread, AVX-512", `more`, and
// whether their bits may differ; nothing of a process by itself.
void print_ranks(Communicator&, const Backend&, const char* more = "");

// The batch over ranks and parts; Error(kUsage) naming what does not divide it.
Parts parts_of(const TrainConfig&, Communicator&);

}  // namespace ddpm::tools
