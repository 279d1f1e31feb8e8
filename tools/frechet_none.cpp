// Stands in for the distance where Eigen is absent.
#include "kernels/error.h"
#include "tools/frechet.h"

namespace ddpm::tools {

bool frechet_built() { return false; }

double frechet_distance(const FeatureStatistics&, const FeatureStatistics&) {
  fail(Status::kConfig,
       "this program was built without Eigen, which --metric fid needs; install libeigen3-dev and "
       "build it again");
}

}  // namespace ddpm::tools
