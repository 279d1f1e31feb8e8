// ddpm doctor: what this program can use here, and how to get what it cannot.
#include <cstdio>
#include <filesystem>

#include "engine/comm.h"
#include "tools/commands.h"
#include "tools/image_io.h"

namespace ddpm::tools {

Status run_doctor() {
  std::printf("%s\n", version_text().c_str());
  Status status = Status::kDevice;
  try {
    std::printf("cpu       ok: %s\n", make_cpu_backend({})->description().c_str());
    status = Status::kOk;
  } catch (const Error& e) {
    std::printf("cpu       missing: %s\n", e.what());
  }
  try {
    std::printf("cuda      ok: %s\n", make_cuda_backend({}, 0)->description().c_str());
  } catch (const Error& e) {
    std::printf("cuda      missing: %s\n", e.what());
  }
  std::printf("images    %s\n", images_built()
                                    ? "ok: PNG, JPEG, npz"
                                    : "missing: install libpng-dev, libjpeg-dev and libzip-dev and "
                                      "build again");
  std::printf("ranks     on CPUs %s\n",
              mpi_library().empty()
                  ? "missing: install libopenmpi-dev and openmpi-bin and build again"
                  : ("ok: mpirun, " + mpi_library()).c_str());
  std::printf("ranks     on GPUs %s\n",
              nccl_library().empty()
                  ? "missing: build with the CUDA backend and NCCL (libnccl-dev)"
                  : ("ok: --gpus N, torchrun, srun, mpirun, " + nccl_library()).c_str());
  std::error_code error;
  const auto space = std::filesystem::space(".", error);
  if (!error)
    std::printf("disk      %s free here\n",
                bytes_text(static_cast<size_t>(space.available)).c_str());
  return status;
}

}  // namespace ddpm::tools
