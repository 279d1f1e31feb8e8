#include <CLI/Version.hpp>
#include <nlohmann/json.hpp>

#include "engine/comm.h"
#include "tools/commands.h"
#include "version.h"

namespace ddpm::tools {

std::string version_text() {
  std::string text = format("ddpm %s (%s)\n", kVersion, kCommit);
  for (const std::string& libraries :
       {cpu_libraries(), cuda_libraries(), mpi_library(), nccl_library()})
    if (!libraries.empty()) text += libraries + "\n";
  return text + format("nlohmann/json %d.%d.%d, CLI11 %s", NLOHMANN_JSON_VERSION_MAJOR,
                       NLOHMANN_JSON_VERSION_MINOR, NLOHMANN_JSON_VERSION_PATCH, CLI11_VERSION);
}

}  // namespace ddpm::tools
