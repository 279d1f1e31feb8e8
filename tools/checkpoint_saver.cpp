#include "tools/checkpoint_saver.h"

#include <chrono>
#include <map>
#include <utility>

#include "engine/file_io.h"

namespace ddpm::tools {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

}  // namespace

CheckpointSaver::~CheckpointSaver() {
  if (thread_.joinable()) thread_.join();
}

std::string CheckpointSaver::start(const Manifest& manifest) {
  const Clock::time_point start = Clock::now();
  std::string before = finish();
  snapshot_.take();
  folder_ = checkpoint_folder(out_, manifest.step);
  done_ = false;
  paused_ = seconds_since(start);
  thread_ = std::thread([this, manifest] { write(manifest); });
  return before;
}

void CheckpointSaver::write(const Manifest& manifest) {
  const Clock::time_point start = Clock::now();
  try {
    make_folders(out_ + "/checkpoints");
    save_checkpoint(folder_, config_.unet, config_.scheduler, snapshot_, manifest);
    remove_old();
  } catch (...) {
    error_ = std::current_exception();
  }
  seconds_ = seconds_since(start);
  done_ = true;
}

void CheckpointSaver::remove_old() const {
  const TrainConfig& train = config_.train;
  if (train.keep_last == 0) return;
  auto checkpoints = list_checkpoints(out_);
  const uint64_t every = static_cast<uint64_t>(train.keep_every);
  if (every > 0) std::erase_if(checkpoints, [&](const auto& c) { return c.first % every == 0; });
  while (checkpoints.size() > static_cast<size_t>(train.keep_last)) {
    remove_whole_folder(checkpoints.begin()->second);
    checkpoints.erase(checkpoints.begin());
  }
}

std::string CheckpointSaver::ended() { return done_ ? finish() : std::string(); }

std::string CheckpointSaver::finish() {
  if (!thread_.joinable()) return {};
  thread_.join();
  if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
  return format("saved    %s (the run stood still for %.3f s, writing took %.2f s)",
                folder_.c_str(), paused_, seconds_);
}

}  // namespace ddpm::tools
