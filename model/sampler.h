// Samplers as tables: every one is a list of SamplerRow (kernels/desc.h), computed here in double
// and rounded once. ddpm: Ho et al. 2020, algorithm 2. ddim: Song et al. 2020. dpmpp2m:
// DPM-Solver++ 2M, midpoint (Lu et al. 2022). A row's "previous" is the next entry of its own list.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "kernels/desc.h"
#include "model/schedule.h"

namespace ddpm {

enum class SamplerKind { kDdpm, kDdim, kDpmpp2m };
enum class Spacing { kLeading, kTrailing, kLinspace };

// Throw Error(kUsage) with the nearest name.
SamplerKind parse_sampler(std::string_view name);
Spacing parse_spacing(std::string_view name);
std::string name_of(SamplerKind);
std::string name_of(Spacing);

struct SamplerOptions {
  SamplerKind kind = SamplerKind::kDdpm;
  std::optional<int> steps;        // ddpm 1000, ddim 50, dpmpp2m 20, never more than there are
  std::optional<Spacing> spacing;  // ddpm, ddim leading; dpmpp2m linspace
  double eta = 0;                  // ddim's share of ddpm's noise, 0..1
};

// Timesteps as diffusers' scheduler of that name spaces them (steps_offset 0), descending.
std::vector<int> sampler_timesteps(SamplerKind, Spacing, int steps, int num_train_timesteps);

// The whole chain, first row first. Throws Error(kUsage) for steps or eta that cannot be.
std::vector<SamplerRow> sampler_rows(const Schedule&, const SchedulerConfig&,
                                     const SamplerOptions&);

// Single rows: from timestep t to `next` < t, where -1 is the clean image.
SamplerRow ddpm_row(const Schedule&, const SchedulerConfig&, int t, int next);
SamplerRow ddim_row(const Schedule&, const SchedulerConfig&, int t, int next, double eta);
// `before` > t is the timestep of the row before, absent in the first row.
SamplerRow dpmpp2m_row(const Schedule&, const SchedulerConfig&, std::optional<int> before, int t,
                       int next);

}  // namespace ddpm
