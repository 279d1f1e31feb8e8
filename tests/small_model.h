// A pipeline folder with a small network whose weights come from the integer hash (golden.h).
#pragma once

#include <fcntl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <csignal>
#include <filesystem>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "model/generator.h"
#include "model/pipeline.h"
#include "model/presets.h"
#include "tests/golden.h"
#include "tests/temp_folder.h"

namespace ddpm::test {

inline UNetConfig small_unet() {
  UNetConfig u = find_preset("tiny").unet;
  u.sample_height = u.sample_width = 8;
  u.block_out_channels = {8, 8, 8};
  u.norm_num_groups = 4;
  return u;
}

// `gain` scales what the network puts out.
inline void set_small_weights(ParamStore& store, float gain) {
  set_hash_weights(store, {Arena::kWeights, Arena::kEma});
  for (const CheckpointTensor& t : checkpoint_tensors(store.params())) {
    if (!t.key.starts_with("conv_out")) continue;
    std::vector<float> values = hash_weight(t);
    for (float& v : values) v *= gain;
    for (Arena a : {Arena::kWeights, Arena::kEma}) store.write(a, t, values);
  }
}

// `overflow`: a tensor whose values are finite, and overflow as soon as they are used.
inline void save_small_model(const std::string& folder, const UNetConfig& unet,
                             const SchedulerConfig& scheduler, float gain = 1,
                             const std::string& overflow = "") {
  const auto backend = make_cpu_backend({.threads = 1});
  const SamplingGraph s = build_sampling_graph(*backend, unet, scheduler.num_train_timesteps, 1, 1);
  ParamStore store(*backend, s.graph.params(),
                   {Arena::kWeights, Arena::kM, Arena::kV, Arena::kEma});
  set_small_weights(store, gain);
  for (const CheckpointTensor& t : checkpoint_tensors(store.params()))
    if (t.key == overflow)
      store.write(Arena::kEma, t, std::vector<float>(static_cast<size_t>(t.count()), 3e38f));
  save_checkpoint(folder, unet, scheduler, store, {.step = 1, .numerics = "none", .hashes = {}});
}

// Runs the program with these words and sends it SIGTERM as soon as its stderr, kept in `log`, has
// `ready`. Again, without the last word's file, where it had ended by then. Returns the exit code,
// or -1.
inline int stopped_program(const std::vector<std::string>& words, const std::string& log,
                           const std::string& ready) {
  for (int attempt = 0; attempt < 20; ++attempt) {
    put_bytes(log, "");
    std::filesystem::remove(words.back());
    const pid_t child = ::fork();
    if (child == 0) {
      std::vector<char*> argv{const_cast<char*>("ddpm")};
      for (const std::string& w : words) argv.push_back(const_cast<char*>(w.c_str()));
      argv.push_back(nullptr);
      ::dup2(::open(log.c_str(), O_WRONLY), 2);
      ::dup2(2, 1);
      ::execv(DDPM_PROGRAM, argv.data());
      ::_exit(127);
    }
    int status = 0;
    bool ended = false;
    while (!ended && get_bytes(log).find(ready) == std::string::npos) {
      ended = ::waitpid(child, &status, WNOHANG) == child;
      std::this_thread::sleep_for(std::chrono::milliseconds(2));
    }
    if (!ended) {
      ::kill(child, SIGTERM);
      ::waitpid(child, &status, 0);
    }
    if (!WIFEXITED(status)) return -1;
    if (WEXITSTATUS(status) != 0) return WEXITSTATUS(status);
  }
  return 0;
}

}  // namespace ddpm::test
