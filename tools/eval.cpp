// ddpm eval: the bound of a data set, image by image, as bits per dimension or as rate and
// distortion.
#include <cmath>
#include <cstdio>
#include <memory>
#include <nlohmann/json.hpp>
#include <thread>

#include "engine/file_io.h"
#include "engine/json.h"
#include "engine/memory.h"
#include "model/bound_sums.h"
#include "model/forward.h"
#include "model/pipeline.h"
#include "tools/commands.h"
#include "tools/data.h"
#include "tools/eval.h"
#include "tools/eval_features.h"
#include "tools/eval_progress.h"
#include "tools/progress.h"
#include "tools/stop_signal.h"

namespace ddpm::tools {
namespace {

constexpr double kSaveSeconds = 60;

// The network of a model, on batches of a fixed size.
class LoadedNetwork {
 public:
  LoadedNetwork(Backend& backend, const Pipeline& p, int batch_size) {
    const int timesteps = p.scheduler.num_train_timesteps;
    ForwardGraph f = build_forward_graph(backend, p.unet, timesteps, batch_size);
    const auto planned_at = [&](int batch) {
      return planned_bytes(build_forward_graph(backend, p.unet, timesteps, batch).graph);
    };
    require_memory(f.graph, sizeof(float) * static_cast<size_t>(f.graph.params().arena_size()),
                   batch_size, planned_at);
    sample_ = f.sample;
    timestep_ = f.timestep;
    labels_ = f.class_labels;
    output_ = f.output;
    store_ = load_store(backend, p, f.graph.params());
    executor_ = std::make_unique<Executor>(std::move(f.graph), store_->arenas());
    executor_->setup_for_good();
  }

  void operator()(const std::vector<float>& x_t, const std::vector<int32_t>& t,
                  const std::vector<int32_t>& labels, std::vector<float>& out) {
    executor_->upload(sample_, x_t.data());
    executor_->upload(timestep_, t.data());
    if (labels_) executor_->upload(labels_, labels.data());
    executor_->step();
    executor_->download(out.data(), output_);
  }

  int64_t parameters() const { return store_->params().count(); }
  size_t bytes() const { return store_->bytes() + executor_->bytes(); }

 private:
  Tensor sample_, timestep_, labels_, output_;
  std::unique_ptr<ParamStore> store_;
  std::unique_ptr<Executor> executor_;
};

Dataset load_split(const EvalArgs& args, const Pipeline& p) {
  const bool parts = has_test_split(args.data);
  if (!parts && !args.split.empty())
    fail(Status::kUsage, "--split %s: %s is one data set; give the part itself as --data",
         args.split.c_str(), args.data.c_str());
  const UNetConfig& u = p.unet;
  Dataset data = load_data(args.data, {1, u.sample_height, u.sample_width, u.in_channels},
                           parts && args.split != "train" ? Split::kTest : Split::kTrain);
  if (parts) data.description += args.split == "train" ? ", train split" : ", test split";
  require_labels(args.data, data, u);
  if (args.num > data.count)
    fail(Status::kConfig, "--num %lld: %s holds %lld images", static_cast<long long>(args.num),
         args.data.c_str(), static_cast<long long>(data.count));
  return data;
}

std::string_view bytes_of(const void* data, size_t bytes) {
  return {static_cast<const char*>(data), bytes};
}

Evaluation evaluation_of(const Pipeline& p, const Dataset& data, const BoundOptions& o) {
  const std::string images = hash_of(bytes_of(data.images.data(), data.images.size()));
  const std::string labels =
      hash_of(bytes_of(data.labels.data(), data.labels.size() * sizeof(int32_t)));
  return {{"model", model_hash(p)},
          {"scheduler", hash_of(to_text(to_json(p.scheduler)))},
          {"data", hash_of(images + labels)},
          {"num", std::to_string(o.num)},
          {"seed", std::to_string(o.seed)}};
}

void print_nll(const nlohmann::ordered_json& r, const BoundSums& s) {
  const double bits = r["bits_per_dim"], prior = r["prior"], decoder = r["decoder"];
  std::printf("bits/dim   %.5f", bits);
  if (s.images > 1) std::printf(" +- %.5f (95 %%)", s.ci95());
  std::printf("\nprior      %.6f\nrate       %.5f\ndecoder    %.5f\n", prior,
              bits - prior - decoder, decoder);
}

void print_rd(const nlohmann::ordered_json& r) {
  std::printf("reverse time   rate (bits/dim)   distortion (RMSE of 0..255)\n");
  for (const auto& row : r["rows"])
    std::printf("%12d   %15.5f   %27.5f\n", row["reverse_time"].get<int>(),
                row["rate"].get<double>(), row["distortion"].get<double>());
}

// Adds images until all are there or a signal to a rank comes, which it says.
bool evaluate(const Bound& bound, const Dataset& data, const BoundOptions& o,
              const Denoiser& network, const std::string& file, const StopSignal* stop,
              EvalProgress& state) {
  struct Stopped {};
  const bool first = o.ranks->rank() == 0;
  const int64_t timesteps = bound.timesteps();
  const auto done = [&](const BoundSums& s) {
    return s.images * timesteps + static_cast<int64_t>(s.image_terms.size());
  };
  Progress progress("step", done(state.sums), o.num * timesteps, !first);
  double saved = 0;
  const auto detail = [&](const BoundSums& s) {
    std::string text = format("%lld of %lld images", static_cast<long long>(s.images),
                              static_cast<long long>(o.num));
    if (s.images > 0) text += format(", %.4f bits/dim", s.bits / static_cast<double>(s.images));
    return text;
  };
  try {
    add_bounds(bound, data, o, network, state.sums, [&](const BoundSums& s) {
      progress.update(done(s), detail(s));
      if (stop == nullptr || s.images == o.num) return;
      const bool raised = any(*o.ranks, stop->raised());
      if (first && (raised || progress.seconds() - saved > kSaveSeconds)) {
        saved = progress.seconds();
        write_eval_progress(file, state);
      }
      if (raised) throw Stopped{};
    });
  } catch (const Stopped&) {
    progress.line("stopped by a signal; the same command goes on from here");
    return false;
  }
  progress.show(done(state.sums), detail(state.sums));
  return true;
}

void print_header(const Backend& backend, const Pipeline& p, const Dataset& data,
                  const BoundOptions& o, int timesteps, const LoadedNetwork& network) {
  std::fprintf(stderr, "device   %s\nmodel    %s, %s parameters\ndata     %s\n",
               backend.description().c_str(), p.folder.c_str(),
               grouped(network.parameters()).c_str(), data.description.c_str());
  std::fprintf(stderr, "images   %s, %s steps each, batch %d, %s\n", grouped(o.num).c_str(),
               grouped(timesteps).c_str(), o.batch_size, bytes_text(network.bytes()).c_str());
}

}  // namespace

nlohmann::ordered_json nll_json(const BoundSums& s) {
  const std::vector<double> terms = s.mean_terms();
  double bits = s.mean_prior();
  for (const double term : terms) bits += term;
  return {{"bits_per_dim", bits},
          {"ci95", s.ci95()},
          {"prior", s.mean_prior()},
          {"decoder", terms[0]},
          {"terms", terms}};
}

// Ten rows, as the paper's table 4: T - t labels what is known at t.
nlohmann::ordered_json rd_json(const BoundSums& s) {
  const std::vector<double> rate = s.rate(), distortion = s.distortion();
  nlohmann::ordered_json rows = nlohmann::ordered_json::array();
  const size_t timesteps = rate.size(), count = std::min<size_t>(timesteps, 10);
  for (size_t k = 0; k < count; ++k) {
    const size_t t = k * timesteps / count;
    rows.push_back(
        {{"reverse_time", timesteps - t}, {"rate", rate[t]}, {"distortion", distortion[t]}});
  }
  return {{"rows", rows}, {"prior", s.mean_prior()}, {"rate", rate}, {"distortion", distortion}};
}

DeviceOptions bound_device(const DeviceOptions& device) {
  DeviceOptions same = device;
  same.batch_invariant = true;
  return same;
}

std::optional<BoundSums> evaluate_bound(const EvalArgs& args, const std::string& file,
                                        const StopSignal* stop, Ranks& ranks) {
  Communicator& all = ranks.communicator();
  const bool several = all.size() > 1;
  Pipeline p;
  Dataset data;
  BoundOptions o{.seed = args.seed, .ranks = &all};
  EvalProgress state;
  agree(all, [&] {
    p = open_pipeline(args.model);
    data = load_split(args, p);
    o.num = args.num > 0 ? args.num : data.count;
    const int usual_batch = data.h * data.w <= 64 * 64 ? 64 : 8;
    o.batch_size = args.batch_size > 0 ? args.batch_size : usual_batch;
    if (several || !file.empty()) state.of = evaluation_of(p, data, o);
  });
  if (several) require_equal_settings(all, settings_of(state.of, o.batch_size));
  const Bound bound(Schedule(p.scheduler), p.scheduler, p.unet.in_channels);
  state.sums = BoundSums(bound.timesteps());
  agree(all, [&] {
    if (ranks.first() && !file.empty() && file_exists(file))
      state = read_eval_progress(file, state.of, bound.timesteps());
  });
  const std::string text = gather(all, ranks.first() ? eval_text(state) : std::string())[0];
  if (!ranks.first()) state = parse_eval_progress(text, file, state.of, bound.timesteps());

  Backend& backend = ranks.open_device();
  o.threads = ranks.device().threads > 0 ? ranks.device().threads
                                         : static_cast<int>(std::thread::hardware_concurrency());
  std::optional<LoadedNetwork> network;
  plan_alike(all, backend, [&] { network.emplace(backend, p, o.batch_size); });
  keep_plans(backend);
  print_ranks(all, backend);
  if (ranks.first()) {
    print_header(backend, p, data, o, bound.timesteps(), *network);
    if (!state.numerics.empty())
      std::fprintf(stderr, "resumed  from %s, after %lld images%s\n", file.c_str(),
                   static_cast<long long>(state.sums.images),
                   state.numerics == backend.numerics() ? "" : ", begun on another backend");
  }
  state.numerics = backend.numerics();
  if (!evaluate(bound, data, o, std::ref(*network), file, stop, state)) return std::nullopt;
  if (ranks.first() && !file.empty()) write_eval_progress(file, state);
  return state.sums;
}

namespace {

void require_bound_flags(const EvalArgs& args) {
  if (args.model.empty() || args.data.empty())
    fail(Status::kUsage, "--metric %s needs --model and --data", args.metric.c_str());
  if (!args.images.empty() || !args.inception.empty() || !args.statistics.empty())
    fail(Status::kUsage, "--images, --inception and --statistics are for --metric fid and is");
  if (args.chain != ChainArgs{})
    fail(Status::kUsage, "--metric %s samples nothing: leave the sampler's flags out",
         args.metric.c_str());
}

Status run_eval_bound(const EvalArgs& args, Ranks& ranks, const StopSignal* stop) {
  const std::string file = args.out.empty() ? "" : args.out + ".progress";
  agree(ranks.communicator(), [&] {
    require_bound_flags(args);
    if (ranks.first() && !args.out.empty()) require_writable_file(args.out);
  });
  const std::optional<BoundSums> sums = evaluate_bound(args, file, stop, ranks);
  if (!sums) return Status::kStopped;
  if (!ranks.first()) return Status::kOk;

  nlohmann::ordered_json result = args.metric == "nll" ? nll_json(*sums) : rd_json(*sums);
  result["num"] = sums->images;
  result["seed"] = args.seed;
  if (args.metric == "nll")
    print_nll(result, *sums);
  else
    print_rd(result);
  if (args.out.empty()) return Status::kOk;
  write_file(args.out, to_text(result));
  if (file_exists(file)) FileSystem::real().remove_file(file.c_str());
  return Status::kOk;
}

}  // namespace

Status run_eval(const EvalArgs& args) {
  const std::string advice = args.out.empty() ? "the same command begins anew"
                                              : "the same command goes on from what was kept last";
  const Launch launch = find_launch();
  if (const auto ended = start_ranks(args.ranks, args.device, launch, advice)) return *ended;
  const std::unique_ptr<StopSignal> stop(args.out.empty() ? nullptr : new StopSignal);
  const bool features = args.metric == "fid" || args.metric == "is";
  Ranks ranks(launch, features ? args.device : bound_device(args.device), args.ranks, advice);
  return ranks.run([&] {
    return features ? run_eval_features(args, ranks, stop.get())
                    : run_eval_bound(args, ranks, stop.get());
  });
}

}  // namespace ddpm::tools
