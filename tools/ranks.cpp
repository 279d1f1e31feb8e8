#include "tools/ranks.h"

#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "tools/processes.h"

namespace ddpm::tools {
namespace {

void say(const std::string& why) {
  if (!why.empty()) std::fprintf(stderr, "\nddpm: %s\n", why.c_str());
}
// Nothing waits for what other threads are in.
[[noreturn]] void leave() { ::_exit(static_cast<int>(Status::kPeer)); }

// The processors that this process may use.
cpu_set_t processors() {
  cpu_set_t set;
  CPU_ZERO(&set);
  sched_getaffinity(0, sizeof set, &set);
  return set;
}

// Threads of a rank that was given no number. A machine's processors are shared by the ranks that
// may use the same ones; with --reduction-shards it is one, which every machine has: the result
// depends on it.
int threads_of_rank(int reduction_shards, Communicator& ranks) {
  if (reduction_shards > 0) return 1;
  const cpu_set_t set = processors();
  const std::string own =
      host_name() + std::string(reinterpret_cast<const char*>(&set), sizeof set);
  const std::vector<std::string> all = gather(ranks, own);
  const auto sharing = static_cast<int>(std::count(all.begin(), all.end(), own));
  return std::max(1, CPU_COUNT(&set) / sharing);
}

// A GPU for each rank of a machine.
std::string device_of_rank(const std::string& device, int local_rank) {
  const int count = cuda_device_count();
  if (device.starts_with("cuda:"))
    fail(Status::kUsage, "--device %s: each rank has a GPU of its own; use --device cuda",
         device.c_str());
  if (device == "cpu" || (device == "auto" && count == 0)) return "cpu";
  return count == 0 ? "cuda" : format("cuda:%d", local_rank % count);
}

constexpr double kGrace = 10;  // seconds for ranks to leave when one of them has failed

void require_gpus(int gpus, const DeviceOptions& device, const Launch& launch) {
  if (device.device != "auto" && device.device != "cuda")
    fail(Status::kUsage, "--gpus %d and --device %s exclude each other", gpus,
         device.device.c_str());
  if (launch.by == Launch::By::kMpi || (launch.size > 1 && launch.size != gpus))
    fail(Status::kUsage, "--gpus %d: a launcher has started the ranks already; leave --gpus out",
         gpus);
  const int count = cuda_device_count();
  if (count < gpus)
    fail(Status::kDevice, "--gpus %d: this machine has %d CUDA device%s that this program can use",
         gpus, count, count == 1 ? "" : "s");
}

// "2 by Open MPI 4.1.4: 0 to 1 on node7, CPU, 1 thread, AVX-512".
std::string ranks_text(Communicator& ranks, const std::string& device) {
  const std::vector<std::string> all = gather(ranks, "on " + host_name() + ", " + device);
  std::string text = format("%d by %s:", ranks.size(), ranks.description().c_str());
  for (size_t first = 0; first < all.size();) {
    size_t end = first + 1;
    while (end < all.size() && all[end] == all[first]) ++end;
    text += first == 0 ? " " : "; ";
    text += end - first > 1 ? format("%zu to %zu ", first, end - 1) : format("%zu ", first);
    text += all[first];
    first = end;
  }
  return text;
}

}  // namespace

std::optional<Status> start_ranks(const RankOptions& options, const DeviceOptions& device,
                                  const Launch& launch, const std::string& advice) {
  if (options.gpus == 1) return std::nullopt;
  require_gpus(options.gpus, device, launch);
  if (launch.size > 1) return std::nullopt;
  return run_processes(own_command(), options.gpus, kGrace, advice);
}

Ranks::Ranks(const Launch& launch, const DeviceOptions& device, const RankOptions& options,
             const std::string& advice)
    : launch_(launch), device_(device), options_{options.timeout, say, leave, advice} {
  if (launch.by == Launch::By::kMpi) {
    control_ = make_mpi_communicator(options_);
  } else if (launch.size == 1) {
    control_ = make_solo_communicator();
  } else {
    ::unsetenv("NCCL_COMM_ID");  // NCCL would listen there too, and meets where rank 0 tells
    control_ = make_tcp_communicator(launch.meeting, launch.rank, launch.size, options_);
  }
}

Backend& Ranks::open_device(int reduction_shards) {
  Communicator& all = communicator();
  const int size = all.size();
  if (device_.threads == 0 && (size > 1 || reduction_shards > 0))
    device_.threads = threads_of_rank(reduction_shards, all);
  agree(all, [&] {
    if (size > 1) device_.device = device_of_rank(device_.device, launch_.local_rank);
    backend_ = open_backend(device_);
  });
  return *backend_;
}

void Ranks::sum_on_device() {
  if (control_->size() == 1) return;
  if (backend_->stream() != nullptr)
    nccl_ = make_nccl_communicator(*backend_, *control_, options_);
  else if (launch_.by != Launch::By::kMpi)
    throw AgreedError(Status::kUsage,
                      format("%d ranks on CPUs sum their gradients by MPI: start them by mpirun, "
                             "see docs/multi_gpu.md",
                             control_->size()));
}

Status Ranks::run(const std::function<Status()>& work) {
  try {
    return work();
  } catch (const Error& e) {
    Communicator& all = communicator();
    if (all.size() == 1) throw;
    // Said before others know: as soon as one has left, mpirun ends the rest.
    const bool agreed = dynamic_cast<const AgreedError*>(&e) != nullptr;
    if (!agreed || all.rank() == 0) std::fprintf(stderr, "\nddpm: %s\n", e.what());
    if (!agreed) all.announce_failure(e.what());
    return e.status();
  } catch (const std::exception& e) {
    communicator().announce_failure(e.what());
    throw;
  }
}

void require_one_process() {
  for (const char* variable : {"OMPI_COMM_WORLD_SIZE", "WORLD_SIZE", "SLURM_STEP_NUM_TASKS"}) {
    const char* text = std::getenv(variable);
    if (text != nullptr && std::atoi(text) > 1)
      fail(Status::kUsage,
           "%s is %s: each of these processes would do all of the work; ranks are for ddpm train, "
           "sample and eval",
           variable, text);
  }
}

void require_equal_settings(Communicator& ranks, const std::string& settings) {
  const std::vector<std::string> all = gather(ranks, settings);
  for (size_t r = 1; r < all.size(); ++r)
    if (all[r] != all[0])
      throw AgreedError(Status::kUsage,
                        format("rank %zu was started with other settings than rank 0", r));
}

void plan_alike(Communicator& ranks, Backend& backend, const std::function<void()>& make) {
  const bool first = ranks.rank() == 0, at_once = backend.stream() == nullptr;
  agree(ranks, [&] {
    if (first || at_once) make();
  });
  if (at_once) return;
  const std::string plans = gather(ranks, first ? backend.plans() : std::string())[0];
  agree(ranks, [&] {
    if (first) return;
    backend.use_plans(plans);
    make();
  });
}

void print_ranks(Communicator& ranks, const Backend& backend, const char* more) {
  if (ranks.size() == 1) return;
  const std::string text = ranks_text(ranks, backend.description());
  const std::vector<std::string> numerics = gather(ranks, backend.numerics());
  if (ranks.rank() != 0) return;
  std::fprintf(stderr, "ranks    %s%s\n", text.c_str(), more);
  for (const std::string& n : numerics)
    if (n != numerics[0]) {
      std::fprintf(stderr,
                   "note: \"%s\" and \"%s\" among the ranks: not bit-exact with another "
                   "number of them\n",
                   numerics[0].c_str(), n.c_str());
      break;
    }
}

Parts parts_of(const TrainConfig& train, Communicator& ranks) {
  const int batch = train.batch_size, size = ranks.size(), shards = train.reduction_shards;
  Parts parts;
  parts.ranks = size > 1 ? &ranks : nullptr;
  if (shards > 0) {
    if (!std::has_single_bit(static_cast<unsigned>(shards)))
      fail(Status::kUsage, "--reduction-shards %d: must be a power of two", shards);
    if (train.accumulate > 1)
      fail(Status::kUsage,
           "--accumulate %d and --reduction-shards %d exclude each other: shards "
           "are run one after the other already",
           train.accumulate, shards);
    if (train.gradient_sums != "fp32")
      fail(Status::kUsage,
           "--gradient-sums %s and --reduction-shards %d exclude each other: sums in order are in "
           "fp32",
           train.gradient_sums.c_str(), shards);
    if (size > shards || shards % size != 0)
      fail(Status::kUsage,
           "--reduction-shards %d: cannot be shared out to %d ranks; use 1, 2, 4 "
           "... ranks, at most %d",
           shards, size, shards);
    if (batch % shards != 0)
      fail(Status::kUsage, "--batch-size %d: does not divide into %d --reduction-shards", batch,
           shards);
    parts.total = shards;
    parts.in_order = true;
  } else {
    if (batch % size != 0)
      fail(Status::kUsage, "--batch-size %d: does not divide into %d ranks", batch, size);
    if (batch % (size * train.accumulate) != 0)
      fail(Status::kUsage, "--batch-size %d: does not divide into %d ranks times --accumulate %d",
           batch, size, train.accumulate);
    parts.total = size * train.accumulate;
  }
  if (parts.split() && train.timesteps == Timesteps::kLossSecondMoment)
    fail(Status::kUsage,
         "train.timesteps loss_second_moment keeps the losses of a step as one batch, and %d ranks "
         "share it: use one process, or train.timesteps uniform",
         size);
  parts.own = parts.total / size;
  if (train.gradient_sums == "bf16") parts.sum_type = DType::kBF16;
  return parts;
}

}  // namespace ddpm::tools
