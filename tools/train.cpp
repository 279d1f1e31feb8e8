// ddpm train
#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <limits>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <utility>

#include "engine/file_io.h"
#include "engine/json.h"
#include "model/generator.h"
#include "model/pipeline.h"
#include "model/run_config.h"
#include "model/trainer.h"
#include "tools/ceilings.h"
#include "tools/checkpoint_saver.h"
#include "tools/commands.h"
#include "tools/estimate.h"
#include "tools/image_io.h"
#include "tools/loss_watch.h"
#include "tools/metrics.h"
#include "tools/progress.h"
#include "tools/ranks.h"
#include "tools/run_trainer.h"
#include "tools/stop_signal.h"

namespace ddpm::tools {
namespace {

RunConfig resolve_config(const TrainArgs& args) {
  nlohmann::ordered_json json;
  std::string source = "the command line";
  if (!args.config.empty()) {
    if (!args.preset.empty())
      fail(Status::kUsage, "--preset and --config exclude each other: a config is whole");
    source = args.config;
    const nlohmann::json given = *read_json_file(args.config, Status::kConfig);
    json = to_json(run_config_from_json(given, args.config));
  } else {
    json = to_json(run_config_of(find_preset(args.preset.empty() ? "tiny" : args.preset)));
  }
  json["train"]["data"] = args.data;
  json["train"]["precision"] = args.device.precision;
  for (const std::string& setting : args.settings) set_path(json, setting);
  return run_config_from_json(json, source);
}

// The checkpoint to go on from; empty: a fresh run.
std::string find_start(const TrainArgs& args, const RunConfig& config, const std::string& out) {
  if (args.resume == "never" || args.resume == "auto") {
    const bool run = file_exists(out + "/config.json");
    if (run && args.resume == "never")
      fail(Status::kUsage,
           "%s holds a run already; choose another --out or leave out --resume never", out.c_str());
    if (!run) return {};
    const std::string path = out + "/config.json";
    require_same_run(config, run_config_from_json(*read_json_file(path, Status::kConfig), path),
                     path);
    recover_all(out + "/checkpoints");
    const auto checkpoints = list_checkpoints(out);
    return checkpoints.empty() ? std::string() : checkpoints.rbegin()->second;
  }
  if (file_exists(out + "/config.json"))
    fail(Status::kUsage,
         "--resume %s starts a run of its own: %s holds one already; choose another "
         "--out",
         args.resume.c_str(), out.c_str());
  return open_pipeline(args.resume).folder;
}

// Previews: as many images as are worth looking at, in batches no larger than training's. Each rank
// draws as many as the others, of which the last may be of no use.
struct Preview {
  int count = 64, each = 64;
  std::unique_ptr<Generator> generator;
};

constexpr uint64_t kCompareEvery = 100;  // steps after which ranks compare their weights

class Run {
 public:
  Run(const RunConfig& config, const std::string& out, Backend& backend, Communicator& ranks)
      : config_(config),
        out_(out),
        backend_(backend),
        ranks_(ranks),
        watch_(config.train.loss == LossKind::kSimple ? LossWatch::kUseless
                                                      : std::numeric_limits<double>::infinity()) {}

  Status run(const TrainArgs& args, const StopSignal& stop);

 private:
  bool first() const { return ranks_.rank() == 0; }  // the rank that writes and speaks
  void prepare(const TrainArgs& args);
  void build(const std::string& start, Dataset data);
  void load(const std::string& start);
  void prepare_previews();
  void print_header(const std::string& start);
  void print_estimate();
  void after_step(uint64_t step, Progress& progress, Metrics* metrics);
  void check_finite(const StepState& state);
  std::string save_bundle(uint64_t step) const;
  void watch_loss(uint64_t step, double loss, Progress& progress);
  Manifest manifest(uint64_t step) const;
  void log(uint64_t step, Progress& progress, Metrics* metrics);
  void draw_samples(uint64_t step, Progress& progress);
  void save(uint64_t step, Progress& progress);
  static void say_saved(const std::string& text, Progress& progress);

  const TrainConfig& train() const { return config_.train; }
  // Weights, EMA and two moments.
  size_t checkpoint_bytes() const {
    return 4 * sizeof(float) * static_cast<size_t>(trainer_->store().params().count());
  }

  RunConfig config_;
  std::string out_;
  Backend& backend_;
  Communicator& ranks_;
  Parts parts_;
  std::string data_description_;
  std::unique_ptr<Trainer> trainer_;
  std::unique_ptr<CheckpointSaver> saver_;  // of rank 0
  Preview preview_;
  LossWatch watch_;
  std::optional<double> step_seconds_;  // of rank 0, where the run has measured them before
  uint64_t first_step_ = 0, logged_step_ = 0, saved_step_ = 0;
  double logged_seconds_ = 0, logged_loss_sum_ = 0;
  CommSeconds logged_sums_;
};

// Stages in which ranks do not talk, so that an error of one of them is an error of all.
void Run::prepare(const TrainArgs& args) {
  std::string start;
  agree(ranks_, [&] {
    if (!first()) return;
    require_writable(out_);
    start = find_start(args, config_, out_);
  });
  start = gather(ranks_, start)[0];
  Dataset data;
  agree(ranks_, [&] {
    parts_ = parts_of(train(), ranks_);
    data = load_run_data(config_);
  });
  data_description_ = data.description;
  build(start, std::move(data));
  trainer_->share_parameters();
  const std::string step = gather(ranks_, std::to_string(first_step_))[0];
  first_step_ = std::stoull(step);
  StepState state;
  state.seed = train().seed;
  state.step = first_step_;
  trainer_->set_state(state);
  agree(ranks_, [&] { prepare_previews(); });
  print_header(start);
  print_estimate();
}

void Run::build(const std::string& start, Dataset data) {
  plan_alike(ranks_, backend_, [&] {
    if (first() && !start.empty())
      if (const std::string plans = read_manifest(start).plans; !plans.empty())
        backend_.use_plans(plans);
    trainer_ = make_trainer(backend_, config_, std::move(data), parts_);
    if (first()) load(start);
  });
}

// What the run starts from, which rank 0 alone reads.
void Run::load(const std::string& start) {
  if (start.empty()) {
    trainer_->initialize(train().seed);
  } else {
    const Manifest m = load_checkpoint(start, trainer_->store());
    trainer_->weights_changed();
    trainer_->set_loss_history(m.loss_history);
    first_step_ = m.step;
    if (m.numerics == backend_.numerics())
      step_seconds_ = last_step_seconds(out_, m.step, train().batch_size, ranks_.size());
    if (m.numerics != backend_.numerics() || !backend_.plans_kept())
      std::fprintf(stderr, "note: this run began as \"%s\" and goes on as \"%s\": not bit-exact\n",
                   m.numerics.c_str(), backend_.numerics().c_str());
  }
  // One being written beside the last good one.
  require_space(out_, 2 * checkpoint_bytes(), "two checkpoints");
}

void Run::prepare_previews() {
  if (train().sample_every == 0) return;
  const UNetConfig& unet = config_.unet;
  const int64_t pixels = int64_t{unet.sample_height} * unet.sample_width;
  preview_.count = pixels <= 64 * 64 ? 64 : 16;
  preview_.each = (preview_.count + ranks_.size() - 1) / ranks_.size();
  ParamArenas arenas;
  arenas[Arena::kWeights] = trainer_->store().arenas()[Arena::kEma];
  preview_.generator = std::make_unique<Generator>(
      backend_, unet, config_.scheduler, SamplerOptions{.kind = SamplerKind::kDdim},
      std::min(preview_.each, train().batch_size), [&](const Params&) { return arenas; });
}

void Run::print_header(const std::string& start) {
  const size_t previews = preview_.generator ? preview_.generator->bytes() : 0;
  print_ranks(ranks_, backend_,
              train().gradient_sums == "bf16" ? "; gradients are summed in bf16" : "");
  if (!first()) return;
  std::fprintf(stderr, "device   %s\n", backend_.description().c_str());
  std::fprintf(stderr, "model    %s parameters, images %dx%dx%d\n",
               grouped(trainer_->store().params().count()).c_str(), config_.unet.sample_height,
               config_.unet.sample_width, config_.unet.in_channels);
  std::fprintf(
      stderr, "data     %s%s\n", data_description_.c_str(),
      trainer_->data_on_host() ? ", read from the host's memory: larger than the device's" : "");
  std::fprintf(stderr,
               "memory   %s planned%s: %s parameters and optimizer, %s activations and data, "
               "%s previews; %s on the host for a checkpoint\n",
               bytes_text(trainer_->bytes() + previews).c_str(),
               ranks_.size() > 1 ? " on each rank" : "",
               bytes_text(trainer_->store().bytes()).c_str(),
               bytes_text(trainer_->bytes() - trainer_->store().bytes()).c_str(),
               bytes_text(previews).c_str(), bytes_text(checkpoint_bytes()).c_str());
  std::fprintf(stderr, "steps    %s to %s, batch %d%s%s\n",
               grouped(static_cast<int64_t>(first_step_)).c_str(), grouped(train().steps).c_str(),
               train().batch_size,
               parts_.split() ? format(" in %d parts%s", parts_.total,
                                       parts_.in_order ? ", summed in order" : "")
                                    .c_str()
                              : "",
               start.empty() ? "" : (", resumed from " + start).c_str());
  std::fprintf(stderr, "output   %s: a checkpoint (%s) every %lld steps, samples every %lld\n",
               out_.c_str(), bytes_text(checkpoint_bytes()).c_str(),
               static_cast<long long>(train().save_every),
               static_cast<long long>(train().sample_every));
}

// All ranks at once, which share what they compute with.
void Run::print_estimate() {
  const int64_t steps = train().steps - static_cast<int64_t>(first_step_);
  if (steps <= 0) return;
  std::string text = "known after the first steps on a GPU";
  if (any(ranks_, step_seconds_.has_value())) {
    text = estimate_text(steps, step_seconds_.value_or(0));
  } else if (backend_.stream() == nullptr) {
    constexpr int kSize = 512, kRounds = 31;  // some 50 ms
    const double macs = static_cast<double>(step_macs(trainer_->executor().graph())) * parts_.own;
    text = estimate_text(steps, {macs, product_rate(backend_, kSize, kRounds)},
                         std::string(name_of(backend_.compute_type())) +
                             (ranks_.size() > 1 ? ", on each rank" : ""));
  }
  if (first()) std::fprintf(stderr, "estimate %s\n", text.c_str());
}

// The update was not applied: the same step again shows where it went wrong.
void Run::check_finite(const StepState& state) {
  if (state.nonfinite == 0) return;
  StepState again = state;
  again.nonfinite = 0;
  again.step = state.bad_step;
  const std::string bundle = first() ? save_bundle(state.bad_step) : std::string();
  trainer_->set_state(again);
  std::string where;
  for (const std::string& found : gather(ranks_, trainer_->executor().step_checked()))
    if (where.empty()) where = found;
  if (where.empty())
    where = (state.nonfinite & kLossNonFinite) != 0 ? "the loss" : "the norm of the gradients";
  throw AgreedError(
      Status::kNonFinite,
      format(
          "step %llu produced values that are not finite, first in %s; no update was made since, "
          "the last checkpoint in %s is good; try a lower --learning-rate%s",
          static_cast<unsigned long long>(state.bad_step + 1), where.c_str(), out_.c_str(),
          bundle.c_str()));
}

// The state that the step failed on, as a run folder for `ddpm replay`; returns what to say of it.
std::string Run::save_bundle(uint64_t step) const {
  const std::string bundle = out_ + "/nonfinite";
  try {
    if (std::filesystem::exists(bundle)) remove_whole_folder(bundle);  // of an earlier failure
    make_folders(bundle + "/checkpoints");
    write_file(bundle + "/config.json", to_text(to_json(config_)));
    save_checkpoint(checkpoint_folder(bundle, step), config_.unet, config_.scheduler,
                    trainer_->store(), manifest(step));
  } catch (const Error& e) {
    return format(" (the step's state could not be kept: %s)", e.what());
  }
  return format(", or look at it with ddpm replay --run %s", bundle.c_str());
}

void Run::watch_loss(uint64_t step, double loss, Progress& progress) {
  const double usual = watch_.median();
  const LossWatch::Verdict verdict = watch_.add(loss);
  if (verdict == LossWatch::Verdict::kSpike)
    progress.line(format("warning: step %llu: loss %.4f, where %.4f was usual",
                         static_cast<unsigned long long>(step), loss, usual));
  if (verdict != LossWatch::Verdict::kDiverged) return;
  const std::string text = format(
      "step %llu: the training diverges: loss %.4f, and out of the ordinary %d times in a row; go "
      "back to a checkpoint of %s and try a lower --learning-rate, a longer train.warmup_steps or "
      "train.grad_clip",
      static_cast<unsigned long long>(step), loss, LossWatch::kRow, out_.c_str());
  if (train().stop_on_divergence) throw AgreedError(Status::kNonFinite, text);
  progress.line("warning: " + text);
}

void Run::log(uint64_t step, Progress& progress, Metrics* metrics) {
  const StepState state = trainer_->state();
  check_finite(state);
  const double seconds = progress.seconds();
  const double steps = static_cast<double>(step - logged_step_);
  const double loss = (state.loss_sum - logged_loss_sum_) / steps;
  const double rate = steps * train().batch_size / std::max(seconds - logged_seconds_, 1e-9);
  nlohmann::ordered_json line;
  line["step"] = step;
  line["loss"] = loss;
  line["loss_by_timestep"] = trainer_->take_loss_by_timestep();  // JSON writes a NaN as null
  line["grad_norm"] = state.grad_norm;
  line["learning_rate"] = state.learning_rate;
  line["images_per_second"] = rate;
  line["seconds"] = seconds;
  line["peak_bytes"] = peak_bytes();
  if (ranks_.size() > 1) line["ranks"] = ranks_.size();
  std::string detail =
      format("loss %.4f  %s images/s", loss, grouped(static_cast<int64_t>(rate)).c_str());
  if (const auto sums = ranks_.seconds()) {
    const double waiting = sums->waiting - logged_sums_.waiting;
    line["summing_seconds"] = sums->summing - logged_sums_.summing;
    line["waiting_seconds"] = waiting;
    logged_sums_ = *sums;
    detail += format("  %.0f %% waiting for sums", 100 * waiting / (seconds - logged_seconds_));
  }
  if (metrics) metrics->add(line);
  progress.show(static_cast<int64_t>(step), detail);
  logged_step_ = step;
  logged_seconds_ = seconds;
  logged_loss_sum_ = state.loss_sum;
  watch_loss(step, loss, progress);
}

void Run::draw_samples(uint64_t step, Progress& progress) {
  Generator& g = *preview_.generator;
  g.weights_changed();
  const Shape s = g.shape();
  const size_t image = static_cast<size_t>(s.pixels()) * static_cast<size_t>(s.c);
  const int begin = ranks_.rank() * preview_.each;
  const int end = std::min(begin + preview_.each, preview_.count);
  std::vector<float> images(static_cast<size_t>(ranks_.size() * preview_.each) * image);
  for (int at = begin; at < end; at += g.batch_size()) {
    const int count = std::min(g.batch_size(), end - at);
    const std::vector<float> batch = g.sample(train().seed, static_cast<uint64_t>(at), count);
    std::copy(batch.begin(), batch.end(),
              images.begin() + static_cast<std::ptrdiff_t>(static_cast<size_t>(at) * image));
  }
  ranks_.share(images.data(), static_cast<size_t>(preview_.each) * image * sizeof(float));
  if (!first()) return;
  make_folders(out_ + "/samples");
  const std::string path =
      format("%s/samples/step-%08llu.png", out_.c_str(), static_cast<unsigned long long>(step));
  write_png(path, image_grid(to_uint8(images).data(), preview_.count, s.h, s.w, s.c,
                             display_scale(s.h, s.w)));
  progress.line("samples  " + path);
}

Manifest Run::manifest(uint64_t step) const {
  Manifest m;
  m.step = step;
  m.seed = train().seed;
  m.batch_size = train().batch_size;
  m.numerics = backend_.numerics();
  m.plans = backend_.plans();
  m.loss_history = trainer_->loss_history();
  return m;
}

void Run::save(uint64_t step, Progress& progress) {
  check_finite(trainer_->state());
  trainer_->require_equal_weights();
  saved_step_ = step;
  if (!first()) return;
  say_saved(saver_->start(manifest(step)), progress);
}

void Run::say_saved(const std::string& text, Progress& progress) {
  if (!text.empty()) progress.line(text);
}

void Run::after_step(uint64_t step, Progress& progress, Metrics* metrics) {
  if (step % kCompareEvery == 0) trainer_->require_equal_weights();
  const uint64_t last = static_cast<uint64_t>(train().steps);
  const auto due = [&](int64_t every) {
    return every > 0 && (step % static_cast<uint64_t>(every) == 0 || step == last);
  };
  if (due(train().log_every))
    log(step, progress, metrics);
  else
    progress.update(static_cast<int64_t>(step));
  if (due(train().sample_every)) draw_samples(step, progress);
  if (due(train().save_every) || step == last) save(step, progress);
}

Status Run::run(const TrainArgs& args, const StopSignal& stop) {
  prepare(args);
  const uint64_t last = static_cast<uint64_t>(train().steps);
  if (first_step_ >= last) {
    if (!first()) return Status::kOk;
    std::fprintf(stderr, "finished already: the run is at step %llu; --steps N goes on to N\n",
                 static_cast<unsigned long long>(first_step_));
    return Status::kOk;
  }
  std::unique_ptr<Metrics> metrics;
  if (first()) {
    make_folders(out_);
    write_file(out_ + "/config.json", to_text(to_json(config_)));
    saver_ = std::make_unique<CheckpointSaver>(config_, out_, trainer_->store());
    metrics = std::make_unique<Metrics>(out_, first_step_);
  }
  logged_step_ = first_step_;
  Progress progress("step", static_cast<int64_t>(first_step_), train().steps, !first());
  for (uint64_t step = first_step_ + 1; step <= last; ++step) {
    trainer_->step();
    after_step(step, progress, metrics.get());
    if (saver_) say_saved(saver_->ended(), progress);
    if (any(ranks_, stop.raised()) && step < last) {
      if (saved_step_ != step) save(step, progress);
      if (saver_) say_saved(saver_->finish(), progress);
      progress.line("stopped by a signal; the same command goes on from here");
      return Status::kStopped;
    }
  }
  if (saver_) say_saved(saver_->finish(), progress);
  return Status::kOk;
}

}  // namespace

Status run_train(const TrainArgs& args) {
  const std::string advice = "the last checkpoint is good, the same command goes on from there";
  const Launch launch = find_launch();
  if (const auto ended = start_ranks(args.ranks, args.device, launch, advice)) return *ended;
  const StopSignal stop;  // before the threads of ranks and backend
  Ranks ranks(launch, args.device, args.ranks, advice);
  return ranks.run([&] {
    Communicator& all = ranks.communicator();
    RunConfig config;
    agree(all, [&] { config = resolve_config(args); });
    require_equal_settings(all, to_text(to_json(config)));
    const std::string name = !args.preset.empty() ? args.preset
                             : args.config.empty()
                                 ? "tiny"
                                 : std::filesystem::path(args.config).stem().string();
    const std::string out = args.out.empty() ? "runs/" + name : args.out;
    Backend& backend = ranks.open_device(config.train.reduction_shards);
    ranks.sum_on_device();
    return Run(config, out, backend, ranks.communicator()).run(args, stop);
  });
}

}  // namespace ddpm::tools
