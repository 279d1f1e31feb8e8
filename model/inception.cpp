#include "model/inception.h"

#include <cmath>
#include <map>
#include <utility>

#include "engine/json.h"
#include "engine/ops.h"

namespace ddpm {
namespace {

constexpr double kEpsilon = 0.001;  // of the batch norms
constexpr const char* kNorm[] = {".bn.weight", ".bn.bias", ".bn.running_mean", ".bn.running_var"};

[[noreturn]] void fail_weights(const SafetensorsReader& file, const std::string& why) {
  fail(Status::kConfig,
       "'%s' holds no Inception-v3 as PyTorch-FID has it: %s; tools/convert_inception.py makes the "
       "file",
       file.path().c_str(), why.c_str());
}

const TensorInfo& find(const SafetensorsReader& file, const std::string& name) {
  const TensorInfo* tensor = file.find(name);
  if (tensor == nullptr) fail_weights(file, "it has no tensor " + in_quotes(name));
  return *tensor;
}

void require_shape(const SafetensorsReader& file, const TensorInfo& tensor,
                   const std::vector<uint64_t>& shape) {
  if (tensor.shape == shape) return;
  const auto text = [](const std::vector<uint64_t>& dims) {
    std::string all;
    for (const uint64_t d : dims) all += (all.empty() ? "" : ",") + std::to_string(d);
    return "[" + all + "]";
  };
  fail_weights(file, in_quotes(tensor.name) + " is " + text(tensor.shape) + ", not " + text(shape));
}

// A convolution with batch norm and ReLU; stride 1 keeps the size unless it is `valid`, stride 2 is
// without padding.
struct Layer {
  const char* name;
  int h = 1, w = 1, stride = 1;
  bool valid = false;

  bool padded() const { return stride == 1 && !valid; }
};

enum class Pooling { kNone, kAverage, kMax, kHalve };

// A path through a block: pooling, layers one behind the other, and what comes out of the last,
// side by side. Without `ends` the pooled input itself comes out.
struct Branch {
  std::vector<Layer> trunk, ends;
  Pooling pooling = Pooling::kNone;
};
using Block = std::vector<Branch>;

const Block kA = {{{}, {{"branch1x1"}}},
                  {{{"branch5x5_1"}}, {{"branch5x5_2", 5, 5}}},
                  {{{"branch3x3dbl_1"}, {"branch3x3dbl_2", 3, 3}}, {{"branch3x3dbl_3", 3, 3}}},
                  {{}, {{"branch_pool"}}, Pooling::kAverage}};
const Block kB = {{{}, {{"branch3x3", 3, 3, 2}}},
                  {{{"branch3x3dbl_1"}, {"branch3x3dbl_2", 3, 3}}, {{"branch3x3dbl_3", 3, 3, 2}}},
                  {{}, {}, Pooling::kHalve}};
const Block kC = {{{}, {{"branch1x1"}}},
                  {{{"branch7x7_1"}, {"branch7x7_2", 1, 7}}, {{"branch7x7_3", 7, 1}}},
                  {{{"branch7x7dbl_1"},
                    {"branch7x7dbl_2", 7, 1},
                    {"branch7x7dbl_3", 1, 7},
                    {"branch7x7dbl_4", 7, 1}},
                   {{"branch7x7dbl_5", 1, 7}}},
                  {{}, {{"branch_pool"}}, Pooling::kAverage}};
const Block kD = {{{{"branch3x3_1"}}, {{"branch3x3_2", 3, 3, 2}}},
                  {{{"branch7x7x3_1"}, {"branch7x7x3_2", 1, 7}, {"branch7x7x3_3", 7, 1}},
                   {{"branch7x7x3_4", 3, 3, 2}}},
                  {{}, {}, Pooling::kHalve}};
Block block_e(Pooling pooling) {
  return {{{}, {{"branch1x1"}}},
          {{{"branch3x3_1"}}, {{"branch3x3_2a", 1, 3}, {"branch3x3_2b", 3, 1}}},
          {{{"branch3x3dbl_1"}, {"branch3x3dbl_2", 3, 3}},
           {{"branch3x3dbl_3a", 1, 3}, {"branch3x3dbl_3b", 3, 1}}},
          {{}, {{"branch_pool"}}, pooling}};
}

class Inception {
 public:
  Inception(Graph& g, const SafetensorsReader& weights) : g_(g), file_(weights) {}

  // What goes into the last pooling.
  Tensor build(Tensor x) {
    x = layer(x, "", {"Conv2d_1a_3x3", 3, 3, 2});
    x = layer(x, "", {"Conv2d_2a_3x3", 3, 3, 1, true});
    x = layer(x, "", {"Conv2d_2b_3x3", 3, 3});
    x = pool(x, Pooling::kHalve);
    x = layer(x, "", {"Conv2d_3b_1x1"});
    x = layer(x, "", {"Conv2d_4a_3x3", 3, 3, 1, true});
    x = pool(x, Pooling::kHalve);
    for (const char* name : {"Mixed_5b", "Mixed_5c", "Mixed_5d"}) x = block(x, name, kA);
    x = block(x, "Mixed_6a", kB);
    for (const char* name : {"Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"})
      x = block(x, name, kC);
    x = block(x, "Mixed_7a", kD);
    x = block(x, "Mixed_7b", block_e(Pooling::kAverage));
    return block(x, "Mixed_7c", block_e(Pooling::kMax));
  }

 private:
  // Channels that a layer puts out; its tensors fit `c` channels that come in.
  int width(const std::string& name, const Layer& l, int c) const {
    const TensorInfo& filter = find(file_, name + ".conv.weight");
    constexpr uint64_t kMost = 1 << 16;
    const uint64_t k = filter.shape.empty() ? 0 : filter.shape[0];
    if (k < 1 || k > kMost) fail_weights(file_, in_quotes(filter.name) + " has no width");
    const auto side = [](int n) { return static_cast<uint64_t>(n); };
    require_shape(file_, filter, {k, side(c), side(l.h), side(l.w)});
    for (const char* part : kNorm) require_shape(file_, find(file_, name + part), {k});
    return static_cast<int>(k);
  }

  Tensor layer(Tensor x, const std::string& block, const Layer& l, const ops::Part& to = {}) {
    const std::string name = block + l.name;
    const int h = l.padded() ? l.h / 2 : 0, w = l.padded() ? l.w / 2 : 0;
    const Tensor y = ops::conv(g_, x, name,
                               {.k = width(name, l, g_.shape(x).c),
                                .kernel = l.h,
                                .kernel_w = l.w,
                                .stride = l.stride,
                                .pad = {h, w, h, w},
                                .statistics = false});
    return ops::relu(g_, y, to);
  }

  Tensor pool(Tensor x, Pooling pooling, const ops::Part& to = {}) {
    PoolDesc d;
    d.average = pooling == Pooling::kAverage;
    d.stride = pooling == Pooling::kHalve ? 2 : 1;
    d.pad = pooling == Pooling::kHalve ? 0 : 1;
    return ops::pool(g_, x, d, to);
  }

  Tensor block(Tensor x, const std::string& name, const Block& branches) {
    const std::string prefix = name + ".";
    const Tensor y = joint(x, prefix, branches);
    int offset = 0;
    for (const Branch& b : branches) {
      if (b.ends.empty()) {
        pool(x, b.pooling, {y, offset});
        offset += g_.shape(x).c;
        continue;
      }
      Tensor t = b.pooling == Pooling::kNone ? x : pool(x, b.pooling);
      for (const Layer& l : b.trunk) t = layer(t, prefix, l);
      for (const Layer& l : b.ends) {
        layer(t, prefix, l, {y, offset});
        offset += out_channels(prefix, l);
      }
    }
    return y;
  }

  int out_channels(const std::string& prefix, const Layer& l) const {
    const std::string name = prefix + l.name;
    const TensorInfo& filter = find(file_, name + ".conv.weight");
    return width(name, l, filter.shape.size() == 4 ? static_cast<int>(filter.shape[1]) : 0);
  }

  // Room for what comes out of all branches.
  Tensor joint(Tensor x, const std::string& prefix, const Block& branches) {
    Shape y = g_.shape(x);
    int channels = 0;
    bool halved = false;
    for (const Branch& b : branches) {
      if (b.ends.empty()) channels += y.c;
      for (const Layer& l : b.ends) {
        channels += out_channels(prefix, l);
        halved = halved || l.stride == 2;
      }
    }
    if (halved) y = PoolDesc{.x = y, .stride = 2}.y();
    return g_.activation({y.n, y.h, y.w, channels});
  }

  Graph& g_;
  const SafetensorsReader& file_;
};

std::vector<float> read_values(const SafetensorsReader& file, const std::string& name) {
  const TensorInfo& tensor = find(file, name);
  std::vector<float> values(tensor.elements);
  file.read_f32(tensor, values.data());
  return values;
}

// Filter and bias of a layer with its batch norm: w g / s and b - m g / s, s^2 = var + epsilon.
struct Folded {
  std::vector<float> filter, bias;
};
Folded fold(const SafetensorsReader& file, const std::string& name) {
  std::vector<float> norm[4];
  for (size_t i = 0; i < 4; ++i) norm[i] = read_values(file, name + kNorm[i]);
  Folded f{read_values(file, name + ".conv.weight"), {}};
  const size_t rows = norm[0].size(), row = f.filter.size() / rows;
  for (size_t k = 0; k < rows; ++k) {
    const double factor = norm[0][k] / std::sqrt(norm[3][k] + kEpsilon);
    f.bias.push_back(static_cast<float>(norm[1][k] - norm[2][k] * factor));
    for (size_t i = k * row; i < (k + 1) * row; ++i)
      f.filter[i] = static_cast<float>(f.filter[i] * factor);
  }
  return f;
}

}  // namespace

InceptionGraph build_inception_graph(Backend& backend, const SafetensorsReader& weights,
                                     const Shape& images, int side) {
  DDPM_CHECK(images.positive() && images.c == 3 && side >= 75, "Inception-v3 of %s at %d",
             to_string(images).c_str(), side);
  DDPM_CHECK(backend.compute_type() == DType::kF32, "Inception-v3 in %s",
             name_of(backend.compute_type()));
  InceptionGraph f{Graph(backend, Mode::kInference), {}, {}, {}};
  Graph& g = f.graph;
  f.images = g.persistent(images, DType::kF32, "images");
  const Tensor x = Inception(g, weights).build(ops::resize(g, f.images, side, side));
  const Shape s = g.shape(x);
  f.features = g.persistent({s.n, 1, 1, s.c}, DType::kF32, "features");
  ops::pool(g, x, {.average = true, .r = s.h, .s = s.w}, {f.features, 0});

  const TensorInfo& matrix = find(weights, "fc.weight");
  const uint64_t classes = matrix.shape.empty() ? 0 : matrix.shape[0];
  require_shape(weights, matrix, {classes, static_cast<uint64_t>(s.c)});
  if (classes < 1 || classes > 1 << 16) fail_weights(weights, "\"fc.weight\" has no classes");
  const int k = static_cast<int>(classes);
  const Tensor y = ops::linear(g, f.features, "fc", {{"fc", k}});
  f.logits = g.persistent({s.n, 1, 1, k}, DType::kF32, "logits");
  g.add(backend.copy(g.shape(y).count(), DType::kF32, y, f.logits, Write::kOverwrite));
  g.params().lay_out();
  return f;
}

std::unique_ptr<ParamStore> load_inception(Backend& backend, const SafetensorsReader& weights,
                                           const Params& params) {
  auto store = std::make_unique<ParamStore>(backend, params, std::vector<Arena>{Arena::kWeights});
  std::string folded_name;
  Folded folded;
  for (const CheckpointTensor& t : checkpoint_tensors(params)) {
    if (t.key == "fc.bias") continue;  // stays zero
    const std::string name = t.key.substr(0, t.key.rfind('.'));
    std::vector<float> values;
    if (name == "fc") {
      values = read_values(weights, t.key);
    } else {
      if (name != folded_name) folded = fold(weights, folded_name = name);
      values = t.key.ends_with(".weight") ? folded.filter : folded.bias;
    }
    for (const float v : values)
      if (!std::isfinite(v))
        fail(Status::kFile, "'%s': the layer %s is not finite; convert the file again",
             weights.path().c_str(), in_quotes(name).c_str());
    store->write(Arena::kWeights, t, values);
  }
  return store;
}

std::string inception_hash(const SafetensorsReader& weights) {
  std::map<std::string, std::string> hashes;  // in whatever order the file has them
  for (const TensorInfo& t : weights.tensors()) hashes[t.name] = weights.hash(t);
  std::string all;
  for (const auto& [name, hash] : hashes) all += name + " " + hash + "\n";
  return hash_of(all);
}

}  // namespace ddpm
