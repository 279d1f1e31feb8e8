// Files of feature sums: the statistics of a data set, which hold for every model that is compared
// with it, and what `ddpm eval --metric fid|is` has added up so far. Both are safetensors.
#pragma once

#include <string>

#include "tools/eval_progress.h"
#include "tools/feature_sums.h"

namespace ddpm::tools {

// Where statistics come from: hashes of the images and of the network, and the number of the code
// between them, which grows when it computes something else.
struct FeatureSource {
  std::string data, network, code;
};

// `mean` F64 (D), `covariance` F64 (D,D); the source and the count are in the metadata.
void write_statistics(const std::string& path, const FeatureSource&, const FeatureStatistics&);

struct StoredStatistics {
  FeatureSource source;
  FeatureStatistics statistics;
};
// Error(kConfig) where there is no file, or none of statistics or of so many features, and
// Error(kFile) where it is damaged.
StoredStatistics read_statistics(const std::string& path, size_t features);

struct FeatureProgress {
  Evaluation of;
  std::string numerics;   // Backend::numerics() of the network that makes the images
  FeatureSums reference;  // of the data set
  FeatureSums images;
  ScoreSums score;
};

void write_feature_progress(const std::string& path, const FeatureProgress&);
// Into a progress that has added up nothing, of the same evaluation. Errors as of
// read_eval_progress.
void read_feature_progress(const std::string& path, FeatureProgress&);

}  // namespace ddpm::tools
