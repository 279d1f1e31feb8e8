// ddpm replay: the step after a run's last checkpoint, operation by operation.
#include <cstdio>

#include "engine/json.h"
#include "model/pipeline.h"
#include "tools/commands.h"
#include "tools/ranks.h"
#include "tools/run_trainer.h"

#include <nlohmann/json.hpp>

namespace ddpm::tools {

void run_replay(const ReplayArgs& args) {
  require_one_process();
  const std::string path = args.run + "/config.json";
  const RunConfig config = run_config_from_json(*read_json_file(path, Status::kConfig), path);
  const auto checkpoints = list_checkpoints(args.run);
  if (checkpoints.empty())
    fail(Status::kConfig, "%s has no checkpoint to replay a step from", args.run.c_str());
  const std::string& folder = checkpoints.rbegin()->second;
  const auto backend = open_backend(args.device);
  const Manifest plan = read_manifest(folder);
  if (!plan.plans.empty()) backend->use_plans(plan.plans);
  const auto alone = make_solo_communicator();
  const auto trainer =
      make_trainer(*backend, config, load_run_data(config), parts_of(config.train, *alone));
  const Manifest m = load_checkpoint(folder, trainer->store(), NonFiniteValues::kAllowed);
  trainer->weights_changed();
  trainer->set_loss_history(m.loss_history);
  StepState state;
  state.seed = m.seed;
  state.step = m.step;
  trainer->set_state(state);
  if (m.numerics != backend->numerics())
    std::fprintf(stderr, "note: the run computed as \"%s\", this as \"%s\": not bit-exact\n",
                 m.numerics.c_str(), backend->numerics().c_str());

  std::printf("%12s %12s %10s  operation\n", "least", "largest", "not finite");
  const std::string where =
      trainer->executor().step_checked([](const std::string& name, const Extent& e) {
        std::printf("%12.4e %12.4e %10lld  %s\n", double{e.low}, double{e.high},
                    static_cast<long long>(e.nonfinite), name.c_str());
      });
  const unsigned long long step = m.step + 1;
  const StepState after = trainer->state();
  if (!where.empty() || after.nonfinite != 0)
    fail(Status::kNonFinite,
         "step %llu produced values that are not finite, first in %s; the operations before it "
         "show where they grew",
         step, !where.empty() ? where.c_str() : "the norm of the gradients");
  std::printf("step %llu is finite: loss %.4f, norm of the gradients %.4g\n", step,
              double{after.loss}, double{after.grad_norm});
}

}  // namespace ddpm::tools
