#include "tests/simt/machine.h"

#include <algorithm>
#include <cstring>
#include <numeric>

#include "tests/simt/machine_parts.h"

namespace ddpm::simt {

constinit thread_local Place place;

namespace {

std::map<const char*, std::unique_ptr<Extent>>& extents() {
  static std::map<const char*, std::unique_ptr<Extent>> all;
  return all;
}

std::map<std::string, bool, std::less<>>& kernel_table() {
  static std::map<std::string, bool, std::less<>> all;
  return all;
}

}  // namespace

// Kernels are free functions: the machine cannot be handed to them. A plain pointer, because it is
// followed at every access.
Machine& machine() {
  static constinit thread_local Machine* m = nullptr;
  if (m == nullptr) {
    static thread_local Machine owned;
    m = &owned;
  }
  return *m;
}

std::string Machine::where(unsigned thread) const {
  return format("%.*s block (%u,%u,%u) thread %u", static_cast<int>(launch.kernel.size()),
                launch.kernel.data(), block.x, block.y, block.z, thread);
}

void Machine::fail_thread(const std::string& what) {
  throw Error(Status::kBug, where(current_) + ": " + what);
}

uint64_t Machine::random() {  // splitmix64
  uint64_t z = random_ += 0x9E3779B97F4A7C15u;
  z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
  z = (z ^ z >> 27) * 0x94D049BB133111EBu;
  return z ^ z >> 31;
}

std::vector<int64_t> Machine::choose_blocks() {
  const int64_t count = int64_t{launch.grid.x} * launch.grid.y * launch.grid.z;
  std::vector<int64_t> blocks;
  if (options.max_blocks <= 0 || count <= options.max_blocks) {
    blocks.resize(static_cast<size_t>(count));
    std::iota(blocks.begin(), blocks.end(), int64_t{0});
  } else {
    blocks = {0, count - 1};
    while (static_cast<int64_t>(blocks.size()) < options.max_blocks) {
      const auto b = static_cast<int64_t>(random() % static_cast<uint64_t>(count));
      if (std::find(blocks.begin(), blocks.end(), b) == blocks.end()) blocks.push_back(b);
    }
  }
  for (size_t i = blocks.size(); i > 1; --i) std::swap(blocks[i - 1], blocks[random() % i]);
  return blocks;
}

void Machine::run(const Launch& l, const std::function<void()>& thread) {
  launch = l;
  random_ = options.seed * 0x2545F4914F6CDD1Du + launches_;
  const std::string name(l.kernel);
  if (l.block == 0 || l.block % kWarp != 0 || l.block > kWarps * kWarp)
    fail(Status::kBug, "%s: a block of %u threads", name.c_str(), l.block);
  if (l.grid.x == 0 || l.grid.y == 0 || l.grid.z == 0 || l.grid.x > 0x7FFFFFFFu ||
      l.grid.y > 65535 || l.grid.z > 65535)
    fail(Status::kBug, "%s: a grid of %u x %u x %u", name.c_str(), l.grid.x, l.grid.y, l.grid.z);
  if (l.shared > simt::options().max_shared)
    fail(Status::kBug, "%s: %zu bytes of shared memory", name.c_str(), l.shared);
  if (++launches_ % 0xFFFF == 0)  // launches are told apart by 16 bits
    for (auto& [begin, extent] : extents()) extent->shadow.clear();
  while (threads_.size() < l.block) threads_.push_back(std::make_unique<Thread>());
  for (int64_t b : choose_blocks()) {
    block_number_ = b;
    block.x = static_cast<unsigned>(b % launch.grid.x);
    block.y = static_cast<unsigned>(b / launch.grid.x % launch.grid.y);
    block.z = static_cast<unsigned>(b / launch.grid.x / launch.grid.y);
    run_block(thread);
  }
}

void Machine::run_block(const std::function<void()>& thread) {
  first_epoch_ = ++epoch_;
  ordered_ = false;
  for (Order& order : order_) order.fill(0);
  mbarriers_.clear();
  bulk_copies_.clear();
  warpgroups.reset(launch.block);
  error_.clear();
  place = {{}, block, {launch.block, 1, 1}, launch.grid};
  std::memset(shared->bytes.data(), 0xFF, launch.shared);
  for (unsigned i = 0; i < launch.block; ++i) {
    Thread& t = *threads_[i];
    t.state = State::kReady;
    t.fence = 0;
    t.open.clear();
    t.groups.clear();
    t.body = [this, &t, &thread] {
      try {
        thread();
        if (!t.open.empty() || !t.groups.empty())
          fail_thread("ends while its asynchronous copies are under way");
      } catch (const std::exception& e) {
        if (error_.empty()) error_ = e.what();
      }
      t.state = State::kDone;
    };
    t.fiber.start(&t.body);
  }
  std::vector<unsigned> order(launch.block / kWarp);
  std::iota(order.begin(), order.end(), 0u);
  for (bool moved = true; moved;) {
    moved = false;
    for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[random() % i]);
    for (unsigned warp : order) {
      while (error_.empty() && run_warp(warp)) moved = true;
      if (!error_.empty()) {
        drop_block();
        throw Error(Status::kBug, error_);
      }
    }
    if (!moved) moved = finish_bulk_copy();
    if (!moved) release_barrier();
    for (unsigned i = 0; i < launch.block && !moved; ++i)
      moved = threads_[i]->state == State::kReady;
  }
  check_end();
}

// Lets the lanes that can go on do so; false if none could.
bool Machine::run_warp(unsigned warp) {
  bool moved = false;
  for (unsigned i = warp * kWarp; i < (warp + 1) * kWarp; ++i) {
    if (threads_[i]->state != State::kReady) continue;
    current_ = i;
    place.thread = {i, 0, 0};
    threads_[i]->fiber.resume();
    moved = true;
    if (!error_.empty()) return true;
  }
  return meet(warp) || moved;
}

// If all lanes wait for the same and it has come, lets them go on.
bool Machine::meet(unsigned warp) {
  const State state = threads_[warp * kWarp]->state;
  for (unsigned i = 0; i < kWarp; ++i)
    if (threads_[warp * kWarp + i]->state != state) return false;
  if (state == State::kAtWarp) return meet_in_operation(warp);
  if (state == State::kAtNamed) return pass_named(warp);
  return state == State::kAtPhase && pass_phase(warp);
}

bool Machine::meet_in_operation(unsigned warp) {
  std::array<void*, kWarp> lanes;
  for (unsigned i = 0; i < kWarp; ++i) lanes[i] = threads_[warp * kWarp + i]->mine;
  const Thread& first = *threads_[warp * kWarp];
  current_ = warp * kWarp;
  for (unsigned i = 0; i < kWarp; ++i) {
    const Thread& t = *threads_[warp * kWarp + i];
    if (t.finish == first.finish && std::strcmp(t.what, first.what) == 0) continue;
    error_ = where(warp * kWarp + i) + ": is in " + t.what + " while lane 0 is in " + first.what;
    return true;
  }
  try {
    first.finish(lanes.data());
  } catch (const std::exception& e) {
    error_ = e.what();
  }
  for (unsigned i = 0; i < kWarp; ++i) threads_[warp * kWarp + i]->state = State::kReady;
  return true;
}

// Nobody can go on: all are done, or all stand at the barrier, or the kernel hangs.
void Machine::release_barrier() {
  unsigned done = 0, waiting = 0;
  for (unsigned i = 0; i < launch.block; ++i) {
    done += threads_[i]->state == State::kDone;
    waiting += threads_[i]->state == State::kAtBarrier;
  }
  if (done == launch.block) return;
  if (waiting != launch.block) fail_stuck();
  ++epoch_;
  for (unsigned i = 0; i < launch.block; ++i) threads_[i]->state = State::kReady;
}

void Machine::fail_stuck() {
  std::string text;
  const auto describe = [&](State state, const char* words) {
    for (unsigned i = 0; i < launch.block; ++i) {
      if (threads_[i]->state != state) continue;
      text +=
          format(", thread %u %s%s", i, words, state == State::kAtWarp ? threads_[i]->what : "");
      return;
    }
  };
  describe(State::kAtBarrier, "waits at a barrier");
  describe(State::kAtWarp, "waits for its warp in ");
  describe(State::kAtNamed, "waits at a named barrier");
  describe(State::kAtPhase, "waits at an mbarrier");
  for (const Mbarrier& b : mbarriers_) {
    const bool waited_for = std::any_of(
        threads_.begin(), threads_.begin() + launch.block,
        [&](const auto& t) { return t->state == State::kAtPhase && t->barrier == b.index; });
    if (waited_for)
      text += format(" (byte %zu, phase %u, %u of %u arrivals and %lld bytes missing)", b.offset,
                     b.phase, b.left, b.count, static_cast<long long>(b.bytes));
  }
  describe(State::kDone, "has left");
  drop_block();
  const std::string at = where(0);
  fail(Status::kBug, "%s: not all threads meet%s", at.substr(0, at.rfind(" thread")).c_str(),
       text.c_str());
}

void Machine::drop_block() {
  for (auto& t : threads_) t->state = State::kDone;
  std::fill(shadow_.begin(), shadow_.end(), SharedShadow{});
}

Toucher Machine::toucher() {
  return {static_cast<uint16_t>(current_), current().fence, epoch_, first_epoch_, order_[warp()]};
}

void Machine::check_shared(const void* at, size_t bytes, Access access) {
  const size_t offset = offset_of(at);
  const Toucher t = toucher();
  for (size_t i = offset / 2; i < (offset + bytes + 1) / 2; ++i)
    if (const char* wrong = judge_shared(shadow_[i], ordered_ ? &readers_[i] : nullptr, t, access))
      fail_thread(format("%s (byte %zu)", wrong, i * 2));
  if (access == Access::kWrite && warpgroups.reads(offset, bytes))
    fail_thread(format("writes shared memory that a product still reads (byte %zu)", offset));
}

void Machine::set_pending(const void* to, bool pending, size_t bytes) {
  const size_t first = offset_of(to) / 2;
  for (size_t i = first; i < first + bytes / 2; ++i) shadow_[i].pending = pending;
}

void Machine::note_error(const std::string& what) {
  if (error_.empty()) error_ = where(current_) + ": " + what;
}

void Machine::check_global(Extent& e, const void* at, size_t bytes, Access access) {
  const char* p = static_cast<const char*>(at);
  if (p < e.begin || p + bytes > e.begin + e.bytes)
    fail_thread(format("%s outside a tensor of %zu bytes, at byte %lld",
                       access == Access::kRead ? "reads" : "writes", e.bytes,
                       static_cast<long long>(p - e.begin)));
  if (bytes < 2) return;
  if (e.shadow.empty()) e.shadow.resize(e.bytes / 2 + 1);
  const auto offset = static_cast<size_t>(p - e.begin);
  for (size_t i = offset / 2; i < (offset + bytes) / 2; ++i)
    if (const char* wrong = judge_global(e.shadow[i], launches_ % 0xFFFF,
                                         static_cast<uint64_t>(block_number_), access))
      fail_thread(format("%s (byte %zu of a tensor of %zu)", wrong, i * 2, e.bytes));
}

void register_kernel(std::string_view name) { kernel_table().emplace(name, false); }
void note_run(std::string_view name) { kernel_table().find(name)->second = true; }
const std::map<std::string, bool, std::less<>>& kernels() { return kernel_table(); }

void add_extent(const void* memory, size_t bytes) {
  auto e = std::make_unique<Extent>();
  e->begin = static_cast<const char*>(memory);
  e->bytes = bytes;
  extents()[e->begin] = std::move(e);
}
void remove_extent(const void* memory) { extents().erase(static_cast<const char*>(memory)); }
Extent* find_extent(const void* pointer) {
  const char* p = static_cast<const char*>(pointer);
  auto after = extents().upper_bound(p);
  if (after != extents().begin()) {
    Extent* e = std::prev(after)->second.get();
    if (p <= e->begin + e->bytes) return e;
  }
  fail(Status::kBug, "a kernel is given a pointer that is in no tensor");
}

Options& options() { return machine().options; }
void run(const Launch& launch, const std::function<void()>& thread) {
  machine().run(launch, thread);
}

void block_barrier() { machine().wait(State::kAtBarrier); }
void warp_meet(const char* what, void* mine, Finish finish) {
  Thread& t = machine().current();
  t.what = what;
  t.mine = mine;
  t.finish = finish;
  machine().wait(State::kAtWarp);
}
void warp_barrier() {
  warp_meet("warp_sync", nullptr, [](void* const*) { machine().note_warp_barrier(); });
}

void fail_thread(const std::string& what) { machine().fail_thread(what); }
void check_global(Extent& extent, const void* at, size_t bytes, Access access) {
  machine().check_global(extent, at, bytes, access);
}
void check_shared(const void* at, size_t bytes, Access access) {
  machine().check_shared(at, bytes, access);
}
void* shared_part(size_t offset, size_t bytes) {
  Machine& m = machine();
  if (offset + bytes > m.launch.shared)
    fail_thread(format("takes %zu bytes of shared memory, of which the launch gives %zu",
                       offset + bytes, m.launch.shared));
  return m.shared->bytes.data() + offset;
}

// A copy is done as late as it may be: when it is waited for. Until then its target is untouchable.
void copy_async(void* to, const void* from, bool valid) {
  check_shared(to, 16, Access::kWrite);
  machine().set_pending(to, true);
  machine().current().open.push_back({to, from, valid});
}
void copy_async_commit() {
  Thread& t = machine().current();
  t.groups.push_back(std::move(t.open));
  t.open.clear();
}
void copy_async_wait(int newest) {
  Thread& t = machine().current();
  while (static_cast<int>(t.groups.size()) > newest) {
    for (const AsyncCopy& c : t.groups.front()) {
      machine().set_pending(c.to, false);
      check_shared(c.to, 16, Access::kWrite);
      if (c.valid)
        std::memcpy(c.to, c.from, 16);
      else
        std::memset(c.to, 0, 16);
    }
    t.groups.pop_front();
  }
}

}  // namespace ddpm::simt
