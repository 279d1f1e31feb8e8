// The bound of a data set, image by image: what `ddpm eval` adds up, and goes on adding.
#pragma once

#include <functional>
#include <vector>

#include "engine/comm.h"
#include "engine/dataset.h"
#include "model/likelihood.h"

namespace ddpm {

// Sums over the images that are whole, in their order; and the terms of the next one, as far as
// they are known. This is all there is to keep: whoever has it can go on.
struct BoundSums {
  int64_t images = 0;
  double bits = 0, squared_bits = 0, prior = 0;  // of whole images: bits is L_0 + ... + L_T
  std::vector<double> terms, mse;                // by t
  std::vector<double> image_terms, image_mse;    // of the next image, for t = 0, 1, ...

  explicit BoundSums(int timesteps = 0)
      : terms(static_cast<size_t>(timesteps)), mse(static_cast<size_t>(timesteps)) {}

  // Means over the images.
  double mean_prior() const { return prior / static_cast<double>(images); }
  std::vector<double> mean_terms() const;
  // Of the mean bits/dim, half the width of the interval that holds it with 95 %: of 1 image, NaN.
  double ci95() const;
  // 127.5 sqrt(mean mse), by t: what the receiver of a prefix of the code is off by, of 0..255.
  std::vector<double> distortion() const;
  // By t: bits/dim of what the receiver has at t (section 4.3, algorithm 4), the terms behind t.
  // The prior is left out, as in the paper's table 4.
  std::vector<double> rate() const;
};

// The network, on a batch of a fixed size: x_t (N,H,W,C), t, labels -> out (N,H,W,C), or
// with 2 C channels where the variance is learned.
using Denoiser = std::function<void(const std::vector<float>& x_t, const std::vector<int32_t>& t,
                                    const std::vector<int32_t>& labels, std::vector<float>& out)>;

struct BoundOptions {
  uint64_t seed = 0;  // of the noise and of the images' order
  int64_t num = 0;    // images; of more, `seed` chooses them
  int batch_size = 1;
  int threads = 1;                // of the arithmetic around the network
  Communicator* ranks = nullptr;  // that take a batch each in turn; null: this process alone
};

// Adds images until there are `num`, with the same sums on all ranks. Batch size, threads and ranks
// change no bit, where the network's output has the same bits in any batch. `progress` is told of
// the terms that are known; what it throws, on all ranks, ends the work between two batches, with
// `sums` fit to go on from. Throws AgreedError(kNonFinite) where the network's output is not
// finite.
using BoundProgress = std::function<void(const BoundSums&)>;
void add_bounds(const Bound&, const Dataset&, const BoundOptions&, const Denoiser&, BoundSums& sums,
                const BoundProgress& progress = {});

}  // namespace ddpm
