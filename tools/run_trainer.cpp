#include "tools/run_trainer.h"

#include <utility>

#include "tools/data.h"

namespace ddpm::tools {
namespace {

AdamDesc adam_desc(const TrainConfig& t) {
  AdamDesc d;
  d.learning_rate = static_cast<float>(t.learning_rate);
  d.warmup_steps = t.warmup_steps;
  d.steps = t.steps;
  d.cooldown_steps = t.cooldown_steps;
  d.grad_clip = static_cast<float>(t.grad_clip);
  d.ema_decay = t.ema_decay;
  return d;
}

}  // namespace

Dataset load_run_data(const RunConfig& config) {
  const UNetConfig& unet = config.unet;
  const std::string& path = config.train.data;
  const int batch = config.train.batch_size;
  Dataset data = load_data(path, {1, unet.sample_height, unet.sample_width, unet.in_channels});
  if (data.count < batch)
    fail(Status::kConfig, "%s holds %lld images, fewer than a batch of %d; use --batch-size %lld",
         path.c_str(), static_cast<long long>(data.count), batch,
         static_cast<long long>(data.count));
  require_labels(path, data, unet);
  return data;
}

std::unique_ptr<Trainer> make_trainer(Backend& backend, const RunConfig& config, Dataset data,
                                      const Parts& parts) {
  TrainerOptions options;
  options.batch_size = config.train.batch_size;
  options.parts = parts;
  options.flip = config.train.flip;
  options.label_dropout = config.train.label_dropout;
  options.objective = {config.train.loss, config.train.timesteps};
  options.adam = adam_desc(config.train);
  return std::make_unique<Trainer>(backend, config.unet, config.scheduler, options,
                                   std::move(data));
}

}  // namespace ddpm::tools
