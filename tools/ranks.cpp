#include "tools/ranks.h"

#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cstdio>
#include <cstdlib>
#include <vector>

namespace ddpm::tools {
namespace {

void say(const std::string& why) {
  if (!why.empty()) std::fprintf(stderr, "\nddpm: %s\n", why.c_str());
}
// Nothing waits for what other threads are in.
[[noreturn]] void leave() { ::_exit(static_cast<int>(Status::kPeer)); }

std::string host_name() {
  char name[256] = {};
  ::gethostname(name, sizeof name - 1);
  return name;
}

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
int threads_of_rank(const TrainConfig& train, Communicator& ranks) {
  if (train.reduction_shards > 0) return 1;
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

}  // namespace

Ranks::Ranks(const Launch& launch, const DeviceOptions& device, double timeout)
    : launch_(launch), device_(device), options_{timeout, say, leave} {
  if (launch.by == Launch::By::kMpi) {
    control_ = make_mpi_communicator(options_);
  } else if (launch.size == 1) {
    control_ = make_solo_communicator();
  } else {
    device_.device = device_of_rank(device.device, launch.local_rank);
    if (device_.device == "cpu")
      fail(Status::kUsage,
           "%d ranks without a GPU: ranks on CPUs are started by mpirun, see docs/multi_gpu.md",
           launch.size);
    backend_ = open_backend(device_);
    ::setenv("NCCL_COMM_ID", launch.meeting.c_str(), 1);
    nccl_ = make_nccl_communicator(*backend_, nullptr, launch.rank, launch.size, options_);
  }
}

Backend& Ranks::open_device(const TrainConfig& train) {
  if (nccl_) return *backend_;
  const int size = control_->size();
  if (device_.threads == 0 && (size > 1 || train.reduction_shards > 0))
    device_.threads = threads_of_rank(train, *control_);
  agree(*control_, [&] {
    if (size > 1) device_.device = device_of_rank(device_.device, launch_.local_rank);
    backend_ = open_backend(device_);
  });
  if (size > 1 && backend_->stream() != nullptr)
    nccl_ = make_nccl_communicator(*backend_, control_.get(), control_->rank(), size, options_);
  return *backend_;
}

void require_one_process() {
  for (const char* variable : {"OMPI_COMM_WORLD_SIZE", "WORLD_SIZE", "SLURM_STEP_NUM_TASKS"}) {
    const char* text = std::getenv(variable);
    if (text != nullptr && std::atoi(text) > 1)
      fail(Status::kUsage,
           "%s is %s: each of these processes would do all of the work; ranks are for ddpm train, "
           "started by mpirun",
           variable, text);
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

}  // namespace ddpm::tools
