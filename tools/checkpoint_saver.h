// Checkpoints of a run, written while it goes on.
#pragma once

#include <atomic>
#include <exception>
#include <string>
#include <thread>

#include "engine/param_store.h"
#include "model/pipeline.h"
#include "model/run_config.h"

namespace ddpm::tools {

// A save takes a snapshot, for which the run stops, and writes it in a thread of its own, with the
// removal of older checkpoints that follows. One at a time.
class CheckpointSaver {
 public:
  // `out` is the run's folder. The store must outlive it.
  CheckpointSaver(const RunConfig& config, const std::string& out, const ParamStore& store)
      : config_(config), out_(out), snapshot_(store) {}
  ~CheckpointSaver();
  CheckpointSaver(const CheckpointSaver&) = delete;
  CheckpointSaver& operator=(const CheckpointSaver&) = delete;

  // What there is to say of the save that was under way, which it waits for; "" if there was none.
  // Throws that save's error.
  std::string finish();
  // The same; then the next one is under way.
  std::string start(const Manifest& manifest);
  // The same as finish() if the save has ended by itself, else "".
  std::string ended();

 private:
  void write(const Manifest& manifest);
  void remove_old() const;

  const RunConfig& config_;
  std::string out_;
  ParamSnapshot snapshot_;
  std::thread thread_;
  std::atomic<bool> done_{false};
  // Of the save under way; the thread's until it is done.
  std::exception_ptr error_;
  std::string folder_;
  double paused_ = 0, seconds_ = 0;
};

}  // namespace ddpm::tools
