#include "model/unet.h"

#include <string>
#include <utility>
#include <vector>

#include "engine/ops.h"

namespace ddpm {
namespace {

std::string numbered(const char* name, int i) { return format("%s.%d", name, i); }

// Every residual block has its own linear layer of the time embedding. All of them are rows of one
// weight, so they are one product; a block reads its columns of the result.
struct TimeProjections {
  std::vector<ops::LinearPart> parts;
  Tensor table;  // (N, all rows)
  size_t next = 0;
  int offset = 0;

  ops::SampleBias take(int rows) {
    DDPM_CHECK(next < parts.size() && parts[next].rows == rows, "time projection %zu", next);
    const ops::SampleBias bias{table, offset};
    offset += parts[next++].rows;
    return bias;
  }
};

class UNet {
 public:
  UNet(Graph& g, const UNetConfig& config) : g_(g), c_(config) {}

  Tensor build(int timesteps, const UNetInputs& in) {
    embed_time(timesteps, in);
    Tensor h = conv3x3(in.sample, "conv_in", c_.block_out_channels.front());
    skips_.push_back(h);
    for (int i = 0; i < c_.levels(); ++i) h = down_block(h, i);
    h = mid_block(h);
    for (int i = 0; i < c_.levels(); ++i) h = up_block(h, i);
    return conv3x3(norm(h, "conv_norm_out"), "conv_out", c_.out_channels, Init::kNearZero);
  }

 private:
  // The residual blocks in the order they are built, as rows of the time projection.
  std::vector<ops::LinearPart> projection_parts() const {
    std::vector<ops::LinearPart> parts;
    const auto add = [&](const std::string& block, int count, int channels) {
      for (int j = 0; j < count; ++j)
        parts.push_back({block + ".resnets." + std::to_string(j) + ".time_emb_proj", channels});
    };
    const auto& widths = c_.block_out_channels;
    for (int i = 0; i < c_.levels(); ++i)
      add(numbered("down_blocks", i), c_.layers_per_block, widths[static_cast<size_t>(i)]);
    add("mid_block", 2, widths.back());
    for (int i = 0; i < c_.levels(); ++i)
      add(numbered("up_blocks", i), c_.layers_per_block + 1, up_width(i));
    return parts;
  }

  int up_width(int i) const {
    return c_.block_out_channels[static_cast<size_t>(c_.levels() - 1 - i)];
  }

  // Every block's projection of the time embedding, for each image: worked out from its timestep,
  // or looked up by the step.
  void embed_time(int timesteps, const UNetInputs& in) {
    time_.parts = projection_parts();
    if (!in.known_timesteps) {
      time_.table = project_time(timesteps, in.timestep, in.class_labels);
      return;
    }
    DDPM_CHECK(!c_.num_class_embeds && !g_.training(), "known timesteps, with classes");
    Tensor known;
    {
      const Graph::PhaseScope setup(g_, Phase::kSetup);
      known = project_time(timesteps, in.known_timesteps, {});
      g_.keep(known);
    }
    time_.table = in.timestep ? ops::table_rows(g_, known, in.timestep)
                              : ops::step_row(g_, known, g_.shape(in.sample).n);
  }

  // t I32 (n) -> (n, all projections)
  Tensor project_time(int timesteps, Tensor t, Tensor class_labels) {
    const int width = c_.time_embed_dim();
    TimeEmbeddingDesc d;
    d.n = static_cast<int>(g_.shape(t).count());
    d.dim = c_.block_out_channels.front();
    d.timesteps = timesteps;
    d.flip_sin_to_cos = c_.flip_sin_to_cos;
    d.freq_shift = static_cast<float>(c_.freq_shift);
    Tensor emb;
    {
      const Graph::Scope scope(g_, "time_embedding");
      emb = ops::time_embedding(g_, t, d);
      emb = ops::linear(g_, emb, "linear_1", {{"linear_1", width}});
      emb = ops::linear(g_, ops::silu(g_, emb), "linear_2", {{"linear_2", width}});
    }
    if (c_.num_class_embeds)
      emb = ops::add_embedding(g_, emb, class_labels, *c_.num_class_embeds, "class_embedding");
    return ops::linear(g_, ops::silu(g_, emb), "time_emb_proj", time_.parts);
  }

  ops::View norm(const ops::View& x, const char* name, bool silu = true, double dropout = 0) {
    return ops::group_norm_silu(g_, x, name,
                                {.groups = c_.norm_num_groups,
                                 .epsilon = static_cast<float>(c_.norm_eps),
                                 .silu = silu,
                                 .dropout = static_cast<float>(dropout)});
  }

  Tensor conv3x3(const ops::View& x, const char* name, int k, Init init = Init::kGlorot) {
    return ops::conv(g_, x, name, {.k = k, .init = init});
  }

  // h = conv1(silu(norm1(x))) + time; y = conv2(dropout(silu(norm2(h)))) + shortcut(x)
  Tensor res_block(const ops::View& x, const std::string& name, int k) {
    const Graph::Scope scope(g_, name);
    const Tensor h =
        ops::conv(g_, norm(x, "norm1"), "conv1", {.k = k, .sample_bias = time_.take(k)});
    ops::ConvOptions second{.k = k, .init = Init::kNearZero};
    if (g_.shape(x.value).c == k && x.plain()) {
      second.residual = x.x;
    } else {
      second.shortcut = x;
      second.shortcut_name = "conv_shortcut";
    }
    return ops::conv(g_, norm(h, "norm2", true, c_.dropout), "conv2", second);
  }

  // y = proj(attention(norm(x))) + x
  Tensor attention_block(Tensor x, const std::string& name) {
    const Graph::Scope scope(g_, name);
    const int k = g_.shape(x).c;
    const Tensor qkv = ops::linear(g_, norm(x, "group_norm", false), "to_qkv",
                                   {{"to_q", k}, {"to_k", k}, {"to_v", k}});
    const Tensor o = ops::attention(g_, qkv, c_.heads(k));
    return ops::linear(g_, o, "to_out", {{"to_out.0", k}},
                       {.init = Init::kNearZero, .residual = x});
  }

  Tensor down_block(Tensor h, int i) {
    const Graph::Scope scope(g_, numbered("down_blocks", i));
    const int k = c_.block_out_channels[static_cast<size_t>(i)];
    for (int j = 0; j < c_.layers_per_block; ++j) {
      h = res_block(h, numbered("resnets", j), k);
      if (c_.down_attention[static_cast<size_t>(i)])
        h = attention_block(h, numbered("attentions", j));
      skips_.push_back(h);
    }
    if (i + 1 == c_.levels()) return h;
    const Graph::Scope down(g_, "downsamplers.0");
    ops::ConvOptions o{.k = k, .stride = 2};
    if (c_.downsample_padding == 0) o.pad = {0, 0, 1, 1};
    h = ops::conv(g_, h, "conv", o);
    skips_.push_back(h);
    return h;
  }

  Tensor mid_block(Tensor h) {
    const Graph::Scope scope(g_, "mid_block");
    const int k = c_.block_out_channels.back();
    h = res_block(h, "resnets.0", k);
    h = attention_block(h, "attentions.0");
    return res_block(h, "resnets.1", k);
  }

  Tensor up_block(Tensor h, int i) {
    const Graph::Scope scope(g_, numbered("up_blocks", i));
    const int k = up_width(i);
    for (int j = 0; j <= c_.layers_per_block; ++j) {
      const Tensor skip = skips_.back();
      skips_.pop_back();
      h = res_block(ops::concat(g_, h, skip), numbered("resnets", j), k);
      if (c_.up_attention[static_cast<size_t>(i)])
        h = attention_block(h, numbered("attentions", j));
    }
    if (i + 1 == c_.levels()) return h;
    const Graph::Scope up(g_, "upsamplers.0");
    return conv3x3(ops::upsample(g_, h), "conv", k);
  }

  Graph& g_;
  const UNetConfig& c_;
  TimeProjections time_;
  std::vector<Tensor> skips_;
};

}  // namespace

Tensor build_unet(Graph& g, const UNetConfig& config, int timesteps, const UNetInputs& inputs) {
  const Shape in = g.shape(inputs.sample);
  DDPM_CHECK(in.c == config.in_channels && in.h % (1 << (config.levels() - 1)) == 0 &&
                 in.w % (1 << (config.levels() - 1)) == 0,
             "a U-Net of %d levels over %s", config.levels(), to_string(in).c_str());
  const Tensor y = UNet(g, config).build(timesteps, inputs);
  g.params().lay_out();
  if (const Tensor shadow = g.arena(Arena::kShadow)) {
    const Tensor weights = g.arena(Arena::kWeights);
    g.add(g.backend().cast(g.params().arena_size(), DType::kF32, weights, g.info(shadow).dtype,
                           shadow),
          Phase::kSetup);
  }
  return y;
}

}  // namespace ddpm
