// The program in the background, on small training runs.
#pragma once

#include <catch2/catch.hpp>

#include <fcntl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <csignal>
#include <nlohmann/json.hpp>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "model/pipeline.h"
#include "model/run_config.h"
#include "tests/temp_folder.h"
#include "tools/run_trainer.h"

namespace ddpm::test {

// The program in the background, its output in `log`.
class Child {
 public:
  Child(const std::string& arguments, const std::string& log)
      : Child(DDPM_PROGRAM, arguments, log) {}
  Child(const std::string& program, const std::string& arguments, const std::string& log) {
    std::istringstream words(program + " " + arguments);
    std::vector<std::string> list;
    for (std::string word; words >> word;) list.push_back(word);
    std::vector<char*> argv;
    for (std::string& word : list) argv.push_back(word.data());
    argv.push_back(nullptr);
    pid_ = ::fork();
    if (pid_ != 0) return;
    const int fd = ::open(log.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0666);
    ::dup2(fd, 1);
    ::dup2(fd, 2);
    ::execv(argv[0], argv.data());
    ::_exit(127);
  }
  ~Child() {
    if (!ended()) send(SIGKILL), wait();
  }
  pid_t pid() const { return pid_; }
  void send(int signal) const {
    if (pid_ > 0) ::kill(pid_, signal);  // 0 is this process's own group
  }
  // Whether it has ended by itself.
  bool ended() {
    if (pid_ > 0 && ::waitpid(pid_, &status_, WNOHANG) == pid_) pid_ = 0;
    return pid_ == 0;
  }
  // Whether it has ended by then.
  bool wait_for(std::chrono::seconds limit) {
    const auto end = std::chrono::steady_clock::now() + limit;
    while (!ended() && std::chrono::steady_clock::now() < end)
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
    return ended();
  }
  // The exit code, or 128 + the signal that ended it: SIGKILL, where it does not end.
  int wait() {
    if (!wait_for(std::chrono::minutes(10))) {
      send(SIGKILL);
      ::waitpid(pid_, &status_, 0);
      pid_ = 0;
    }
    return WIFEXITED(status_) ? WEXITSTATUS(status_) : 128 + WTERMSIG(status_);
  }

 private:
  pid_t pid_ = 0;
  int status_ = 0;
};

inline const std::string kSmall =
    " --set unet.block_out_channels=[8,8,8] --set unet.norm_num_groups=4 --set unet.sample_size=8"
    " --set train.sample_every=0 --set train.log_every=1 --threads 1";

inline std::string train_command(const std::string& out, const std::string& more) {
  return "train --data shapes --out " + out + kSmall + " " + more;
}

inline int64_t logged_steps(const std::string& run) {
  const std::string text = get_bytes(run + "/metrics.jsonl");
  return std::count(text.begin(), text.end(), '\n');
}

// Until the run has logged `count` steps.
inline void wait_for_steps(Child& child, const std::string& run, int64_t count) {
  while (logged_steps(run) < count && !child.ended())
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
  REQUIRE_FALSE(child.ended());
}

// Everything a resumed run starts from.
inline std::vector<std::string> state_of(const std::string& run, uint64_t step) {
  const std::string folder = checkpoint_folder(run, step);
  return {get_bytes(folder + "/training_state.safetensors"),
          get_bytes(folder + "/unet/diffusion_pytorch_model.safetensors"),
          get_bytes(folder + "/manifest.json")};
}

// A checkpoint of `run` whose weights are finite, and overflow as soon as they are used.
inline void plant_overflow(const std::string& run, uint64_t step) {
  const std::string folder = checkpoint_folder(run, step);
  const Pipeline p = open_pipeline(folder);
  const auto backend = make_cpu_backend({});
  const RunConfig config =
      run_config_from_json(nlohmann::json::parse(get_bytes(run + "/config.json")), "config.json");
  const auto trainer = tools::make_trainer(*backend, config, tools::load_run_data(config));
  const Manifest m = load_checkpoint(folder, trainer->store());
  for (const CheckpointTensor& t : checkpoint_tensors(trainer->store().params()))
    if (t.key == "mid_block.resnets.1.conv2.weight")
      trainer->store().write(Arena::kWeights, t,
                             std::vector<float>(static_cast<size_t>(t.count()), 3e38f));
  save_checkpoint(folder, p.unet, p.scheduler, trainer->store(), m);
}

}  // namespace ddpm::test
