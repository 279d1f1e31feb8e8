// The subcommands of `ddpm`: what the command line fills in, and what runs it. Each is implemented
// in the file of its name. All throw Error; its status is the exit code.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "tools/chain.h"
#include "tools/common.h"
#include "tools/launch.h"
#include "tools/pack.h"

namespace ddpm::tools {

struct TrainArgs {
  std::string data, preset, config, out;
  std::string resume = "auto";
  // Assignments "train.steps=100", in the order given: flags and --set alike.
  std::vector<std::string> settings;
  RankOptions ranks;
  DeviceOptions device;
};
// Returns kStopped where a signal ended it, after saving.
Status run_train(const TrainArgs&);

struct ReplayArgs {
  std::string run;  // a run folder, or the bundle of a failed step
  DeviceOptions device;
};
void run_replay(const ReplayArgs&);

struct SampleArgs {
  std::string model, out;
  std::string init, from, invert;  // where chains start: latents, images; images to lead back
  std::string resume, suspend;     // files
  ChainArgs chain;                 // usually of ddpm, or of ddim to invert
  int64_t num = 64;
  uint64_t first = 0, seed = 0;
  int batch_size = 0;  // of a rank; 0: as many as each has to draw, at most 64
  double strength = 0.8;
  std::optional<int64_t> suspend_at;  // steps of this call
  RankOptions ranks;
  DeviceOptions device;
};
// Returns kStopped where a signal ended it, after writing args.suspend.
Status run_sample(const SampleArgs&);

struct ProgressiveArgs {
  std::string model, out;
  std::vector<int> shared;  // timesteps; empty: the prediction of x0 along the chain
  ChainArgs chain;          // usually of ddpm
  int num = 8, columns = 10;
  uint64_t first = 0, seed = 0;
  DeviceOptions device;
};
void run_progressive(const ProgressiveArgs&);

struct InterpolateArgs {
  std::string model, out, from;
  std::string latents = "diffused";  // or "ddim"
  std::string mix;                   // "linear", "spherical"; "": the latents' own
  std::optional<int> timestep;       // half of them
  ChainArgs chain;                   // usually of ddpm, or of ddim with its latents
  int num = 4, columns = 11;
  uint64_t first = 0, seed = 0;
  DeviceOptions device;
};
void run_interpolate(const InterpolateArgs&);

struct EvalArgs {
  std::string model, data, out;
  std::string metric = "nll";  // or "rd", "fid", "is"
  std::string split;           // "train", "test"; "": test where there is one, of fid train
  int64_t num = 0;             // 0: all; of a model's images 50,000
  uint64_t seed = 0;
  int batch_size = 0;  // of a rank; 0: 64, or fewer of large images
  // Of fid and is:
  std::string images;                 // in the model's place, as --data
  std::string inception, statistics;  // files
  ChainArgs chain;                    // usually of ddpm
  RankOptions ranks;
  DeviceOptions device;
};
// Returns kStopped where a signal ended it, after writing what it has beside args.out.
Status run_eval(const EvalArgs&);

struct PaperArgs {
  std::string model, data, out = "paper.html";
  std::string split, inception;  // as of eval
  ChainArgs chain;               // of the pictures; usually of ddpm
  int64_t num = 64;              // images that the bound is evaluated on
  int64_t fid_num = 50000;       // images to draw for the scores, with inception
  uint64_t seed = 0;
  int batch_size = 0;  // 0: as of eval
  DeviceOptions device;
};
// Returns kStopped where a signal ended it, after writing what it has beside args.out.
Status run_paper(const PaperArgs&);

struct ProbeArgs {
  std::string what;  // "forward" or "gradient"
  std::string model, input, out;
  DeviceOptions device;
};
void run_probe(const ProbeArgs&);

void run_pack(const PackOptions&);

struct InfoArgs {
  std::string model, preset;
  int batch_size = 0;                               // 0: the preset's, or 1
  int ranks = 0;                                    // up to so many; 0: not asked for
  double bandwidth = 0, latency = 10, step_ms = 0;  // GB/s of a rank, us of a message, of one rank
};
void run_info(const InfoArgs&);

struct BenchArgs {
  std::string work;  // "train", "sample", "ops" or "ceilings"
  std::string model, preset = "cifar10", json;
  int batch_size = 8;
  int steps = 10;
  DeviceOptions device;
};
void run_bench(const BenchArgs&);
void run_bench_ceilings(const BenchArgs&);

// Returns kDevice if no backend works.
Status run_doctor();

// "ddpm 0.1.0 (commit) oneDNN 2.6.3 ..."
std::string version_text();

}  // namespace ddpm::tools
