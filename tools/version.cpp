#include <CLI/Version.hpp>
#include <nlohmann/json.hpp>

#include "tools/commands.h"
#include "version.h"

namespace ddpm::tools {

std::string version_text() {
  return format("ddpm %s (%s)\n%s\nnlohmann/json %d.%d.%d, CLI11 %s", kVersion, kCommit,
                cpu_libraries().c_str(), NLOHMANN_JSON_VERSION_MAJOR, NLOHMANN_JSON_VERSION_MINOR,
                NLOHMANN_JSON_VERSION_PATCH, CLI11_VERSION);
}

}  // namespace ddpm::tools
