// Runs CUDA kernels on the host: a block is a set of fibers, one a thread, which change places at
// barriers and warp operations. What a GPU would only do wrong now and then is an error here, with
// kernel, block and thread: a barrier that not all threads reach, a warp operation that a lane
// misses, reads of shared memory nobody wrote, races, accesses outside a tensor, asynchronous
// copies and products that are not waited for.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "kernels/error.h"

namespace ddpm::simt {

class Warpgroups;

struct Dim3 {
  unsigned x = 1, y = 1, z = 1;
};

// ---- kernels: all that could be launched, and those that were ----
void register_kernel(std::string_view name);
void note_run(std::string_view name);
const std::map<std::string, bool, std::less<>>& kernels();  // name -> has run

// ---- memory of the device ----
// A tensor's bytes in device memory. Shadow of 2 bytes: which launch last touched them, which block
// wrote and which read.
struct Extent {
  const char* begin = nullptr;
  size_t bytes = 0;
  std::vector<uint64_t> shadow;  // made on first use
};
// `memory` counts as a tensor until it is forgotten.
void add_extent(const void* memory, size_t bytes);
void remove_extent(const void* memory);
Extent* find_extent(const void* pointer);  // throws Error(kBug) if it is in none

// ---- a launch ----
struct Launch {
  std::string_view kernel;
  Dim3 grid;
  unsigned block = 0;
  size_t shared = 0;
};
struct Options {
  uint64_t seed = 0;               // of the order of warps and blocks
  int64_t max_blocks = 0;          // 0 = all; else first, last and seeded ones of a larger grid
  size_t max_shared = 227 * 1024;  // of a block, in bytes
};
Options& options();
void run(const Launch& launch, const std::function<void()>& thread);

// ---- what a running thread sees ----
struct Place {
  Dim3 thread, block, block_dim, grid_dim;
};
extern constinit thread_local Place place;  // kernels ask for it all the time
inline Dim3 thread_index() { return place.thread; }
inline Dim3 block_index() { return place.block; }
inline Dim3 block_dim() { return place.block_dim; }
inline Dim3 grid_dim() { return place.grid_dim; }

void block_barrier();
// The 32 lanes of the warp meet; `finish` runs once, over what each lane brought.
using Finish = void (*)(void* const* lanes);
void warp_meet(const char* what, void* mine, Finish finish);
// After it, what the warp's lanes wrote to shared memory is visible to all of them.
void warp_barrier();

[[noreturn]] void fail_thread(const std::string& what);

enum class Access { kRead, kWrite };
// Global memory: inside the extent, no race with another block.
void check_global(Extent& extent, const void* at, size_t bytes, Access access);
// Shared memory: written before it is read, no race between threads.
void check_shared(const void* at, size_t bytes, Access access);
// A part of the block's shared memory.
void* shared_part(size_t offset, size_t bytes);
// Asynchronous copies of the running thread.
void copy_async(void* to, const void* from, bool valid);
void copy_async_commit();
void copy_async_wait(int newest);

// ---- sm_90 ----
// `threads` of the block, whole warps, meet.
void named_barrier(unsigned id, unsigned threads);
// A barrier at an address of shared memory. Who waits for a phase comes after what a warp did
// before the last warp or block barrier that it passed before it arrived.
void mbarrier_init(const void* at, unsigned count);
void mbarrier_init_fence();
void mbarrier_arrive(const void* at,
                     int64_t bytes);  // bytes: of bulk copies, that it waits for too
void mbarrier_wait(const void* at, unsigned parity);  // all lanes of a warp
void bulk_copy(void* to, const void* from, size_t bytes, const void* mbarrier);
// What the thread wrote to shared memory may be read by products.
void proxy_fence();
// A product of the running warp reads shared memory: allowed, then done. By offset.
void check_operand(size_t offset, size_t bytes);
void note_operand(size_t offset, size_t bytes);
unsigned current_warp();
Warpgroups& warpgroups();
// As fail_thread, where nothing can be thrown.
void note_error(const char* what);

}  // namespace ddpm::simt
