// ddpm eval --metric fid|is: images against a data set, or by themselves, in the features of
// Inception-v3.
#include "tools/eval_features.h"

#include <cstdio>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>

#include "engine/file_io.h"
#include "engine/json.h"
#include "model/device.h"
#include "model/schedule.h"
#include "tools/data.h"
#include "tools/feature_files.h"
#include "tools/feature_network.h"
#include "tools/frechet.h"
#include "tools/progress.h"
#include "tools/stop_signal.h"

namespace ddpm::tools {
namespace {

constexpr double kSaveSeconds = 60;
constexpr int64_t kUsualNum = 50000;  // of the papers
constexpr int kUsualBatch = 64;

void require_flags(const EvalArgs& args) {
  const bool fid = args.metric == "fid";
  const auto refuse = [&](const char* what) {
    fail(Status::kUsage, "--metric %s: %s", args.metric.c_str(), what);
  };
  if (args.model.empty() == args.images.empty()) refuse("give either --model or --images");
  if (args.inception.empty())
    refuse("needs --inception; tools/convert_inception.py makes the file");
  if (fid && args.data.empty() && args.statistics.empty())
    refuse("needs --data, or --statistics that were made before");
  if (!fid && !(args.data.empty() && args.statistics.empty()))
    refuse("compares with nothing: leave --data and --statistics out");
  if (args.model.empty() && args.chain != ChainArgs{})
    refuse("given images are not sampled: leave the sampler's flags out");
  if (fid && !frechet_built()) frechet_distance({}, {});  // says what is missing
}

std::string hash_of_images(const Dataset& d) {
  const std::string shape = format("%d %d %d ", d.h, d.w, d.c);
  return hash_of(shape +
                 hash_of({reinterpret_cast<const char*>(d.images.data()), d.images.size()}));
}

Dataset load_whole(const std::string& spec, const std::string& split) {
  const bool parts = has_test_split(spec);
  if (!parts && !split.empty())
    fail(Status::kUsage, "--split %s: %s is one data set; give the part itself as --data",
         split.c_str(), spec.c_str());
  return load_data(spec, split == "test" ? Split::kTest : Split::kTrain);
}

// What is measured: a model's images, or given ones.
struct Subject {
  std::optional<Pipeline> model;
  std::vector<SamplerRow> rows;
  Dataset given;
  Shape image;
  int64_t num = 0;
  std::string name;
};

Subject open_subject(const EvalArgs& args, Evaluation& of) {
  Subject s;
  if (!args.model.empty()) {
    s.model = open_pipeline(args.model);
    const UNetConfig& u = s.model->unet;
    s.image = {1, u.sample_height, u.sample_width, u.in_channels};
    const SamplerOptions options = sampler_options(args.chain, SamplerKind::kDdpm);
    s.rows = sampler_rows(Schedule(s.model->scheduler), s.model->scheduler, options);
    s.num = args.num > 0 ? args.num : kUsualNum;
    s.name = format("%s, %s, %zu steps each", s.model->folder.c_str(),
                    name_of(options.kind).c_str(), s.rows.size());
    of["model"] = model_hash(*s.model);
    require_classes(args.chain, u);
    std::string chain(reinterpret_cast<const char*>(s.rows.data()),
                      s.rows.size() * sizeof(SamplerRow));
    if (args.chain.label) chain += format("label %d", *args.chain.label);
    if (args.chain.guidance != 1) chain += format("guidance %a", args.chain.guidance);
    of["chain"] = hash_of(chain);
    of["seed"] = std::to_string(args.seed);
  } else {
    s.given = load_whole(args.images, "");
    s.image = {1, s.given.h, s.given.w, s.given.c};
    s.num = args.num > 0 ? args.num : s.given.count;
    s.name = s.given.description;
    if (s.num > s.given.count)
      fail(Status::kConfig, "--num %lld: %s holds %lld images", static_cast<long long>(s.num),
           args.images.c_str(), static_cast<long long>(s.given.count));
    of["images"] = hash_of_images(s.given);
  }
  const int64_t least = args.metric == "is" ? ScoreSums::kParts : 2;
  if (s.num < least)
    fail(Status::kUsage, "--metric %s of %lld images: at least %lld", args.metric.c_str(),
         static_cast<long long>(s.num), static_cast<long long>(least));
  of["num"] = std::to_string(s.num);
  return s;
}

// What it is compared with.
struct Reference {
  Dataset data;  // as long as its features are wanted
  FeatureSource source;
  std::optional<FeatureStatistics> statistics;
};

// Rank 0 alone has the statistics.
Reference open_reference(const EvalArgs& args, const std::string& network, size_t features,
                         bool first) {
  Reference r;
  r.source = {"", network, kFeatureCode};
  if (!args.data.empty()) {
    r.data = load_whole(args.data, args.split);
    r.source.data = hash_of_images(r.data);
    if (r.data.count < 2) fail(Status::kConfig, "%s holds one image", args.data.c_str());
    if (args.statistics.empty() || !first) return r;
    if (!file_exists(args.statistics)) {
      require_writable_file(args.statistics);
      return r;
    }
  }
  if (!first) return r;
  StoredStatistics stored = read_statistics(args.statistics, features);
  const char* other = nullptr;
  if (!args.data.empty() && stored.source.data != r.source.data) other = "data set";
  if (stored.source.network != network) other = "inception network";
  if (stored.source.code != kFeatureCode) other = "version of this program's features";
  if (other != nullptr && args.data.empty())
    fail(Status::kConfig, "%s is of another %s; give --data to make it anew",
         args.statistics.c_str(), other);
  if (other != nullptr) {
    std::fprintf(stderr, "note: %s is of another %s and is made anew\n", args.statistics.c_str(),
                 other);
    return r;
  }
  r.data = {};
  r.source = stored.source;
  r.statistics = std::move(stored.statistics);
  return r;
}

// The state of an evaluation, which is rank 0's, its file, and the question whether to stop.
class Keeper {
 public:
  Keeper(const EvalArgs& args, FeatureProgress& state, Communicator& ranks, const StopSignal* stop)
      : file_(args.out + ".progress"), state_(state), ranks_(ranks), stop_(stop) {}

  const std::string& file() const { return file_; }
  Communicator& ranks() const { return ranks_; }
  bool first() const { return ranks_.rank() == 0; }
  const StopSignal* signal() const { return stop_; }
  // All ranks: whether a signal has come to one; the state is written then, and now and then.
  bool stopped(Progress& progress, double& saved) const {
    if (stop_ == nullptr) return false;
    const bool now = any(ranks_, stop_->raised());
    if (first() && (now || progress.seconds() - saved > kSaveSeconds)) {
      saved = progress.seconds();
      write_feature_progress(file_, state_);
    }
    if (now) progress.line("stopped by a signal; the same command goes on from here");
    return now;
  }

 private:
  std::string file_;
  FeatureProgress& state_;
  Communicator& ranks_;
  const StopSignal* stop_;
};

// All ranks: the features of each one's images join the sums of rank 0, in the images' order.
// `score` may be null.
void add_images(Communicator& ranks, FeatureNetwork& network, const uint8_t* images, int count,
                FeatureSums& sums, ScoreSums* score) {
  std::vector<float> features, logits;
  network.run(images, count, [&](const float* f, const float* l, int64_t n) {
    const auto values = static_cast<size_t>(n);
    features.insert(features.end(), f, f + values * network.features());
    if (score != nullptr) logits.insert(logits.end(), l, l + values * network.classes());
  });
  features = collect(ranks, features);
  logits = collect(ranks, logits);
  if (ranks.rank() != 0) return;
  const auto all = static_cast<int64_t>(features.size() / network.features());
  sums.add(features.data(), all);
  if (score != nullptr) score->add(logits.data(), all);
}

// How many images rank 0 has in its sums.
int64_t images_in(const FeatureSums& sums, Communicator& ranks) {
  int64_t count = sums.count;
  ranks.broadcast(&count, sizeof count);
  return count;
}

// All ranks: adds the features of the first `num` images of a data set from where the sums are;
// false where a signal ended it.
bool add_given(const Dataset& data, int64_t num, FeatureNetwork& network, FeatureSums& sums,
               ScoreSums* score, const char* what, const Keeper& keeper) {
  Communicator& ranks = keeper.ranks();
  int64_t at = images_in(sums, ranks);
  Progress progress(what, at, num, !keeper.first());
  double saved = 0;
  while (at < num) {
    const Round round = round_at(ranks, at, num, network.image().n);
    const uint8_t* images = round.count > 0 ? data.image(round.first) : nullptr;
    add_images(ranks, network, images, round.count, sums, score);
    at = round.next;
    progress.update(at);
    if (at < num && keeper.stopped(progress, saved)) return false;
  }
  progress.show(at, format("%.1f s", progress.seconds()));
  return true;
}

// The same of images that a model draws. What a signal finds unfinished of a batch is drawn again.
bool add_drawn(Generator& generator, uint64_t seed, int64_t num, FeatureNetwork& network,
               FeatureProgress& state, const Keeper& keeper) {
  Communicator& ranks = keeper.ranks();
  int64_t at = images_in(state.images, ranks);
  Progress progress("image", at, num, !keeper.first());
  double saved = 0;
  while (at < num) {
    const Round round = round_at(ranks, at, num, generator.batch_size());
    const bool idle = round.count == 0;
    if (!idle) {
      generator.begin(seed, static_cast<uint64_t>(round.first));
      generator.executor().run(Phase::kStart);
    }
    const auto tell = [&](int step) {
      progress.update(at + (round.next - at) * step / generator.steps());
    };
    if (!take_steps(ranks, generator, generator.steps(), idle, tell, keeper.signal())) {
      keeper.stopped(progress, saved);
      return false;
    }
    std::vector<uint8_t> images;
    if (!idle) images = to_uint8(generator.images(round.count));
    add_images(ranks, network, images.data(), round.count, state.images, &state.score);
    at = round.next;
    if (at < num && keeper.stopped(progress, saved)) return false;
  }
  progress.show(num, format("%.1f s", progress.seconds()));
  return true;
}

// The backend of the features: fp32 without shortcuts in precision, whatever draws the images.
std::unique_ptr<Backend> exact_backend(const Backend& of_images, DeviceOptions options) {
  if (of_images.name() == "cpu") return nullptr;
  options.precision = "fp32";
  return open_backend(options);
}

void print_header(const Backend& backend, const EvalArgs& args, const Subject& s,
                  const Reference* r, const FeatureNetwork& network) {
  std::fprintf(stderr, "device   %s\nfeatures %zu, %s: %s parameters, %s\n",
               backend.description().c_str(), network.features(), args.inception.c_str(),
               grouped(network.parameters()).c_str(), bytes_text(network.bytes()).c_str());
  if (r != nullptr && r->statistics)
    std::fprintf(stderr, "compared with %s: %s images\n", args.statistics.c_str(),
                 grouped(r->statistics->count).c_str());
  else if (r != nullptr)
    std::fprintf(stderr, "compared with %s\n", r->data.description.c_str());
  std::fprintf(stderr, "images   %s of %s\n", grouped(s.num).c_str(), s.name.c_str());
  if (r != nullptr && s.num <= static_cast<int64_t>(network.features()))
    std::fprintf(stderr,
                 "note: with no more images than features the distance is far too large; papers "
                 "take %s\n",
                 grouped(kUsualNum).c_str());
}

nlohmann::ordered_json result_of(const EvalArgs& args, const Reference* r, const Subject& s,
                                 const FeatureProgress& state) {
  nlohmann::ordered_json json;
  if (r != nullptr) {
    json["fid"] = frechet_distance(*r->statistics, state.images.statistics());
    std::printf("FID              %.4f\n", json["fid"].get<double>());
  }
  if (s.num >= ScoreSums::kParts) {
    const ScoreSums::Score score = state.score.score();
    json["inception_score"] = score.mean;
    json["inception_score_std"] = score.deviation;
    std::printf("inception score  %.4f +- %.4f\n", score.mean, score.deviation);
  }
  json["num"] = s.num;
  if (s.model) json["seed"] = args.seed;
  if (r != nullptr) json["reference"] = {{"num", r->statistics->count}, {"data", r->source.data}};
  json["network"] = state.of.at("network");
  return json;
}

// All ranks: the reference's statistics, from its images. False where a signal ended it.
bool complete(Reference& r, const EvalArgs& args, FeatureNetwork& network, FeatureProgress& state,
              const Keeper& keeper) {
  if (!add_given(r.data, r.data.count, network, state.reference, nullptr, "reference image",
                 keeper))
    return false;
  r.data = {};
  if (!keeper.first()) return true;
  r.statistics = state.reference.statistics();
  if (!args.statistics.empty()) write_statistics(args.statistics, r.source, *r.statistics);
  return true;
}

bool add_subject(const Subject& s, const EvalArgs& args, Backend& backend, int batch,
                 FeatureNetwork& network, FeatureProgress& state, const Keeper& keeper) {
  if (!s.model)
    return add_given(s.given, s.num, network, state.images, &state.score, "image", keeper);
  Chain chain;
  plan_alike(keeper.ranks(), backend, [&] {
    chain = make_chain(backend, *s.model, s.rows, batch, args.chain.guidance, args.chain.label);
  });
  keep_plans(backend);
  return add_drawn(*chain.generator, args.seed, s.num, network, state, keeper);
}

}  // namespace

SafetensorsReader open_inception(const std::string& path) {
  if (!file_exists(path))
    fail(Status::kConfig,
         "--inception %s: no such file; tools/convert_inception.py makes it from PyTorch-FID's "
         "pt_inception-2015-12-05-6726825d.pth",
         path.c_str());
  return SafetensorsReader(path, Status::kConfig);
}

Status run_eval_features(const EvalArgs& args, Ranks& ranks, const StopSignal* stop) {
  Communicator& all = ranks.communicator();
  const bool first = ranks.first();
  const int batch = args.batch_size > 0 ? args.batch_size : kUsualBatch;
  std::unique_ptr<SafetensorsReader> weights;
  std::string network_hash;
  Evaluation of;
  Subject subject;
  agree(all, [&] {
    require_flags(args);
    weights.reset(new SafetensorsReader(open_inception(args.inception)));
    if (first && !args.out.empty()) require_writable_file(args.out);
    network_hash = inception_hash(*weights);
    of = {{"metric", args.metric}, {"network", network_hash}, {"code", kFeatureCode}};
    subject = open_subject(args, of);
  });
  require_equal_settings(all, settings_of(of, batch));

  Backend& backend = ranks.open_device();
  std::unique_ptr<Backend> exact;
  agree(all, [&] { exact = exact_backend(backend, ranks.device()); });
  Backend& of_features = exact ? *exact : backend;
  const auto make_network = [&](std::optional<FeatureNetwork>& network, const Shape& image) {
    plan_alike(all, of_features, [&] {
      network.emplace(of_features, *weights, image, std::min(batch, FeatureNetwork::kBatch));
    });
  };
  std::optional<FeatureNetwork> network;
  make_network(network, subject.image);
  std::optional<Reference> reference;
  if (args.metric == "fid") {
    agree(all, [&] { reference = open_reference(args, network_hash, network->features(), first); });
    of["data"] = gather(all, reference->source.data)[0];
    if (!args.data.empty()) require_equal_settings(all, reference->source.data);
  }
  const bool known = any(all, reference && reference->statistics);

  FeatureProgress state{of, "", FeatureSums(network->features()), FeatureSums(network->features()),
                        ScoreSums(subject.num, network->classes())};
  const Keeper keeper(args, state, all, stop);
  print_ranks(all, backend);
  if (first) print_header(backend, args, subject, reference ? &*reference : nullptr, *network);
  agree(all, [&] {
    if (!first || args.out.empty() || !file_exists(keeper.file())) return;
    read_feature_progress(keeper.file(), state);
    std::fprintf(stderr, "resumed  from %s, after %s images%s\n", keeper.file().c_str(),
                 grouped(state.reference.count + state.images.count).c_str(),
                 state.numerics == backend.numerics() ? "" : ", begun on another backend");
  });
  state.numerics = backend.numerics();

  if (reference && !known) {
    const Dataset& d = reference->data;
    const Shape shape{1, d.h, d.w, d.c};
    std::optional<FeatureNetwork> own;
    if (shape != subject.image) make_network(own, shape);
    if (!complete(*reference, args, own ? *own : *network, state, keeper)) return Status::kStopped;
  }
  if (!add_subject(subject, args, backend, batch, *network, state, keeper)) return Status::kStopped;
  if (!first) return Status::kOk;

  const nlohmann::ordered_json result =
      result_of(args, reference ? &*reference : nullptr, subject, state);
  if (args.out.empty()) return Status::kOk;
  write_file(args.out, to_text(result));
  if (file_exists(keeper.file())) FileSystem::real().remove_file(keeper.file().c_str());
  return Status::kOk;
}

}  // namespace ddpm::tools
