#include "model/sampler.h"

#include <algorithm>
#include <cmath>

#include "engine/json.h"
#include "engine/nearest_name.h"

namespace ddpm {
namespace {

// In the order of the enums.
std::vector<std::string> sampler_names() { return {"ddpm", "ddim", "dpmpp2m"}; }
std::vector<std::string> spacing_names() { return {"leading", "trailing", "linspace"}; }

// Prediction of the noise at t, before any clipping; of a previous mean see ddim_row.
Mix epsilon_mix(PredictionType type, const Schedule& s, int t) {
  const double ab = s.alpha_bar(t), signal = std::sqrt(ab), noise = std::sqrt(1 - ab);
  switch (type) {
    case PredictionType::kEpsilon:
      return {0, 1};
    case PredictionType::kSample:
      return {1 / noise, -signal / noise};
    case PredictionType::kVPrediction:
      return {noise, signal};
    case PredictionType::kPreviousMean:
      break;
  }
  fail(Status::kBug, "noise of prediction type %d", static_cast<int>(type));
}

// A row that predicts x_0 at t and does nothing with it yet.
SamplerRow prediction_row(const Schedule& s, const SchedulerConfig& c, int t) {
  SamplerRow row;
  row.t = t;
  const Mix x0 = x0_mix(c.prediction_type, s, t);
  row.x0_x = static_cast<float>(x0.x);
  row.x0_out = static_cast<float>(x0.out);
  return row;
}

void clip(SamplerRow& row, const SchedulerConfig& c) {
  if (c.clip_sample) row.clip = static_cast<float>(c.clip_sample_range);
}

// large, small: the variances of p(x_next | x_t) that are fixed, and a learned one's range.
void add_noise(SamplerRow& row, VarianceType type, double large, double small) {
  switch (type) {
    case VarianceType::kFixedLarge:
      row.x_z = static_cast<float>(std::sqrt(large));
      return;
    case VarianceType::kFixedSmall:
      row.x_z = static_cast<float>(std::sqrt(small));
      return;
    case VarianceType::kLearned:
      row.x_z = 1;
      row.z_out = 0.5f;
      return;
    case VarianceType::kLearnedRange:  // half way between the two, and half a range more at v = 1
      row.x_z = 1;
      row.z_log = static_cast<float>(0.25 * (std::log(large) + std::log(small)));
      row.z_out = static_cast<float>(0.25 * (std::log(large) - std::log(small)));
      return;
  }
}

// lambda of DPM-Solver: log of sqrt(ab) / sqrt(1 - ab).
double half_log_snr(double ab) { return 0.5 * std::log(ab / (1 - ab)); }

// Never more than the sampler's usual spacing has room for.
int default_steps(SamplerKind kind, int num_train_timesteps) {
  switch (kind) {
    case SamplerKind::kDdpm:
      return std::min(1000, num_train_timesteps);
    case SamplerKind::kDdim:
      return std::min(50, num_train_timesteps);
    case SamplerKind::kDpmpp2m:
      return std::min(20, num_train_timesteps - 1);
  }
  fail(Status::kBug, "unknown sampler %d", static_cast<int>(kind));
}

// Entry i of the list. Ties round to even and the arithmetic follows numpy's linspace and arange
// step for step: one unit in the last place decides a tie, and with it a timestep.
int spaced_timestep(SamplerKind kind, Spacing spacing, int i, int steps, int count) {
  const bool dpm = kind == SamplerKind::kDpmpp2m;  // its lists leave out their last entry, 0
  const int last = dpm ? steps : steps - 1;
  switch (spacing) {
    case Spacing::kLeading:
      return (last - i) * (count / (dpm ? steps + 1 : steps));
    case Spacing::kTrailing: {
      const double stride = (count - static_cast<double>(count) / steps) - count;
      return static_cast<int>(std::rint(count + i * stride)) - 1;
    }
    case Spacing::kLinspace:
      if (last == 0) return 0;
      return static_cast<int>(std::rint((last - i) * (static_cast<double>(count - 1) / last)));
  }
  fail(Status::kBug, "unknown spacing %d", static_cast<int>(spacing));
}

// The list of the options, whole and descending.
std::vector<int> given_timesteps(const Schedule& s, const SamplerOptions& o) {
  if (o.timesteps.empty()) {
    const Spacing usual = o.kind == SamplerKind::kDpmpp2m ? Spacing::kLinspace : Spacing::kLeading;
    return sampler_timesteps(o.kind, o.spacing.value_or(usual),
                             o.steps.value_or(default_steps(o.kind, s.timesteps())), s.timesteps());
  }
  if (o.steps || o.spacing)
    fail(Status::kUsage,
         "timesteps are given one by one: leave out the number of steps and spacing");
  std::vector<int> list = o.timesteps;
  std::sort(list.rbegin(), list.rend());
  for (const int t : list)
    if (t < 0 || t >= s.timesteps())
      fail(Status::kUsage, "timestep %d: the model has 0 to %d", t, s.timesteps() - 1);
  if (const auto twice = std::adjacent_find(list.begin(), list.end()); twice != list.end())
    fail(Status::kUsage, "timestep %d is given twice", *twice);
  return list;
}

// The first row of the list that is run.
size_t first_row(const std::vector<int>& list, const SamplerOptions& o) {
  const size_t rows = list.size();
  const double strength = o.strength;
  if (!(strength > 0 && strength <= 1))
    fail(Status::kUsage, "strength %g: use more than 0, at most 1", strength);
  // 50 * 0.58 is a little less than 29.
  const auto run = static_cast<size_t>(static_cast<double>(rows) * strength * (1 + 1e-12));
  if (run == 0)
    fail(Status::kUsage, "strength %g of %zu steps is less than one step; use at least %g",
         strength, rows, 1 / static_cast<double>(rows));
  size_t first = rows - std::min(run, rows);
  if (!o.start) return first;
  if (*o.start < list.back())
    fail(Status::kUsage, "timestep %d to start at: the chain has %d to %d", *o.start, list.back(),
         list.front());
  while (list[first] > *o.start) ++first;
  return first;
}

// x' = a x + b out solved for x, out being the same. Where x' is the prediction of x_0 alone, as
// `sample` has it at a chain's end, x' is as good an x as any.
SamplerRow inverse_row(const SamplerRow& row) {
  const double a = row.x_x + double{row.x_x0} * row.x0_x;
  const double b = row.x_out + double{row.x_x0} * row.x0_out;
  SamplerRow back;
  back.t = row.t;
  back.x_x = a == 0 ? 1 : static_cast<float>(1 / a);
  if (a != 0) back.x_out = static_cast<float>(-b / a);
  return back;
}

size_t index_of(const char* what, const std::vector<std::string>& names, std::string_view name) {
  const auto found = std::find(names.begin(), names.end(), name);
  if (found == names.end())
    fail(Status::kUsage, "unknown %s %s%s; known: %s, %s, %s", what, in_quotes(name).c_str(),
         did_you_mean(name, names).c_str(), names[0].c_str(), names[1].c_str(), names[2].c_str());
  return static_cast<size_t>(found - names.begin());
}

}  // namespace

Mix x0_mix(PredictionType type, const Schedule& s, int t) {
  const double ab = s.alpha_bar(t), signal = std::sqrt(ab), noise = std::sqrt(1 - ab);
  switch (type) {
    case PredictionType::kEpsilon:
      if (ab == 0) return {};  // pure noise says nothing of the image: the middle of its range
      return {1 / signal, -noise / signal};
    case PredictionType::kSample:
      return {0, 1};
    case PredictionType::kVPrediction:
      return {signal, -noise};
    case PredictionType::kPreviousMean: {
      const auto at = static_cast<size_t>(t);
      return {-s.coef2[at] / s.coef1[at], 1 / s.coef1[at]};
    }
  }
  fail(Status::kBug, "unknown prediction type %d", static_cast<int>(type));
}

SamplerKind parse_sampler(std::string_view name) {
  return static_cast<SamplerKind>(index_of("sampler", sampler_names(), name));
}

Spacing parse_spacing(std::string_view name) {
  return static_cast<Spacing>(index_of("spacing", spacing_names(), name));
}

std::string name_of(SamplerKind kind) { return sampler_names()[static_cast<size_t>(kind)]; }

std::string name_of(Spacing spacing) { return spacing_names()[static_cast<size_t>(spacing)]; }

std::vector<int> sampler_timesteps(SamplerKind kind, Spacing spacing, int steps,
                                   int num_train_timesteps) {
  if (steps < 1 || steps > num_train_timesteps)
    fail(Status::kUsage, "steps %d: the model has %d timesteps; use 1 to %d steps", steps,
         num_train_timesteps, num_train_timesteps);
  std::vector<int> list;
  for (int i = 0; i < steps; ++i) {
    list.push_back(spaced_timestep(kind, spacing, i, steps, num_train_timesteps));
    if (i > 0 && list[static_cast<size_t>(i)] >= list[static_cast<size_t>(i - 1)])
      fail(Status::kUsage,
           "steps %d: %s with %s spacing repeats timesteps of the model's %d; use at most %d steps "
           "or another spacing",
           steps, name_of(kind).c_str(), name_of(spacing).c_str(), num_train_timesteps,
           num_train_timesteps - 1);
  }
  return list;
}

// x' = coef_x0 clip(x0) + coef_x x + sigma z, the posterior q(x_next | x_t, x_0) with gaps. Of a
// network that predicts the mean of the very next timestep it is its output, which nothing clips.
SamplerRow ddpm_row(const Schedule& s, const SchedulerConfig& c, int t, int next) {
  const double ab = s.alpha_bar(t), abp = s.alpha_bar(next);
  const double alpha = ab / abp, beta = 1 - alpha;
  SamplerRow row = prediction_row(s, c, t);
  clip(row, c);
  row.x_x0 = static_cast<float>(std::sqrt(abp) * beta / (1 - ab));
  row.x_x = static_cast<float>(std::sqrt(alpha) * (1 - abp) / (1 - ab));
  if (c.prediction_type == PredictionType::kPreviousMean && next == t - 1) {
    row.x_x0 = row.x_x = 0;
    row.x_out = 1;
  }
  if (t > 0) add_noise(row, c.variance_type, beta, std::max((1 - abp) / (1 - ab) * beta, 1e-20));
  return row;
}

// x' = sqrt(abp) clip(x0) + sqrt(1 - abp - sigma^2) eps + sigma z; eps is the network's own, not
// the one that would fit the clipped x0. A previous mean says x0 so faintly (1.3e-4 of it at t =
// 999) that an unclipped one grows without end: there the noise is the clipped one's.
SamplerRow ddim_row(const Schedule& s, const SchedulerConfig& c, int t, int next, double eta) {
  const double ab = s.alpha_bar(t), abp = s.alpha_bar(next);
  const double sigma = eta * std::sqrt((1 - abp) / (1 - ab) * (1 - ab / abp));
  const double direction = std::sqrt(std::max(1 - abp - sigma * sigma, 0.0));
  SamplerRow row = prediction_row(s, c, t);
  clip(row, c);
  row.x_z = static_cast<float>(sigma);
  if (c.prediction_type == PredictionType::kPreviousMean) {
    row.x_x0 = static_cast<float>(std::sqrt(abp) - direction * std::sqrt(ab / (1 - ab)));
    row.x_x = static_cast<float>(direction / std::sqrt(1 - ab));
    return row;
  }
  const Mix epsilon = epsilon_mix(c.prediction_type, s, t);
  row.x_x0 = static_cast<float>(std::sqrt(abp));
  row.x_x = static_cast<float>(direction * epsilon.x);
  row.x_out = static_cast<float>(direction * epsilon.out);
  return row;
}

// With h = lambda_next - lambda_t and r = (lambda_t - lambda_before) / h:
// x' = (sigma_next / sigma_t) x + alpha_next (1 - e^-h) (x0 + (x0 - previous) / (2 r)).
// The first row has no previous; the last ends at noise 0, where the formula is x' = x0.
SamplerRow dpmpp2m_row(const Schedule& s, const SchedulerConfig& c, std::optional<int> before,
                       int t, int next) {
  SamplerRow row = prediction_row(s, c, t);
  if (next < 0) {
    row.x_x0 = 1;
    return row;
  }
  const double ab = s.alpha_bar(t), abn = s.alpha_bar(next);
  const double lambda = half_log_snr(ab);
  const double h = half_log_snr(abn) - lambda;
  const double weight = std::sqrt(abn) * -std::expm1(-h);
  row.x_x = static_cast<float>(std::sqrt((1 - abn) / (1 - ab)));
  double history = 0;
  if (before) history = h / (2 * (lambda - half_log_snr(s.alpha_bar(*before))));
  row.x_x0 = static_cast<float>(weight * (1 + history));
  row.x_previous = static_cast<float>(-weight * history);
  return row;
}

std::vector<SamplerRow> sampler_rows(const Schedule& s, const SchedulerConfig& c,
                                     const SamplerOptions& o) {
  if (!(o.eta >= 0 && o.eta <= 1)) fail(Status::kUsage, "eta %g: use 0 to 1", o.eta);
  if (o.eta != 0 && o.kind != SamplerKind::kDdim)
    fail(Status::kUsage, "eta %g: sampler %s has no eta; use it with ddim only", o.eta,
         name_of(o.kind).c_str());
  const std::vector<int> list = given_timesteps(s, o);
  SchedulerConfig config = c;
  config.clip_sample = o.clip.value_or(c.clip_sample);
  std::vector<SamplerRow> rows;
  std::optional<int> before;
  for (size_t i = first_row(list, o); i < list.size(); ++i) {
    const int t = list[i], next = i + 1 < list.size() ? list[i + 1] : -1;
    switch (o.kind) {
      case SamplerKind::kDdpm:
        rows.push_back(ddpm_row(s, config, t, next));
        break;
      case SamplerKind::kDdim:
        rows.push_back(ddim_row(s, config, t, next, o.eta));
        break;
      case SamplerKind::kDpmpp2m:
        rows.push_back(dpmpp2m_row(s, config, before, t, next));
        break;
    }
    before = t;
  }
  return rows;
}

std::vector<SamplerRow> ddim_inverse_rows(const Schedule& s, const SchedulerConfig& c,
                                          const SamplerOptions& o) {
  if (o.kind != SamplerKind::kDdim || o.eta != 0 || o.strength != 1 || o.start)
    fail(Status::kUsage, "only a whole chain of ddim with eta 0 can be led back");
  const std::vector<int> list = given_timesteps(s, o);
  SchedulerConfig config = c;
  config.clip_sample = false;
  std::vector<SamplerRow> rows;
  for (size_t i = list.size(); i-- > 0;)
    rows.push_back(
        inverse_row(ddim_row(s, config, list[i], i + 1 < list.size() ? list[i + 1] : -1, 0)));
  return rows;
}

}  // namespace ddpm
