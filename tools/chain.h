// How the chains of a sampler go, as the command line says it, and a model's chain made ready.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "engine/comm.h"
#include "model/generator.h"
#include "model/pipeline.h"
#include "tools/stop_signal.h"

namespace ddpm::tools {

struct ChainArgs {
  std::string sampler, spacing;  // "": the command's, the sampler's own
  std::vector<int> timesteps;    // in place of steps and spacing
  std::optional<int> steps;      // the sampler's default
  double eta = 0;
  std::string clip;          // "on", "off"; "": the model's configuration
  std::optional<int> label;  // of all images; else image number mod classes
  double guidance = 1;

  friend bool operator==(const ChainArgs&, const ChainArgs&) = default;
};

SamplerOptions sampler_options(const ChainArgs&, SamplerKind usual);
// Error(kUsage) naming the one of label and guidance that the network cannot follow.
void require_classes(const ChainArgs&, const UNetConfig&);

struct Chain {
  std::unique_ptr<ParamStore> store;
  std::unique_ptr<Generator> generator;
  size_t bytes() const { return store->bytes() + generator->bytes(); }
};

// With the weights in place. guidance: as Generator's, which 1 needs none of. label: of images that
// are given none, absent: number mod classes.
Chain make_chain(Backend&, const Pipeline&, std::vector<SamplerRow> rows, int batch_size,
                 double guidance = 1, std::optional<int> label = {});

// All ranks: takes `count` steps of a chain, none where this rank has nothing to draw, and tells
// `progress` of them. Ranks hear of each other now and then, so that none seems lost. False where a
// signal to one of them has ended the steps before the last; `stop` may be null, on all ranks.
bool take_steps(Communicator&, Generator&, int count, bool idle, const Generator::Progress&,
                const StopSignal* stop);

}  // namespace ddpm::tools
