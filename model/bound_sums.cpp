#include "model/bound_sums.h"

#include <algorithm>
#include <cmath>
#include <thread>

#include "kernels/philox.h"

namespace ddpm {
namespace {

// f(0), ..., f(count - 1), each on one of `threads` threads.
template <typename F>
void for_each(int threads, int count, const F& f) {
  const int parts = std::clamp(threads, 1, std::max(count, 1));
  const auto part = [&](int p) {
    for (int i = count * p / parts; i < count * (p + 1) / parts; ++i) f(i);
  };
  std::vector<std::jthread> others;
  for (int p = 1; p < parts; ++p) others.emplace_back(part, p);
  part(0);
}

// A batch of the sequence (image 0, t = 0), (image 0, t = 1), ..., (image 1, t = 0), ...
class Batch {
 public:
  Batch(const Bound& bound, const Dataset& data, const BoundOptions& o)
      : bound_(bound),
        data_(data),
        options_(o),
        size_(data.image_bytes()),
        x_t_(static_cast<size_t>(o.batch_size) * size_),
        noise_(x_t_.size()),
        out_size_(bound.learned_variance() ? 2 * size_ : size_),
        out_(static_cast<size_t>(o.batch_size) * out_size_),
        t_(static_cast<size_t>(o.batch_size)),
        labels_(t_.size()),
        images_(t_.size()) {}

  // The terms of `count` entries from `begin` on; the slots behind them run along.
  void run(int64_t begin, int count, const Denoiser& network, BoundTerm* terms) {
    for (int i = 0; i < count; ++i) place(static_cast<size_t>(i), begin + i);
    for_each(options_.threads, count, [&](int i) {
      const auto at = static_cast<size_t>(i);
      evaluation_noise(options_.seed, static_cast<uint64_t>(images_[at]), t_[at], part(noise_, at));
      bound_.noise_image(pixels(images_[at]), part(noise_, at), t_[at], part(x_t_, at));
    });
    network(x_t_, t_, labels_, out_);
    for_each(options_.threads, count, [&](int i) {
      const auto at = static_cast<size_t>(i);
      terms[at] = bound_.term(pixels(images_[at]), part(x_t_, at),
                              std::span(out_).subspan(at * out_size_, out_size_), t_[at]);
    });
  }

  // Of the data set, the image that the entry is of.
  int64_t image(int64_t position) const {
    const auto count = static_cast<uint64_t>(data_.count);
    const auto number = static_cast<uint64_t>(position / bound_.timesteps());
    return static_cast<int64_t>(permute(number, count, options_.seed, 0));
  }
  std::span<const uint8_t> pixels(int64_t image) const { return {data_.image(image), size_}; }

 private:
  void place(size_t i, int64_t position) {
    images_[i] = image(position);
    t_[i] = static_cast<int32_t>(position % bound_.timesteps());
    if (!data_.labels.empty()) labels_[i] = data_.labels[static_cast<size_t>(images_[i])];
  }
  std::span<float> part(std::vector<float>& all, size_t i) const {
    return std::span(all).subspan(i * size_, size_);
  }

  const Bound& bound_;
  const Dataset& data_;
  const BoundOptions& options_;
  size_t size_;
  std::vector<float> x_t_, noise_;
  size_t out_size_;  // of an image
  std::vector<float> out_;
  std::vector<int32_t> t_, labels_;
  std::vector<int64_t> images_;
};

// The image whose terms are whole joins the sums.
void add_image(BoundSums& s, double prior) {
  double bits = prior;
  for (size_t t = 0; t < s.terms.size(); ++t) {
    s.terms[t] += s.image_terms[t];
    s.mse[t] += s.image_mse[t];
    bits += s.image_terms[t];
  }
  s.prior += prior;
  s.bits += bits;
  s.squared_bits += bits * bits;
  ++s.images;
  s.image_terms.clear();
  s.image_mse.clear();
}

}  // namespace

std::vector<double> BoundSums::mean_terms() const {
  std::vector<double> means = terms;
  for (double& v : means) v /= static_cast<double>(images);
  return means;
}

double BoundSums::ci95() const {
  const auto n = static_cast<double>(images);
  if (images < 2) return std::nan("");
  const double variance = std::max(squared_bits - bits * bits / n, 0.0) / (n - 1);
  return 1.96 * std::sqrt(variance / n);
}

std::vector<double> BoundSums::distortion() const {
  std::vector<double> d = mse;
  for (double& v : d) v = 127.5 * std::sqrt(v / static_cast<double>(images));
  return d;
}

std::vector<double> BoundSums::rate() const {
  const std::vector<double> means = mean_terms();
  std::vector<double> rate(means.size());
  for (size_t t = means.size(); t-- > 1;) rate[t - 1] = rate[t] + means[t];
  return rate;
}

void add_bounds(const Bound& bound, const Dataset& data, const BoundOptions& o,
                const Denoiser& network, BoundSums& sums, const BoundProgress& progress) {
  DDPM_CHECK(o.num > 0 && o.num <= data.count, "%lld of %lld images", static_cast<long long>(o.num),
             static_cast<long long>(data.count));
  const std::unique_ptr<Communicator> alone = make_solo_communicator();
  Communicator& ranks = o.ranks != nullptr ? *o.ranks : *alone;
  Batch batch(bound, data, o);
  const auto timesteps = static_cast<size_t>(bound.timesteps());
  const auto each = static_cast<size_t>(o.batch_size);
  std::vector<BoundTerm> terms(each * static_cast<size_t>(ranks.size()));  // of a round
  const int64_t end = o.num * bound.timesteps();
  int64_t at = sums.images * bound.timesteps() + static_cast<int64_t>(sums.image_terms.size());
  while (at < end) {
    const Round round = round_at(ranks, at, end, o.batch_size);
    if (round.count > 0)
      batch.run(round.first, round.count, network,
                terms.data() + each * static_cast<size_t>(ranks.rank()));
    ranks.share(terms.data(), each * sizeof(BoundTerm));
    for (const BoundTerm* term = terms.data(); at < round.next; ++term, ++at) {
      if (!std::isfinite(term->bits))
        throw AgreedError(
            Status::kNonFinite,
            format("the network's output at timestep %zu is not finite: the weights are damaged or "
                   "the training diverged",
                   sums.image_terms.size()));
      sums.image_terms.push_back(term->bits);
      sums.image_mse.push_back(term->mse);
      if (sums.image_terms.size() == timesteps)
        add_image(sums, bound.prior(batch.pixels(batch.image(at))));
    }
    if (progress) progress(sums);
  }
}

}  // namespace ddpm
