// What sm_90 adds: barriers of some warps, bulk copies, and what products read.
#include <algorithm>
#include <cstring>

#include "tests/simt/machine_parts.h"

namespace ddpm::simt {

// From now on not all warps meet: who read what is kept warp by warp.
void Machine::use_orders() {
  if (ordered_) return;
  ordered_ = true;
  readers_.resize(shadow_.size());
  for (size_t i = 0; i < shadow_.size(); ++i) {  // some of this epoch's are not known any more
    if (shadow_[i].read_epoch != epoch_ || shadow_[i].reader != kSeveral) continue;
    readers_[i].warps = ~0u;
    readers_[i].sync.fill(UINT32_MAX);
  }
}

void Machine::wait_at(State state, unsigned barrier, unsigned detail) {
  use_orders();
  current().barrier = barrier;
  current().detail = detail;
  wait(state);
}

bool Machine::pass_named(unsigned warp) {
  const Thread& first = *threads_[warp * kWarp];
  std::vector<unsigned> warps;
  for (unsigned w = 0; w < launch.block / kWarp; ++w) {
    unsigned here = 0;
    for (unsigned i = w * kWarp; i < (w + 1) * kWarp; ++i) {
      const Thread& t = *threads_[i];
      if (t.state != State::kAtNamed || t.barrier != first.barrier) continue;
      ++here;
      if (t.detail == first.detail) continue;
      error_ = where(i) + format(": meets at named barrier %u with %u threads, others with %u",
                                 t.barrier, t.detail, first.detail);
      return true;
    }
    if (here == kWarp) warps.push_back(w);
  }
  if (warps.size() * kWarp < first.detail) return false;
  if (warps.size() * kWarp > first.detail) {
    error_ =
        where(warp * kWarp) + format(": named barrier %u is not of so many threads", first.barrier);
    return true;
  }
  Order all{};
  for (const unsigned w : warps) {
    ++order_[w][w];
    join(all, order_[w]);
  }
  for (const unsigned w : warps) {
    order_[w] = all;
    for (unsigned i = w * kWarp; i < (w + 1) * kWarp; ++i) threads_[i]->state = State::kReady;
  }
  return true;
}

bool Machine::pass_phase(unsigned warp) {
  const Thread& first = *threads_[warp * kWarp];
  for (unsigned i = warp * kWarp; i < (warp + 1) * kWarp; ++i) {
    if (threads_[i]->barrier == first.barrier && threads_[i]->detail == first.detail) continue;
    error_ = where(i) + ": waits for another phase than its warp";
    return true;
  }
  const Mbarrier& b = mbarriers_[first.barrier];
  if (!b.has_passed(first.detail)) return false;
  join(order_[warp], b.passed);
  for (unsigned i = warp * kWarp; i < (warp + 1) * kWarp; ++i) threads_[i]->state = State::kReady;
  return true;
}

void Machine::add_mbarrier(const void* at, unsigned count) {
  use_orders();
  const size_t offset = offset_of(at);
  for (const Mbarrier& b : mbarriers_)
    if (b.offset == offset) fail_thread(format("makes the mbarrier at byte %zu twice", offset));
  if (mbarriers_.size() == kMbarriers)
    fail_thread(format("makes more than %u mbarriers", kMbarriers));
  if (count == 0) fail_thread("makes an mbarrier of no arrivals");
  Mbarrier b;
  b.offset = offset;
  b.index = static_cast<unsigned>(mbarriers_.size());
  b.count = b.left = count;
  b.maker = current_;
  b.epoch = epoch_;
  mbarriers_.push_back(b);
}

void Machine::fence_mbarriers() {
  for (Mbarrier& b : mbarriers_)
    if (b.maker == current_ && b.epoch == epoch_) b.fenced = true;
}

Mbarrier& Machine::find_mbarrier(const void* at) {
  const size_t offset = offset_of(at);
  for (Mbarrier& b : mbarriers_) {
    if (b.offset != offset) continue;
    if (!b.fenced)
      fail_thread(format("uses the mbarrier at byte %zu, made without a fence", offset));
    if (b.epoch == epoch_ && b.maker != current_)
      fail_thread(format("uses the mbarrier at byte %zu, made since the last barrier", offset));
    return b;
  }
  fail_thread(format("uses an mbarrier at byte %zu, where none was made", offset));
}

void Machine::arrive(const void* at, int64_t bytes) {
  Mbarrier& b = find_mbarrier(at);
  b.bytes += bytes;
  b.arrive(order_[warp()]);
}

// As late as it may be: when nobody can go on without it. Until then its target is untouchable.
void Machine::bulk_copy(const BulkCopy& copy) {
  check_shared(copy.to, copy.bytes, Access::kWrite);
  set_pending(copy.to, true, copy.bytes);
  const size_t first = offset_of(copy.to) / 2;
  for (size_t i = first; i < first + copy.bytes / 2; ++i) {
    shadow_[i].writer = static_cast<uint16_t>(kMbarrierBit | copy.barrier);
    shadow_[i].write_sync = mbarriers_[copy.barrier].phase;
  }
  bulk_copies_.push_back(copy);
}

bool Machine::finish_bulk_copy() {
  if (bulk_copies_.empty() ||
      std::none_of(threads_.begin(), threads_.begin() + launch.block,
                   [](const auto& t) { return t->state == State::kAtPhase; }))
    return false;
  std::swap(bulk_copies_[random() % bulk_copies_.size()], bulk_copies_.back());
  const BulkCopy copy = bulk_copies_.back();
  bulk_copies_.pop_back();
  set_pending(copy.to, false, copy.bytes);
  std::memcpy(copy.to, copy.from, copy.bytes);
  mbarriers_[copy.barrier].come(static_cast<int64_t>(copy.bytes));
  return true;
}

void Machine::check_operand(size_t offset, size_t bytes) {
  use_orders();
  const Toucher t = toucher();
  for (size_t i = offset / 2; i < (offset + bytes) / 2; ++i) {
    SharedShadow& s = shadow_[i];
    if (const char* wrong = judge_shared(s, &readers_[i], t, Access::kRead))
      fail_thread(format("a product %s (byte %zu)", wrong, i * 2));
    if (s.writer < kMbarrierBit && s.fence == threads_[s.writer]->fence)
      fail_thread(
          format("a product reads what was written without a proxy fence (byte %zu)", i * 2));
  }
}

void Machine::note_operand(size_t offset, size_t bytes) {
  const Toucher t = toucher();
  for (size_t i = offset / 2; i < (offset + bytes) / 2; ++i) note_read(shadow_[i], &readers_[i], t);
}

void Machine::check_end() {
  const char* wrong = warpgroups.unfinished();
  if (!bulk_copies_.empty()) wrong = "ends while bulk copies are under way";
  std::string text = wrong == nullptr ? "" : wrong;
  for (const Mbarrier& b : mbarriers_)
    if (wrong == nullptr && (b.left != b.count || b.bytes != 0))
      text = format(
          "ends in a phase of the mbarrier at byte %zu, with %u of %u arrivals and %lld "
          "bytes missing",
          b.offset, b.left, b.count, static_cast<long long>(b.bytes));
  if (text.empty()) return;
  drop_block();
  const std::string at = where(0);
  fail(Status::kBug, "%s: %s", at.substr(0, at.rfind(" thread")).c_str(), text.c_str());
}

void named_barrier(unsigned id, unsigned threads) {
  if (id == 0 || id > 15 || threads == 0 || threads % kWarp != 0)
    fail_thread(format("meets at a named barrier %u of %u threads", id, threads));
  machine().wait_at(State::kAtNamed, id, threads);
}
void note_error(const char* what) { machine().note_error(what); }
unsigned current_warp() { return machine().warp(); }
Warpgroups& warpgroups() { return machine().warpgroups; }
void mbarrier_init(const void* at, unsigned count) { machine().add_mbarrier(at, count); }
void mbarrier_init_fence() { machine().fence_mbarriers(); }
void mbarrier_arrive(const void* at, int64_t bytes) { machine().arrive(at, bytes); }
void mbarrier_wait(const void* at, unsigned parity) {
  machine().wait_at(State::kAtPhase, machine().find_mbarrier(at).index, parity);
}
void bulk_copy(void* to, const void* from, size_t bytes, const void* mbarrier) {
  machine().bulk_copy({to, from, bytes, machine().find_mbarrier(mbarrier).index});
}
void proxy_fence() { ++machine().current().fence; }
void check_operand(size_t offset, size_t bytes) { machine().check_operand(offset, bytes); }
void note_operand(size_t offset, size_t bytes) { machine().note_operand(offset, bytes); }

}  // namespace ddpm::simt
