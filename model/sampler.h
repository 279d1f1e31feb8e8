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
  // In place of steps and spacing: these, in any order, each once. ddpm then has the betas of the
  // process that is left (Nichol & Dhariwal 2021, section 4).
  std::vector<int> timesteps{};
  // The share of the chain, its end, that is run, for a start that is not pure noise: of N steps
  // the last int(N strength), as diffusers has it. In (0, 1].
  double strength = 1;
  std::optional<int> start{};  // or those of its timesteps that are at most this
  std::optional<bool> clip{};  // in place of the configuration's clip_sample
};

// Timesteps as diffusers' scheduler of that name spaces them (steps_offset 0), descending.
std::vector<int> sampler_timesteps(SamplerKind, Spacing, int steps, int num_train_timesteps);

// The whole chain, first row first. Throws Error(kUsage) for options that cannot be.
std::vector<SamplerRow> sampler_rows(const Schedule&, const SchedulerConfig&,
                                     const SamplerOptions&);

// The way back of a chain of ddim with eta 0 and without clipping: rows that lead images to the
// x_T whose chain gives them again (Song et al. 2020, section 4.3), the clean end first. Each row
// asks the network at its own timestep, but of the image it comes from: what the network says of
// the image it leads to would be exact. So the error of the way there and back shrinks as the
// steps grow in number. Throws Error(kUsage) for another sampler, eta or strength.
std::vector<SamplerRow> ddim_inverse_rows(const Schedule&, const SchedulerConfig&,
                                          const SamplerOptions&);

// x v + out w: what a linear function of the noisy image and the network's output is made of.
struct Mix {
  double x = 0, out = 0;
};
// The prediction of x_0 from the network's output at t (of noise: Ho et al., eq. 15); 0 where noise
// is predicted and there is no signal.
Mix x0_mix(PredictionType, const Schedule&, int t);

// Single rows: from timestep t to `next` < t, where -1 is the clean image.
SamplerRow ddpm_row(const Schedule&, const SchedulerConfig&, int t, int next);
SamplerRow ddim_row(const Schedule&, const SchedulerConfig&, int t, int next, double eta);
// `before` > t is the timestep of the row before, absent in the first row.
SamplerRow dpmpp2m_row(const Schedule&, const SchedulerConfig&, std::optional<int> before, int t,
                       int next);

}  // namespace ddpm
