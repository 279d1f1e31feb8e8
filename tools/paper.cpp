// ddpm paper: a model beside Ho, Jain and Abbeel 2020, in one HTML page.
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <limits>
#include <nlohmann/json.hpp>

#include "engine/file_io.h"
#include "engine/json.h"
#include "model/pipeline.h"
#include "model/run_config.h"
#include "tools/commands.h"
#include "tools/eval.h"
#include "tools/eval_features.h"
#include "tools/html.h"
#include "tools/ranks.h"

namespace ddpm::tools {
namespace {

using Rows = std::vector<std::vector<std::string>>;

// Table 4 of the paper: CIFAR-10, test set.
struct RatePoint {
  int reverse_time;
  double rate, distortion;
};
constexpr RatePoint kTable4[] = {{1000, 1.77581, 0.95136}, {900, 0.11994, 12.02277},
                                 {800, 0.05415, 18.47482}, {700, 0.02866, 24.43656},
                                 {600, 0.01507, 30.80948}, {500, 0.00716, 38.03236},
                                 {400, 0.00282, 46.12765}, {300, 0.00081, 54.18826},
                                 {200, 0.00013, 60.97170}, {100, 0.00000, 67.60125}};

// What the pieces of the report are made of, in a folder beside it until the report is there.
struct Pieces {
  std::string folder;
  std::string path(const char* name) const { return folder + "/" + name; }
};

std::string number(double v, const char* how = "%.3f") {
  return std::isfinite(v) ? format(how, v) : "-";
}

std::string facts(const PaperArgs& args, const Pipeline& p, const BoundSums& sums) {
  const SchedulerConfig& s = p.scheduler;
  const std::string sampler = args.chain.sampler.empty() ? "ddpm" : args.chain.sampler;
  const std::string guided =
      args.chain.guidance != 1 ? format(", guided by %g", args.chain.guidance) : "";
  return html::table(
      {"", ""},
      {{"model", p.folder},
       {"images",
        format("%dx%dx%d", p.unet.sample_height, p.unet.sample_width, p.unet.in_channels)},
       {"data", args.data + (args.split.empty() ? "" : ", " + args.split + " split")},
       {"evaluated on", format("%lld images, seed %llu", static_cast<long long>(sums.images),
                               static_cast<unsigned long long>(args.seed))},
       {"schedule", format("%s, T = %d", name_of(s.beta_schedule).c_str(), s.num_train_timesteps)},
       {"prediction, variance", name_of(s.prediction_type) + ", " + name_of(s.variance_type)},
       {"sampler", sampler + guided}});
}

std::string bits_section(const BoundSums& sums) {
  const auto r = nll_json(sums);
  const double bits = r["bits_per_dim"], prior = r["prior"], decoder = r["decoder"];
  const double ci = sums.images > 1 ? sums.ci95() : std::numeric_limits<double>::quiet_NaN();
  return html::heading("Bits per dimension") +
         html::paragraph(
             "The variational bound by its terms (section 4.3): the prior L_T, the rate "
             "L_1 + ... + L_T-1, the distortion L_0. The paper's are of CIFAR-10's test "
             "set, with L_simple and fixed_large.") +
         html::table({"", "bits/dim", "95 %", "prior", "rate", "distortion L_0"},
                     {{"this model", number(bits), "+- " + number(ci), number(prior, "%.2g"),
                       number(bits - prior - decoder), number(decoder)},
                      {"paper, CIFAR-10", "3.75", "-", "1e-05", "1.78", "1.97"}});
}

std::string tables_1_and_2(const BoundSums& sums, const nlohmann::json& features) {
  const auto of = [&](const char* key, const char* how) {
    return features.contains(key) && features[key].is_number()
               ? number(features[key].get<double>(), how)
               : std::string("-");
  };
  const double bits = nll_json(sums)["bits_per_dim"];
  std::string text =
      html::heading("Tables 1 and 2: sample quality and likelihood") +
      html::paragraph(
          "Inception score (higher is better), Frechet inception distance (lower) and "
          "bits/dim. The paper's rows are of CIFAR-10; the distance is to the training "
          "set.");
  if (features.is_null())
    text += html::paragraph(
        "Scores of this model are missing: they need the weights of Inception-v3, --inception "
        "FILE.");
  return text + html::table(
                    {"", "IS", "FID", "bits/dim, test (train)"},
                    {{"this model", of("inception_score", "%.2f"), of("fid", "%.2f"), number(bits)},
                     {"paper: eps, L_simple", "9.46 +- 0.11", "3.17", "<= 3.75 (3.72)"},
                     {"paper: eps, L, fixed isotropic", "7.67 +- 0.13", "13.51", "<= 3.70 (3.69)"},
                     {"paper: eps, L, learned diagonal", "unstable", "unstable", "-"},
                     {"paper: mu, L, learned diagonal", "7.28 +- 0.10", "23.69", "-"},
                     {"paper: mu, L, fixed isotropic", "8.06 +- 0.09", "13.22", "-"},
                     {"paper: mu, squared error", "unstable", "unstable", "-"}});
}

std::string rate_section(const BoundSums& sums) {
  const std::vector<double> rate = sums.rate(), distortion = sums.distortion();
  html::Series curve{"this model", rate, distortion}, paper{"paper, CIFAR-10", {}, {}, true};
  html::Series by_time{"this model", {}, distortion}, paper_by_time = paper;
  const auto timesteps = static_cast<double>(rate.size());
  for (size_t t = 0; t < rate.size(); ++t) by_time.x.push_back(timesteps - static_cast<double>(t));
  for (const RatePoint& p : kTable4) {
    paper.x.push_back(p.rate);
    paper.y.push_back(p.distortion);
    paper_by_time.x.push_back(p.reverse_time);
    paper_by_time.y.push_back(p.distortion);
  }
  const bool same_steps = rate.size() == 1000;  // else its steps are no one's here
  std::vector<html::Series> times{by_time};
  if (same_steps) times.push_back(paper_by_time);
  Rows rows;
  const auto ours = rd_json(sums)["rows"];
  for (size_t i = 0; i < ours.size(); ++i) {
    std::vector<std::string> row{std::to_string(ours[i]["reverse_time"].get<int>()),
                                 number(ours[i]["rate"], "%.5f"),
                                 number(ours[i]["distortion"], "%.5f")};
    const bool known = same_steps && i < std::size(kTable4);
    row.push_back(known ? number(kTable4[i].rate, "%.5f") : "-");
    row.push_back(known ? number(kTable4[i].distortion, "%.5f") : "-");
    rows.push_back(row);
  }
  return html::heading("Rate and distortion (figure 5, table 4)") +
         html::paragraph(
             "Progressive coding: what a receiver has got of the code so far, in "
             "bits/dim, and how far the image it makes of that is off, as the root mean "
             "square of 0..255.") +
         html::chart({"Distortion over rate", "rate, bits/dim", "distortion", {curve, paper}}) +
         html::chart({"Distortion over time", "reverse steps", "distortion", times}) +
         html::table({"reverse time", "rate", "distortion", "paper's rate", "paper's distortion"},
                     rows);
}

std::string terms_section(const BoundSums& sums) {
  html::Series terms{"", {}, {}};
  const std::vector<double> all = sums.mean_terms();
  for (size_t t = 1; t < all.size(); ++t) {
    terms.x.push_back(static_cast<double>(t));
    terms.y.push_back(std::log10(all[t]));
  }
  return html::heading("The bound by timestep") +
         html::chart({"log10 of bits/dim, t >= 1", "t", "log10 bits/dim", {terms}});
}

// The last loss of each bucket of timesteps that the run logged.
std::string loss_section(const std::string& model) {
  std::ifstream file(model + "/metrics.jsonl");
  std::vector<double> sum, count;
  std::vector<nlohmann::json> lines;
  for (std::string line; std::getline(file, line);) {
    const auto json = nlohmann::json::parse(line, nullptr, false);
    if (!json.is_object() || !json.contains("loss_by_timestep")) continue;
    if (lines.size() == 20) lines.erase(lines.begin());
    lines.push_back(json["loss_by_timestep"]);
  }
  for (const auto& buckets : lines) {
    sum.resize(buckets.size());
    count.resize(buckets.size());
    for (size_t b = 0; b < buckets.size(); ++b)
      if (buckets[b].is_number()) {
        sum[b] += buckets[b].get<double>();
        ++count[b];
      }
  }
  if (sum.empty()) return {};
  html::Series loss{"", {}, {}};
  for (size_t b = 0; b < sum.size(); ++b) {
    loss.x.push_back((static_cast<double>(b) + 0.5) / static_cast<double>(sum.size()));
    loss.y.push_back(sum[b] / count[b]);
  }
  return html::heading("Training loss by timestep") +
         html::paragraph("Of the last lines that the run logged; t is given as a share of T.") +
         html::chart({"Loss", "t / T", "loss", {loss}});
}

std::string pictures(const Pieces& pieces) {
  return html::heading("Samples") + html::picture(pieces.path("samples.png"), "a grid of samples") +
         html::heading("Progressive generation (figure 6)") +
         html::paragraph("What the chain takes for x_0, from noise to the image.") +
         html::picture(pieces.path("progressive.png"), "predictions of x_0 along chains") +
         html::heading("Shared latents (figure 7)") +
         html::paragraph(
             "Left an x_t at t = 3/4, 1/2 and 1/4 of T, and then images that its chain "
             "may end in: what is still open at that time differs.") +
         html::picture(pieces.path("shared.png"), "images that share a latent") +
         html::heading("Interpolation (figure 8)") +
         html::paragraph(
             "Two images of the model, noised to half of T, mixed there, and led back.") +
         html::picture(pieces.path("interpolation.png"), "images between two");
}

// A command on the report's model, as the report is asked for.
template <typename Args>
Args common(const PaperArgs& args) {
  Args command;
  command.model = args.model;
  command.chain = args.chain;
  command.seed = args.seed;
  command.device = args.device;
  return command;
}

void draw(const PaperArgs& args, const Pipeline& p, const Pieces& pieces) {
  auto sample = common<SampleArgs>(args);
  sample.out = pieces.path("samples.png");
  run_sample(sample);
  sample.out = pieces.path("pairs.safetensors");  // whose mixes are drawn below
  sample.num = 8;
  run_sample(sample);
  auto progressive = common<ProgressiveArgs>(args);
  progressive.out = pieces.path("progressive.png");
  run_progressive(progressive);
  const int timesteps = p.scheduler.num_train_timesteps;
  progressive.out = pieces.path("shared.png");
  progressive.shared = {timesteps * 3 / 4, timesteps / 2, timesteps / 4};
  if (progressive.chain.sampler == "ddim") progressive.chain.eta = 1;  // ends differ by noise
  run_progressive(progressive);
  auto interpolate = common<InterpolateArgs>(args);
  interpolate.from = sample.out;
  interpolate.out = pieces.path("interpolation.png");
  run_interpolate(interpolate);
}

}  // namespace

Status run_paper(const PaperArgs& args) {
  require_one_process();
  if (!args.out.ends_with(".html"))
    fail(Status::kUsage, "--out %s: must end in .html", args.out.c_str());
  const Pipeline p = open_pipeline(args.model);
  if (!args.inception.empty()) open_inception(args.inception);
  require_classes(args.chain, p.unet);
  require_writable_file(args.out);
  const Pieces pieces{args.out + ".pieces"};
  make_folders(pieces.folder);
  auto eval = common<EvalArgs>(args);  // whose chain the bound does not read
  eval.data = args.data;
  eval.split = args.split;
  eval.num = args.num;
  eval.batch_size = args.batch_size;
  std::optional<BoundSums> sums;
  {
    const StopSignal stop;
    Ranks alone({}, bound_device(args.device), {}, {});
    sums = evaluate_bound(eval, pieces.path("bound"), &stop, alone);
  }
  if (!sums) return Status::kStopped;
  nlohmann::json features;
  if (!args.inception.empty()) {
    eval.metric = "fid";
    eval.split.clear();
    eval.num = args.fid_num;
    eval.inception = args.inception;
    eval.out = pieces.path("features.json");
    if (run_eval(eval) == Status::kStopped) return Status::kStopped;
    features = *read_json_file(eval.out, Status::kFile);
  }
  draw(args, p, pieces);
  write_file(args.out,
             html::page("A diffusion model beside the paper",
                        html::paragraph("Ho, Jain and Abbeel, Denoising Diffusion Probabilistic "
                                        "Models, 2020: what it reports, of this model.") +
                            facts(args, p, *sums) + pictures(pieces) + bits_section(*sums) +
                            tables_1_and_2(*sums, features) + rate_section(*sums) +
                            terms_section(*sums) + loss_section(args.model)));
  std::filesystem::remove_all(pieces.folder);
  std::printf("%s\n", args.out.c_str());
  return Status::kOk;
}

}  // namespace ddpm::tools
