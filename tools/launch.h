// Which of several processes this one is, as what started it says in environment variables: Open
// MPI's mpirun, torchrun (and --gpus N, which speaks its words), Slurm's srun.
#pragma once

#include <string>

namespace ddpm::tools {

// What a user says of the ranks of a command.
struct RankOptions {
  int gpus = 1;         // ranks that this program starts itself, one each
  double timeout = 60;  // seconds without a sign of life after which another rank is lost
};

struct Launch {
  enum class By { kNothing, kMpi, kTorchrun, kSlurm };
  By by = By::kNothing;
  int rank = 0, size = 1;  // of kMpi as MPI says, later
  int local_rank = 0;      // among those on this machine
  std::string meeting;     // "host:port" that ranks meet at, where MPI does not tell them
};

// Error(kUsage) naming a variable that is missing or no number.
Launch find_launch();

}  // namespace ddpm::tools
