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

void require_classes(const ChainArgs& args, const UNetConfig& u) {
  const int classes = u.classes();
  if (args.label && (*args.label < 0 || *args.label >= classes)) {
    if (classes == 0)
      fail(Status::kUsage,
           "--label %d: the model has no classes; train one with unet.num_class_embeds",
           *args.label);
    fail(Status::kUsage, "--label %d: the model has classes 0 to %d", *args.label, classes - 1);
  }
  if (args.guidance != 1 && !u.null_class)
    fail(Status::kUsage,
         "--guidance %g: the model %s; train one with train.label_dropout, 0.1 say, and "
         "unet.num_class_embeds = classes + 1",
         args.guidance,
         classes == 0 ? "has no classes" : "was not trained without its classes too");
}

Chain make_chain(Backend& backend, const Pipeline& p, std::vector<SamplerRow> rows, int batch_size,
                 double guidance, std::optional<int> label) {
  Chain chain;
  const auto weights = [&](const Params& params) {
    chain.store = load_store(backend, p, params);
    return chain.store->arenas();
  };
  chain.generator = std::make_unique<Generator>(
      backend, p.unet, p.scheduler.num_train_timesteps, std::move(rows), batch_size, weights,
      guidance != 1 ? std::optional(static_cast<float>(guidance)) : std::nullopt);
  chain.generator->set_label(label);
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
