// ddpm probe: one forward pass, or one gradient, on given inputs, to compare with other frameworks.
#include <cstdio>
#include <memory>
#include <vector>

#include "engine/checkpoint.h"
#include "engine/file_io.h"
#include "engine/safetensors.h"
#include "model/forward.h"
#include "model/objective.h"
#include "model/pipeline.h"
#include "tools/commands.h"
#include "tools/ranks.h"

namespace ddpm::tools {
namespace {

// The inputs of a probe, checked against the model.
class Inputs {
 public:
  Inputs(const std::string& path, const Pipeline& p) : file_(path, Status::kConfig), p_(p) {}

  // [N,C,H,W] as (N,H,W,C); the first image tensor sets N.
  std::vector<float> images(const char* name) {
    const UNetConfig& u = p_.unet;
    const TensorInfo& t = need(name, "F32", 4);
    if (n_ == 0) n_ = static_cast<int>(t.shape[0]);
    if (n_ < 1 || t.shape[0] != static_cast<uint64_t>(n_) ||
        t.shape[1] != static_cast<uint64_t>(u.in_channels) ||
        t.shape[2] != static_cast<uint64_t>(u.sample_height) ||
        t.shape[3] != static_cast<uint64_t>(u.sample_width))
      fail(Status::kConfig, "%s: \"%s\" must be [N,%d,%d,%d], N the same for all inputs",
           file_.path().c_str(), name, u.in_channels, u.sample_height, u.sample_width);
    std::vector<float> values(t.elements);
    file_.read_f32(t, values.data());
    return to_nhwc(values, n_, u.sample_height, u.sample_width, u.in_channels);
  }

  std::vector<int32_t> indices(const char* name, int limit) {
    const TensorInfo& t = need(name, "I64", 1);
    std::vector<int64_t> values(t.elements);
    file_.read(t, values.data());
    if (values.size() != static_cast<size_t>(n_))
      fail(Status::kConfig, "%s: \"%s\" has %zu entries for %d images", file_.path().c_str(), name,
           values.size(), n_);
    for (int64_t v : values)
      if (v < 0 || v >= limit)
        fail(Status::kConfig, "%s: \"%s\" holds %lld; allowed: 0 to %d", file_.path().c_str(), name,
             static_cast<long long>(v), limit - 1);
    return {values.begin(), values.end()};
  }

  int n() const { return n_; }

 private:
  const TensorInfo& need(const char* name, const char* dtype, size_t rank) {
    const TensorInfo* t = file_.find(name);
    if (t == nullptr || t->dtype != dtype || t->shape.size() != rank)
      fail(Status::kConfig, "%s: needs a tensor \"%s\", %s with %zu dimension%s",
           file_.path().c_str(), name, dtype, rank, rank == 1 ? "" : "s");
    return *t;
  }

  SafetensorsReader file_;
  const Pipeline& p_;
  int n_ = 0;
};

void write_tensors(const std::string& path, std::vector<TensorSource> tensors) {
  OutputFile file(path);
  write_safetensors(file, std::move(tensors));
  file.commit();
}

Tensor persistent_batch(Graph& g, const UNetConfig& u, int n, const char* name) {
  return g.persistent({n, u.sample_height, u.sample_width, u.in_channels}, DType::kF32, name);
}

void probe_forward(const ProbeArgs& args, const Pipeline& p, Backend& backend) {
  const UNetConfig& u = p.unet;
  Inputs inputs(args.input, p);
  const std::vector<float> sample = inputs.images("sample");
  const std::vector<int32_t> t = inputs.indices("timestep", p.scheduler.num_train_timesteps);

  ForwardGraph f = build_forward_graph(backend, u, p.scheduler.num_train_timesteps, inputs.n());
  const Shape out = f.graph.shape(f.output);
  const auto store = load_store(backend, p, f.graph.params());
  Executor executor(std::move(f.graph), store->arenas());
  executor.upload(f.sample, sample.data());
  executor.upload(f.timestep, t.data());
  if (f.class_labels) {
    const auto labels = inputs.indices("class_labels", *u.num_class_embeds);
    executor.upload(f.class_labels, labels.data());
  }
  executor.run(Phase::kSetup);
  executor.step();
  std::vector<float> values(static_cast<size_t>(out.count()));
  executor.download(values.data(), f.output);
  values = to_nchw(values, out.n, out.h, out.w, out.c);
  const auto extent = [](int v) { return static_cast<uint64_t>(v); };
  write_tensors(args.out,
                {tensor_in_memory("model_output", DType::kF32,
                                  {extent(out.n), extent(out.c), extent(out.h), extent(out.w)},
                                  values.data())});
}

void probe_gradient(const ProbeArgs& args, const Pipeline& p, Backend& backend) {
  UNetConfig u = p.unet;
  u.dropout = 0;
  Inputs inputs(args.input, p);
  const std::vector<float> x0 = inputs.images("x0"), noise = inputs.images("noise");
  const std::vector<int32_t> t = inputs.indices("timestep", p.scheduler.num_train_timesteps);

  Graph g(backend, Mode::kTraining);
  const int n = inputs.n();
  TrainingBatch batch{.x0 = persistent_batch(g, u, n, "x0"),
                      .timestep = g.persistent({1, 1, 1, n}, DType::kI32, "timestep"),
                      .noise = persistent_batch(g, u, n, "noise")};
  if (u.num_class_embeds)
    batch.class_labels = g.persistent({1, 1, 1, n}, DType::kI32, "class_labels");
  add_objective(g, u, p.scheduler, {.loss = usual_loss(p.scheduler.variance_type)}, batch);
  ParamStore store(backend, g.params(), {Arena::kWeights, Arena::kGradients});
  load_weights(SafetensorsReader(p.weights), store, Arena::kWeights);
  Executor executor(std::move(g), store.arenas());
  executor.upload(batch.x0, x0.data());
  executor.upload(batch.noise, noise.data());
  executor.upload(batch.timestep, t.data());
  if (batch.class_labels) {
    const auto labels = inputs.indices("class_labels", *u.num_class_embeds);
    executor.upload(batch.class_labels, labels.data());
  }
  executor.run(Phase::kSetup);
  executor.step();

  const float loss = executor.state().loss;
  std::vector<std::vector<float>> gradients;
  std::vector<TensorSource> tensors{tensor_in_memory("loss", DType::kF32, {}, &loss)};
  for (const CheckpointTensor& c : checkpoint_tensors(store.params())) {
    gradients.emplace_back();
    store.read(Arena::kGradients, c, gradients.back());
    tensors.push_back(tensor_in_memory(c.key, DType::kF32, c.shape, gradients.back().data()));
  }
  write_tensors(args.out, std::move(tensors));
}

}  // namespace

void run_probe(const ProbeArgs& args) {
  require_one_process();
  const Pipeline p = open_pipeline(args.model);
  require_writable_file(args.out);
  const std::unique_ptr<Backend> backend = open_backend(args.device);
  if (args.what == "forward")
    probe_forward(args, p, *backend);
  else
    probe_gradient(args, p, *backend);
  std::printf("%s\n", args.out.c_str());
}

}  // namespace ddpm::tools
