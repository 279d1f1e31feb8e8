// ddpm pack
#include <cstdio>

#include "tools/commands.h"
#include "tools/ranks.h"

namespace ddpm::tools {

void run_pack(const PackOptions& options) {
  require_one_process();
  require_writable_file(options.out);
  const PackResult r = pack(options);
  std::fprintf(
      stderr, "packed   %s images %dx%dx%d%s%s\n", grouped(r.count).c_str(), r.image.h, r.image.w,
      r.image.c, r.has_labels ? ", with labels" : "",
      r.ignored > 0 ? format(", %s other files ignored", grouped(r.ignored).c_str()).c_str() : "");
  std::printf("%s\n", options.out.c_str());
}

}  // namespace ddpm::tools
