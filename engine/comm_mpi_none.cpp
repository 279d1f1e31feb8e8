// In place of comm_mpi.cpp, where there is no Open MPI.
#include <cstdlib>

#include "engine/comm.h"

namespace ddpm {

bool started_by_mpi() { return std::getenv("OMPI_COMM_WORLD_SIZE") != nullptr; }

std::unique_ptr<Communicator> make_mpi_communicator(const CommOptions&) {
  fail(Status::kUsage,
       "started by mpirun, but this program was built without MPI; install libopenmpi-dev and "
       "build it again, or start it by itself");
}

std::string mpi_library() { return {}; }

}  // namespace ddpm
