// Model folders for the tests of the C entry, and its handles as values.
#pragma once

#include <map>
#include <memory>
#include <optional>
#include <string>

#include "model/ddpm.h"
#include "model/pipeline.h"
#include "model/trainer.h"
#include "tests/golden.h"
#include "tests/temp_folder.h"

namespace ddpm::test::c {

constexpr int kThreads = 2;

// A checkpoint folder of a network with hashed weights.
inline void write_model(const std::string& folder, const UNetConfig& unet,
                        const SchedulerConfig& scheduler) {
  auto backend = make_cpu_backend({.threads = kThreads});
  TrainerOptions options;
  options.objective.loss = usual_loss(scheduler.variance_type);
  const TrainingGraph t = build_training_graph(*backend, unet, scheduler, options, 1);
  ParamStore store(*backend, t.graph.params(),
                   {Arena::kWeights, Arena::kM, Arena::kV, Arena::kEma});
  set_hash_weights(store, {Arena::kWeights, Arena::kEma});
  save_checkpoint(folder, unet, scheduler, store, {.numerics = backend->numerics()});
}

// 8x8 images of three channels, some 100,000 weights.
inline UNetConfig small_unet(std::optional<int> classes = {}) {
  UNetConfig u;
  u.sample_height = u.sample_width = 8;
  u.layers_per_block = 1;
  u.block_out_channels = {16, 32};
  u.down_attention = {false, true};
  u.up_attention = {true, false};
  u.norm_num_groups = 8;
  u.num_class_embeds = classes;
  return u;
}

// 4x4 images, some 4,000 weights: a step is little but calls.
inline UNetConfig least_unet() {
  UNetConfig u;
  u.sample_height = u.sample_width = 4;
  u.layers_per_block = 1;
  u.block_out_channels = {8};
  u.down_attention = u.up_attention = {false};
  u.norm_num_groups = 4;
  return u;
}

// "least", "small", "small_classes" (ten of them), "small_guided" (nine, and none),
// "small_learned" (mean and variance of ten), or a golden network.
inline const std::string& model_folder(const std::string& name) {
  static const TempFolder tmp;
  static std::map<std::string, std::string> folders;
  const auto [found, fresh] = folders.try_emplace(name, tmp / name);
  if (!fresh) return found->second;
  if (name == "least") {
    write_model(found->second, least_unet(), {});
  } else if (name == "small_learned") {
    UNetConfig u = small_unet(10);
    u.out_channels = 2 * u.in_channels;
    write_model(found->second, u,
                {.prediction_type = PredictionType::kPreviousMean,
                 .variance_type = VarianceType::kLearnedRange});
  } else if (name == "small_guided") {
    UNetConfig u = small_unet(10);
    u.null_class = true;
    write_model(found->second, u, {});
  } else if (name.starts_with("small")) {
    write_model(found->second, small_unet(name == "small" ? std::nullopt : std::optional(10)), {});
  } else {
    const Golden golden(name);
    write_model(found->second, golden.unet, golden.scheduler);
  }
  return found->second;
}

struct Closer {
  void operator()(ddpm_model* m) const { ddpm_model_destroy(m); }
  void operator()(ddpm_sampler* s) const { ddpm_sampler_destroy(s); }
  void operator()(ddpm_session* s) const { ddpm_session_destroy(s); }
  void operator()(ddpm_pool* p) const { ddpm_pool_destroy(p); }
  void operator()(ddpm_ticket* t) const { ddpm_ticket_destroy(t); }
};
using Model = std::unique_ptr<ddpm_model, Closer>;
using Sampler = std::unique_ptr<ddpm_sampler, Closer>;
using Session = std::unique_ptr<ddpm_session, Closer>;
using Pool = std::unique_ptr<ddpm_pool, Closer>;
using Ticket = std::unique_ptr<ddpm_ticket, Closer>;

inline void ok(ddpm_status status) {
  INFO(ddpm_last_error());
  REQUIRE(status == DDPM_OK);
}

inline Model open_model(const std::string& folder, const char* precision = nullptr,
                        int threads = kThreads) {
  ddpm_model_options o{};
  o.struct_size = sizeof o;
  o.device = "cpu";
  o.precision = precision;
  o.threads = threads;
  ddpm_model* m = nullptr;
  ok(ddpm_model_load(folder.c_str(), &o, &m));
  return Model(m);
}

}  // namespace ddpm::test::c
