#include "tools/launch.h"

#include <charconv>
#include <cstdlib>
#include <cstring>

#include "engine/comm.h"

namespace ddpm::tools {
namespace {

std::string variable(const char* name) {
  const char* text = std::getenv(name);
  return text == nullptr ? std::string() : text;
}

int number(const char* name, int least, int most) {
  const std::string text = variable(name);
  int value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc{} || end != text.data() + text.size() || value < least || value > most)
    fail(Status::kUsage, "%s is '%s': a number from %d to %d is expected of what started this rank",
         name, text.c_str(), least, most);
  return value;
}

constexpr int kMostRanks = 1 << 20;

// Of "node[03-05,07],login1" the first: "node03".
std::string first_host(const std::string& list) {
  const size_t bracket = list.find('['), comma = list.find(',');
  if (bracket == std::string::npos || bracket > comma) return list.substr(0, comma);
  const size_t end = list.find_first_of("-,]", bracket);
  return list.substr(0, bracket) + list.substr(bracket + 1, end - bracket - 1);
}

// The launcher itself listens at MASTER_PORT.
std::string torchrun_meeting() {
  const std::string host = variable("MASTER_ADDR");
  if (host.empty())
    fail(Status::kUsage,
         "WORLD_SIZE is set and MASTER_ADDR is not: ranks cannot meet; start them "
         "by torchrun, srun, mpirun or --gpus N");
  return host + ":" + std::to_string(number("MASTER_PORT", 1, 65534) + 1);
}

// A port for each job, so that two on a machine do not meet.
std::string slurm_meeting() {
  const int job = number("SLURM_JOB_ID", 0, 1 << 30), step = number("SLURM_STEP_ID", 0, 1 << 30);
  return first_host(variable("SLURM_STEP_NODELIST")) + ":" +
         std::to_string(20000 + (job % 1000) * 10 + step % 10);
}

Launch launch_of(Launch::By by, const char* size, const char* rank, const char* local_rank) {
  Launch l;
  l.by = by;
  l.size = number(size, 1, kMostRanks);
  l.rank = number(rank, 0, l.size - 1);
  l.local_rank = number(local_rank, 0, l.size - 1);
  return l;
}

}  // namespace

Launch find_launch() {
  Launch l;
  if (started_by_mpi()) {
    if (variable("OMPI_COMM_WORLD_SIZE") == "1") return {};
    l.by = Launch::By::kMpi;
    for (const char* name : {"OMPI_COMM_WORLD_LOCAL_RANK", "SLURM_LOCALID"})
      if (!variable(name).empty()) {
        l.local_rank = number(name, 0, kMostRanks);
        break;
      }
    return l;
  }
  if (!variable("WORLD_SIZE").empty())
    l = launch_of(Launch::By::kTorchrun, "WORLD_SIZE", "RANK", "LOCAL_RANK");
  else if (!variable("SLURM_STEP_NUM_TASKS").empty() && !variable("SLURM_PROCID").empty())
    l = launch_of(Launch::By::kSlurm, "SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID");
  if (l.size == 1) return {};
  l.meeting = variable("NCCL_COMM_ID");
  if (l.meeting.empty())
    l.meeting = l.by == Launch::By::kTorchrun ? torchrun_meeting() : slurm_meeting();
  return l;
}

}  // namespace ddpm::tools
