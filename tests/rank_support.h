// What the tests of ranks share: mpirun, signals to its ranks, and what ranks must be able to say
// to each other.
#pragma once

#include <catch2/catch.hpp>

#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <csignal>
#include <cstdlib>
#include <filesystem>
#include <map>
#include <numeric>
#include <string>
#include <thread>
#include <vector>

#include "engine/comm.h"
#include "kernels/bf16.h"
#include "tests/child.h"
#include "tests/support.h"
#include "tests/temp_folder.h"

namespace ddpm::test {

// Before any child: what a root user, few processors and a container ask of Open MPI.
struct OpenMpiSettings {
  OpenMpiSettings() {
    for (const auto& [name, value] :
         std::map<std::string, std::string>{{"OMPI_ALLOW_RUN_AS_ROOT", "1"},
                                            {"OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1"},
                                            {"OMPI_MCA_rmaps_base_oversubscribe", "1"},
                                            {"OMPI_MCA_hwloc_base_binding_policy", "none"},
                                            {"OMPI_MCA_btl", "self,vader"},
                                            {"OMPI_MCA_btl_vader_single_copy_mechanism", "none"},
                                            {"OMP_WAIT_POLICY", "passive"}})
      ::setenv(name.c_str(), value.c_str(), 0);
    // Open MPI keeps what it has allocated until the process ends.
    const char* asan = std::getenv("ASAN_OPTIONS");
    options_ = std::string(asan != nullptr ? asan : "") + ":detect_leaks=0";
    ::setenv("ASAN_OPTIONS", options_.c_str(), 1);
  }

 private:
  std::string options_;
};

// mpirun with `ranks` of a program.
inline Child mpirun(int ranks, const std::string& program, const std::string& arguments,
                    const std::string& log) {
  const OpenMpiSettings settings;
  return Child(DDPM_MPIRUN, "-n " + std::to_string(ranks) + " " + program + " " + arguments, log);
}

// The process of a rank of the run in `out`, once it is there; 0 if the run ends before.
inline pid_t process_of(Child& child, const std::string& out, int rank) {
  const std::string own = "OMPI_COMM_WORLD_RANK=" + std::to_string(rank);
  while (!child.ended()) {
    for (const auto& entry : std::filesystem::directory_iterator("/proc")) {
      std::error_code none;
      if (std::filesystem::read_symlink(entry.path() / "exe", none) != DDPM_PROGRAM) continue;
      const std::string command = get_bytes(entry.path() / "cmdline");
      const std::string environment = '\0' + get_bytes(entry.path() / "environ");
      if (command.find(out + '\0') != std::string::npos &&
          environment.find('\0' + own + '\0') != std::string::npos)
        return std::stoi(entry.path().filename());
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
  }
  return 0;
}

inline void signal_rank(Child& child, const std::string& out, int rank, int signal) {
  const pid_t process = process_of(child, out, rank);
  REQUIRE(process > 0);
  ::kill(process, signal);
}

inline bool any_process_of(const std::string& out) {
  for (const auto& entry : std::filesystem::directory_iterator("/proc")) {
    std::error_code none;
    if (std::filesystem::read_symlink(entry.path() / "exe", none) == DDPM_PROGRAM &&
        get_bytes(entry.path() / "cmdline").find(out + '\0') != std::string::npos)
      return true;
  }
  return false;
}

// mpirun kills what is left and does not wait for the kernel to have ended it.
inline bool all_gone(const std::string& out) {
  for (int i = 0; i < 200 && any_process_of(out); ++i)
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  return !any_process_of(out);
}

// mpirun that leaves the others alone when a rank ends; each rank's exit code is written down, and
// the output in tmp / "log".
inline Child watched(int ranks, const TempFolder& tmp, const std::string& command) {
  std::filesystem::remove(tmp / "log");
  put_bytes(tmp / "rank.sh", "\"$@\"\necho $? > " + tmp.path() + "/code.$OMPI_COMM_WORLD_RANK\n");
  return mpirun(ranks, "--enable-recovery /bin/sh " + (tmp / "rank.sh"), DDPM_PROGRAM " " + command,
                tmp / "log");
}
inline int code_of(const TempFolder& tmp, int rank) {
  const std::string text = get_bytes(tmp / ("code." + std::to_string(rank)));
  return text.empty() ? -1 : std::stoi(text);
}

// Variables of a launcher, for as long as this lives.
using Words = std::map<std::string, std::string>;

class Variables {
 public:
  explicit Variables(Words all) : all_(std::move(all)) {
    for (const auto& [name, value] : all_) ::setenv(name.c_str(), value.c_str(), 1);
  }
  ~Variables() {
    for (const auto& [name, value] : all_) ::unsetenv(name.c_str());
  }
  Variables(const Variables&) = delete;
  Variables& operator=(const Variables&) = delete;

 private:
  Words all_;
};

// What torchrun tells a rank of this machine.
inline Words torchrun_words(int rank, int size, int port) {
  const std::string number = std::to_string(rank);
  return {{"WORLD_SIZE", std::to_string(size)},
          {"RANK", number},
          {"LOCAL_RANK", number},
          {"MASTER_ADDR", "127.0.0.1"},
          {"MASTER_PORT", std::to_string(port - 1)}};
}

// This program, whose test case is a rank of its own.
inline std::string own_program() {
  return std::filesystem::read_symlink("/proc/self/exe").string();
}
inline sockaddr_in local(int port) {
  return {.sin_family = AF_INET,
          .sin_port = htons(static_cast<uint16_t>(port)),
          .sin_addr = {htonl(INADDR_LOOPBACK)},
          .sin_zero = {}};
}
// A port of this machine where nobody listens, below those that connections are given.
inline int free_port() {
  static int count = 0;
  const int first = 10000 + ::getpid() % 1000 * 20;
  for (;;) {
    const int port = first + count++ % 20;
    const int fd = ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    const sockaddr_in at = local(port);
    const bool free = ::bind(fd, reinterpret_cast<const sockaddr*>(&at), sizeof at) == 0;
    ::close(fd);
    if (free) return port;
  }
}
// A rank that leaves in words and with the code of the program.
inline CommOptions leaving(double timeout) {
  return {.timeout = timeout,
          .say = [](const std::string& why) { std::fprintf(stderr, "%s\n", why.c_str()); },
          .leave = [] { ::_exit(8); },
          .advice = "do this"};
}

inline void check_messages(Communicator& ranks) {
  const int size = ranks.size(), rank = ranks.rank();
  std::vector<int> data(1000003, rank == 0 ? 7 : 0);
  ranks.broadcast(data.data(), data.size() * sizeof(int));
  CHECK(std::count(data.begin(), data.end(), 7) == 1000003);

  const std::vector<std::string> all = gather(ranks, std::string(static_cast<size_t>(rank), 'x'));
  REQUIRE(all.size() == static_cast<size_t>(size));
  for (int r = 0; r < size; ++r)
    CHECK(all[static_cast<size_t>(r)].size() == static_cast<size_t>(r));
  CHECK_FALSE(any(ranks, false));
  CHECK(any(ranks, rank == size - 1));

  // Of other lengths on each, none on the last; the second time in several pieces.
  for (const size_t unit : {size_t{1}, size_t{5} << 20}) {
    const auto values_of = [&](int r) {
      std::vector<float> v(r == size - 1 && size > 1 ? 0 : unit + static_cast<size_t>(r));
      std::iota(v.begin(), v.end(), static_cast<float>(1000 * r));
      return v;
    };
    std::vector<float> expected;
    for (int r = 0; rank == 0 && r < size; ++r) {
      const std::vector<float> v = values_of(r);
      expected.insert(expected.end(), v.begin(), v.end());
    }
    CHECK((collect(ranks, values_of(rank)) == expected));
  }
}

// As a step in order sums.
inline void sum_in_order(Communicator& ranks, std::vector<float>& data) {
  const auto size = static_cast<size_t>(ranks.size()), count = data.size();
  const auto slice = static_cast<size_t>(ranks.slice_of(static_cast<int64_t>(count)));
  std::vector<std::vector<float>> parts(size, std::vector<float>(slice));
  std::vector<float*> to;
  for (auto& part : parts) to.push_back(part.data());
  ranks.exchange_slices(data.data(), static_cast<int64_t>(count), to.data());
  for (size_t step = 1; step < size; step *= 2)
    for (size_t r = 0; r + step < size; r += 2 * step)
      for (size_t i = 0; i < slice; ++i) parts[r][i] += parts[r + step][i];
  ranks.gather_slices(to[0], data.data(), static_cast<int64_t>(count));
}

// Sums of values whose rounding tells in which order they were added.
inline void check_sums(Communicator& ranks) {
  const int size = ranks.size();
  for (int count : {1, 2, 3, 5, 1000, 100003}) {
    CAPTURE(count, size);
    std::vector<std::vector<float>> parts;
    for (int r = 0; r < size; ++r)
      parts.push_back(random_values(count, static_cast<uint64_t>(r + 1), 1.0f + 1000.0f * r));
    const std::vector<float>& own = parts[static_cast<size_t>(ranks.rank())];
    std::vector<float> tree = own, two = own;
    sum_in_order(ranks, tree);
    ranks.start_sum(two.data(), DType::kF32, count / 2);
    ranks.start_sum(two.data() + count / 2, DType::kF32, count - count / 2);
    ranks.finish_sums();
    std::vector<double> exact(parts[0].size());
    for (const auto& part : parts)
      for (size_t i = 0; i < exact.size(); ++i) exact[i] += part[i];
    for (int step = 1; step < size; step *= 2)
      for (int r = 0; r + step < size; r += 2 * step)
        for (size_t i = 0; i < exact.size(); ++i)
          parts[static_cast<size_t>(r)][i] += parts[static_cast<size_t>(r + step)][i];
    CHECK(tree == parts[0]);
    CHECK(relative_error(two, exact) < 1e-6);
    const std::string bytes(reinterpret_cast<const char*>(two.data()), two.size() * sizeof(float));
    for (const std::string& other : gather(ranks, bytes)) CHECK(other == bytes);
  }
  if (const auto seconds = ranks.seconds(); seconds && size > 1) CHECK(seconds->summing > 0);
}

// Each addition of bf16 is off by half a unit in its last place, and of two ranks by no more.
inline void check_rounded_sums(Communicator& ranks) {
  const int count = 100003, size = ranks.size();
  std::vector<std::vector<float>> parts;
  for (int r = 0; r < size; ++r)
    parts.push_back(random_values(count, static_cast<uint64_t>(r + 1), 1.0f + 10.0f * r));
  std::vector<bf16> sum;
  for (float v : parts[static_cast<size_t>(ranks.rank())]) sum.push_back(to_bf16(v));
  ranks.start_sum(sum.data(), DType::kBF16, count / 2);
  ranks.start_sum(sum.data() + count / 2, DType::kBF16, count - count / 2);
  ranks.finish_sums();
  size_t wrong = 0;
  for (size_t i = 0; i < sum.size(); ++i) {
    double exact = 0, most = 0;
    for (const auto& part : parts) {
      exact += to_float(to_bf16(part[i]));
      most += std::abs(to_float(to_bf16(part[i])));
    }
    const double found = to_float(sum[i]);
    if (size <= 2)
      wrong += found != to_float(to_bf16(static_cast<float>(exact)));
    else
      wrong += std::abs(found - exact) > most * (size - 1) * 0x1.02p-8;
  }
  CHECK(wrong == 0);
  const std::string bytes(reinterpret_cast<const char*>(sum.data()), sum.size() * sizeof(bf16));
  for (const std::string& other : gather(ranks, bytes)) CHECK((other == bytes));
}

inline void check_agreement(Communicator& ranks) {
  CHECK_NOTHROW(agree(ranks, [] {}));
  const int last = ranks.size() - 1;
  try {
    agree(ranks, [&] {
      if (ranks.rank() == last) fail(Status::kFile, "no such file");
    });
    FAIL("nobody was told");
  } catch (const Error& e) {
    CHECK(e.status() == Status::kFile);
    CHECK(std::string(e.what()) ==
          (last == 0 ? "no such file" : format("rank %d: no such file", last)));
  }
}

}  // namespace ddpm::test
