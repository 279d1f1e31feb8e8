// The ranks of a training run: who they are, and what each takes of its machine.
#pragma once

#include <memory>
#include <string>

#include "engine/comm.h"
#include "engine/parts.h"
#include "model/device.h"
#include "model/run_config.h"

namespace ddpm::tools {

// The ranks that mpirun started, or this process alone. Ends the process with Status::kPeer when
// another rank is lost: none came for `timeout` seconds.
std::unique_ptr<Communicator> join_ranks(double timeout);

// Error(kUsage) if a launcher has started several processes: each would do all of the work, and
// write the same files.
void require_one_process();

// The batch over ranks and parts; Error(kUsage) naming what does not divide it.
Parts parts_of(const TrainConfig&, Communicator&);

// All ranks: threads of a rank that was given no number. A machine's processors are shared by the
// ranks that may use the same ones; with --reduction-shards it is one, which every machine has: the
// result depends on it.
int threads_of_rank(const TrainConfig&, Communicator&);

// All ranks: "2 ranks by Open MPI 4.1.4: 0-1 on node7, CPU, 1 thread, AVX-512".
std::string ranks_text(Communicator&, const std::string& device);

}  // namespace ddpm::tools
