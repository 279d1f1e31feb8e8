#include "tools/chain.h"

#include <utility>

namespace ddpm::tools {

SamplerOptions sampler_options(const ChainArgs& args, SamplerKind usual) {
  SamplerOptions o;
  o.kind = args.sampler.empty() ? usual : parse_sampler(args.sampler);
  o.steps = args.steps;
  if (!args.spacing.empty()) o.spacing = parse_spacing(args.spacing);
  o.timesteps = args.timesteps;
  o.eta = args.eta;
  if (!args.clip.empty()) o.clip = args.clip == "on";
  return o;
}

Chain make_chain(Backend& backend, const Pipeline& p, std::vector<SamplerRow> rows, int batch_size,
                 float guidance) {
  Chain chain;
  const auto weights = [&](const Params& params) {
    chain.store = load_store(backend, p, params);
    return chain.store->arenas();
  };
  chain.generator = std::make_unique<Generator>(
      backend, p.unet, p.scheduler.num_train_timesteps, std::move(rows), batch_size, weights,
      guidance != 1 ? std::optional(guidance) : std::nullopt);
  chain.generator->weights_final();
  return chain;
}

}  // namespace ddpm::tools
