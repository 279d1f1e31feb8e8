#include "model/presets.h"

#include "engine/json.h"
#include "engine/nearest_name.h"

namespace ddpm {
namespace {

// What all of the paper's networks share.
UNetConfig paper_unet(int size, std::vector<int> channels, int attention_level) {
  UNetConfig c;
  c.sample_height = c.sample_width = size;
  c.down_attention.assign(channels.size(), false);
  c.up_attention.assign(channels.size(), false);
  c.down_attention[static_cast<size_t>(attention_level)] = true;
  c.up_attention[channels.size() - 1 - static_cast<size_t>(attention_level)] = true;
  c.block_out_channels = std::move(channels);
  c.norm_eps = 1e-6;
  c.attention_head_dim = std::nullopt;
  c.flip_sin_to_cos = false;
  c.freq_shift = 1;
  c.downsample_padding = 0;
  return c;
}

SchedulerConfig paper_scheduler(VarianceType variance) {
  SchedulerConfig c;
  c.variance_type = variance;
  return c;
}

Preset tiny() {
  Preset p{"tiny", paper_unet(16, {32, 64, 64}, 1), paper_scheduler(VarianceType::kFixedLarge), {}};
  p.unet.down_attention[2] = p.unet.up_attention[0] = true;
  p.unet.layers_per_block = 1;
  p.unet.norm_num_groups = 8;
  p.train = {.batch_size = 32,
             .steps = 4000,
             .learning_rate = 2e-3,
             .warmup_steps = 100,
             .ema_decay = 0.998,
             .flip = false};
  return p;
}

Preset cifar10() {
  Preset p{"cifar10",
           paper_unet(32, {128, 256, 256, 256}, 1),
           paper_scheduler(VarianceType::kFixedLarge),
           {}};
  p.unet.dropout = p.train.dropout = 0.1;
  return p;
}

Preset large(const char* name, int64_t steps) {
  Preset p{name,
           paper_unet(256, {128, 128, 256, 256, 512, 512}, 4),
           paper_scheduler(VarianceType::kFixedSmall),
           {}};
  p.train.batch_size = 64;
  p.train.steps = steps;
  p.train.learning_rate = 2e-5;
  return p;
}

}  // namespace

const std::vector<Preset>& presets() {
  // lsun256 is the paper's Church; Bedroom ran 2.4 M steps without flips, Cat 1.8 M.
  static const std::vector<Preset> all{tiny(), cifar10(), large("celebahq256", 500000),
                                       large("lsun256", 1200000)};
  return all;
}

const Preset& find_preset(std::string_view name) {
  std::vector<std::string> names;
  for (const Preset& p : presets()) {
    if (p.name == name) return p;
    names.push_back(p.name);
  }
  std::string known;
  for (const std::string& n : names) known += (known.empty() ? "" : ", ") + n;
  fail(Status::kUsage, "unknown preset %s%s; known: %s", in_quotes(name).c_str(),
       did_you_mean(name, names).c_str(), known.c_str());
}

}  // namespace ddpm
