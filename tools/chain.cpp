#include "tools/chain.h"

#include <algorithm>
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

bool take_steps(Communicator& ranks, Generator& generator, int count, bool idle,
                const Generator::Progress& progress, const StopSignal* stop) {
  struct Stopped {};
  Executor& executor = generator.executor();
  const auto raised = [&] { return stop != nullptr && stop->raised(); };
  if (ranks.size() == 1) try {
      executor.steps(count, [&](int done) {
        progress(done);
        if (raised() && done < count) throw Stopped{};
      });
      return true;
    } catch (const Stopped&) {
      return false;
    }
  // A GPU takes as many by one launch.
  const int part = executor.graph().backend().stream() == nullptr ? 1 : 50;
  for (int done = 0; done < count;) {
    const int now = std::min(part, count - done);
    if (!idle) executor.steps(now, [](int) {});  // waits for them
    progress(done += now);
    if (any(ranks, raised()) && done < count) return false;
  }
  return true;
}

}  // namespace ddpm::tools
