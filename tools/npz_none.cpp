// Stands in for the .npz writer where libzip is absent.
#include "kernels/error.h"
#include "tools/npz.h"

namespace ddpm::tools {

void write_npz(const std::string& path, const uint8_t*, int64_t, int, int, int) {
  fail(Status::kConfig,
       "cannot write '%s': this program was built without libzip; install libzip-dev and build it "
       "again, or write a folder of PNG files",
       path.c_str());
}

}  // namespace ddpm::tools
