// The machine's parts, for the files that make it up.
#pragma once

#include <array>
#include <deque>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "tests/simt/fiber.h"
#include "tests/simt/machine.h"
#include "tests/simt/mbarrier.h"
#include "tests/simt/memory_shadow.h"
#include "tests/simt/warpgroup.h"

namespace ddpm::simt {

constexpr unsigned kWarp = 32;
constexpr size_t kMaxShared = 227 * 1024;

struct AsyncCopy {
  void* to;
  const void* from;
  bool valid;
};

enum class State { kReady, kAtWarp, kAtBarrier, kAtNamed, kAtPhase, kDone };

struct Thread {
  Fiber fiber;
  std::function<void()> body;
  State state = State::kDone;
  const char* what = "";  // of the warp operation it waits in
  void* mine = nullptr;
  Finish finish = nullptr;
  unsigned barrier = 0;  // it waits at: a named one, or the index of an mbarrier
  unsigned detail = 0;   // that one's threads, or the phase's parity
  uint16_t fence = 0;    // proxy fences it has passed
  std::vector<AsyncCopy> open;
  std::deque<std::vector<AsyncCopy>> groups;
};

struct alignas(1024) SharedBytes {
  std::array<char, kMaxShared> bytes;
};

class Machine {
 public:
  void run(const Launch& launch, const std::function<void()>& thread);

  Thread& current() { return *threads_[current_]; }
  [[noreturn]] void fail_thread(const std::string& what);
  void wait(State state) {
    Thread& t = current();
    t.state = state;
    t.fiber.leave();
  }

  void check_shared(const void* at, size_t bytes, Access access);
  void check_global(Extent& extent, const void* at, size_t bytes, Access access);
  void set_pending(const void* to, bool pending, size_t bytes = 16);
  void note_warp_barrier() { ++order_[warp()][warp()]; }

  unsigned warp() const { return current_ / kWarp; }
  void wait_at(State state, unsigned barrier, unsigned detail);
  void add_mbarrier(const void* at, unsigned count);
  Mbarrier& find_mbarrier(const void* at);
  void fence_mbarriers();
  void arrive(const void* at, int64_t bytes);
  void bulk_copy(const BulkCopy& copy);
  void check_operand(size_t offset, size_t bytes);
  void note_operand(size_t offset, size_t bytes);
  void note_error(const std::string& what);

  Options options;
  Launch launch;
  Dim3 block;
  unsigned current_ = 0;
  Warpgroups warpgroups;
  std::unique_ptr<SharedBytes> shared = std::make_unique<SharedBytes>();

 private:
  std::vector<int64_t> choose_blocks();
  void run_block(const std::function<void()>& thread);
  bool run_warp(unsigned warp);
  bool meet(unsigned warp);
  bool meet_in_operation(unsigned warp);
  bool pass_named(unsigned warp);
  bool pass_phase(unsigned warp);
  bool finish_bulk_copy();
  void release_barrier();
  void check_end();
  Toucher toucher();
  size_t offset_of(const void* at) const {
    return static_cast<size_t>(static_cast<const char*>(at) - shared->bytes.data());
  }
  void use_orders();
  [[noreturn]] void fail_stuck();
  void drop_block();
  std::string where(unsigned thread) const;
  uint64_t random();

  std::vector<std::unique_ptr<Thread>> threads_;
  std::vector<SharedShadow> shadow_ = std::vector<SharedShadow>(kMaxShared / 2);
  std::vector<Readers> readers_;     // as shadow_
  bool ordered_ = false;             // this block has barriers of some warps
  std::array<Order, kWarps> order_;  // of this block's warps
  std::vector<Mbarrier> mbarriers_;
  std::vector<BulkCopy> bulk_copies_;
  uint32_t epoch_ = 1, first_epoch_ = 1;
  int64_t block_number_ = 0;
  uint64_t launches_ = 0, random_ = 0;
  std::string error_;
};

Machine& machine();

}  // namespace ddpm::simt
