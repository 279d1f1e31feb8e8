// Convolution and its gradient by the input on Hopper's warpgroup product (wgmma m64n128k16, bf16,
// fp32 sums).
//
// A block stays on its multiprocessor and computes tile after tile of 256 pixels x 128 channels.
// Seven warps bring the input, 32 channels of the tile's halo at a time, into a slot and transform
// it there (scale and shift, SiLU, dropout: once per halo element, not per tap). One warp brings
// the filter, 32 channels of a tap at a time, by bulk copies into a stage; the filter was laid out
// before as it is to lie in shared memory. Two warpgroups multiply, 128 pixels each: rows from the
// slot by ldmatrix, a tap being another offset into the halo, columns from the stage. Slots and
// stages are handed over and back at mbarriers, so input and filters of the next tile come while
// this one is finished.
//
// Moves x once per 128 output channels, the filter once per tile from L2, y once. Limited by the
// tensor cores' rate. Needs sm_90a, 512 threads and all registers of a multiprocessor.
#include <device/async.h>
#include <device/mbarrier.h>
#include <device/warp.h>
#include <device/warpgroup.h>
#include <device/wgmma.h>

#include "kernels/cuda/conv_hopper.h"
#include "kernels/cuda/conv_plan.h"

namespace ddpm::cuda {
namespace {

constexpr int kUnits = kHopperChunk / 8;  // 16-byte pieces of a pixel in a slot
constexpr int kStages = 6, kMaxSlots = 3;
constexpr unsigned kStageBytes = kHopperStage * sizeof(bf16);
constexpr int kGroups = 2, kGroupRows = kHopperRows / kGroups;  // warpgroups that multiply
constexpr int kParts = kGroupRows / kHopperPart;                // products down a group's rows
constexpr int kInputWarps = 7, kInputThreads = 32 * kInputWarps;
constexpr int kThreads = 512;
constexpr int kFewRegisters = 56, kManyRegisters = 200;  // 128 each at the start
constexpr unsigned kInputMeets = 1;                      // a named barrier
static_assert(kHopperColumns == kWgmmaColumns && kHopperPart == kWgmmaRows);

// What a block keeps in shared memory.
struct Shared {
  Smem<bf16> stages, slots;
  Smem<float> staged;  // (groups, 64, columns): sums on their way out
  Smem<int> pixels;    // (2, halo): stored pixels of this tile's halo and the next one's
  Smem<Mbarrier> stage_full, stage_empty, slot_full, slot_empty;
};

constexpr int kStaged = kHopperPart * sums_pitch(kHopperColumns);

// A place in a ring of stages or slots. Its parity is that of the phase in which it is filled.
struct RingPlace {
  int index = 0;
  unsigned parity = 0;

  __device__ __forceinline__ void advance(int size) {
    if (++index < size) return;
    index = 0;
    parity ^= 1;
  }
};

// Where an input warp stands: a chunk of one of the block's tiles.
struct InputPlace {
  int work, chunk = 0, table = 0;
  RingPlace slot;

  __device__ __forceinline__ void advance(const HopperProblem& a, int chunks) {
    slot.advance(a.slots);
    if (++chunk < chunks) return;
    chunk = 0;
    table ^= 1;
    work += static_cast<int>(gridDim.x);
  }
};

__device__ __forceinline__ void copy_chunk(const HopperProblem& a, const Tile& tile,
                                           const Smem<int>& pixels, int chunk,
                                           const Smem<bf16>& to) {
  const int thread = static_cast<int>(threadIdx.x);
  const bool main = chunk < a.steps.chunks();
  const int c0 = (main ? chunk : chunk - a.steps.chunks()) * kHopperChunk;
  const int count = (main ? a.tiles.halo() : kHopperRows) * kUnits;
  for (int i = thread; i < count; i += kInputThreads) {
    const int row = i / kUnits, unit = i % kUnits * 8;
    const auto piece = to + (row * kHopperPitch + unit);
    if (main) {
      copy_input<true>(a.in, pixels[row], c0 + unit, piece);
    } else {
      const int pixel = row < tile.rows ? static_cast<int>(output_pixel(a.tiles, tile, row)) : -1;
      copy_input<true>(a.shortcut, pixel, c0 + unit, piece);
    }
  }
}

// In place, by the threads that copied.
__device__ __forceinline__ void transform_chunk(const HopperProblem& a, int n,
                                                const Smem<int>& pixels, int chunk,
                                                const Smem<bf16>& slot) {
  const int count = a.tiles.halo() * kUnits;
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < count; i += kInputThreads) {
    const int row = i / kUnits, unit = i % kUnits * 8;
    transform_copied(a.in, n, pixels[row], chunk * kHopperChunk + unit,
                     slot + (row * kHopperPitch + unit));
  }
}

// The input warps. With three slots a chunk is copied while the one before it is transformed and
// the one before that multiplied; with two, a chunk is copied and transformed while the one before
// it is multiplied.
__device__ __forceinline__ void bring_input(const HopperProblem& a, const Shared& s) {
  const ConvTiles& t = a.tiles;
  const int chunks = a.steps.all_chunks(), halo = t.halo(), ahead = a.slots - 2;
  const int first = static_cast<int>(blockIdx.x), step = static_cast<int>(gridDim.x);
  const int count = (a.count() - first + step - 1) / step * chunks;
  InputPlace copied{first}, ready{first};
  for (int i = 0; i < count + ahead; ++i) {
    if (i < count) {
      const Tile tile = find_tile(t, copied.work / a.blocks);
      const Smem<int> pixels = s.pixels + copied.table * halo;
      if (copied.chunk == 0) {  // when all have done with the tile before the last
        named_barrier(kInputMeets, kInputThreads);
        for (int j = static_cast<int>(threadIdx.x); j < halo; j += kInputThreads)
          pixels[j] = halo_pixel(t, tile, halo_place(t, j));
        named_barrier(kInputMeets, kInputThreads);
      }
      mbarrier_wait(s.slot_empty + copied.slot.index, copied.slot.parity ^ 1);
      copy_chunk(a, tile, pixels, copied.chunk, s.slots + copied.slot.index * a.slot);
      copied.advance(a, chunks);
    }
    copy_async_commit();
    if (i < ahead) continue;
    if (ahead > 0)
      copy_async_wait<1>();
    else
      copy_async_wait<0>();
    if (a.in.transforms() && ready.chunk < a.steps.chunks())
      transform_chunk(a, t.tile_images > 1 ? -1 : ready.work / a.blocks / t.per_image,
                      s.pixels + ready.table * halo, ready.chunk,
                      s.slots + ready.slot.index * a.slot);
    warp_sync();
    if (lane_id() == 0) mbarrier_arrive(s.slot_full + ready.slot.index);
    ready.advance(a, chunks);
  }
  copy_async_wait<0>();
}

// The filter warp.
__device__ __forceinline__ void bring_filter(const HopperProblem& a, const Shared& s) {
  const int steps = a.steps.count();
  RingPlace stage;
  for (int work = static_cast<int>(blockIdx.x); work < a.count();
       work += static_cast<int>(gridDim.x)) {
    const auto from = a.packed + int64_t{work % a.blocks} * steps * kHopperStage;
    for (int i = 0; i < steps; ++i) {
      mbarrier_wait(s.stage_empty + stage.index, stage.parity ^ 1);
      if (lane_id() == 0) {
        mbarrier_arrive_expect(s.stage_full + stage.index, kStageBytes);
        bulk_copy(s.stages + stage.index * kHopperStage, from + int64_t{i} * kHopperStage,
                  kStageBytes, s.stage_full + stage.index);
      }
      stage.advance(kStages);
    }
  }
}

template <bool Gradient>
__device__ __forceinline__ void finish_group(const HopperProblem& a, const Shared& s,
                                             const Tile& tile, int k0, int group,
                                             const WgmmaSums (&sums)[kParts]) {
  const HopperTeam team{group};
  const Smem<float> staged = s.staged + group * kStaged;
  const int row = warp_id() % 4 * 16 + lane_id() / 4, column = lane_id() % 4 * 2;
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
#pragma unroll
    for (int j = 0; j < kHopperColumns / 8; ++j)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float pair[2] = {sums[part][j * 4 + half * 2], sums[part][j * 4 + half * 2 + 1]};
        store_floats<float>(
            staged + ((row + half * 8) * sums_pitch(kHopperColumns) + j * 8 + column), pair);
      }
    team.sync();
    finish_tile<bf16, kHopperColumns, Gradient>(
        a.out, a.tiles, part_of(a.tiles, tile, group * kGroupRows + part * kHopperPart), k0, staged,
        team);
    team.sync();
  }
}

// A warpgroup that multiplies. While it loads rows, the other one's products fill the tensor cores.
template <bool Gradient>
__device__ __forceinline__ void multiply_tiles(const HopperProblem& a, const Shared& s, int group) {
  const ConvTiles& t = a.tiles;
  const int steps = a.steps.count(), main_steps = a.steps.chunks() * a.steps.taps;
  const int lane_row = group * kGroupRows + warp_id() % 4 * 16 + lane_id() % 16;
  const int lane_column = lane_id() / 16 * 8;
  RingPlace stage, slot;
  for (int work = static_cast<int>(blockIdx.x); work < a.count();
       work += static_cast<int>(gridDim.x)) {
    const int tile_index = work / a.blocks, k0 = (work - tile_index * a.blocks) * kHopperColumns;
    const Tile tile = find_tile(t, tile_index);
    int at[kParts];  // of this lane's rows, in a slot
    WgmmaSums sums[kParts];
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      at[part] = halo_of(t, tile, lane_row + part * kHopperPart) * kHopperPitch + lane_column;
      sums[part].clear();
    }
    int tap = 0, tap_column = 0, tap_offset = 0;  // offset: halo pixels from tap (0,0)
    for (int step = 0; step < steps; ++step) {
      if (step == main_steps) {  // the shortcut's rows lie as the tile's
#pragma unroll
        for (int part = 0; part < kParts; ++part)
          at[part] = (lane_row + part * kHopperPart) * kHopperPitch + lane_column;
      }
      if (tap == 0) mbarrier_wait(s.slot_full + slot.index, slot.parity);
      mbarrier_wait(s.stage_full + stage.index, stage.parity);
      const Smem<bf16> from = s.slots + (slot.index * a.slot + tap_offset * kHopperPitch);
      WgmmaRows rows[kHopperChunk / kWgmmaDepth][kParts];
#pragma unroll
      for (int k = 0; k < kHopperChunk / kWgmmaDepth; ++k)
#pragma unroll
        for (int part = 0; part < kParts; ++part)
          rows[k][part].load(from + (at[part] + k * kWgmmaDepth));
      const WgmmaOperand columns =
          wgmma_operand<kHopperChunk * 2>(s.stages + stage.index * kHopperStage);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < kHopperChunk / kWgmmaDepth; ++k)
#pragma unroll
        for (int part = 0; part < kParts; ++part)
          wgmma(sums[part], rows[k][part], columns.at(k * kWgmmaDepth));
      wgmma_commit();
      wgmma_wait<0>();
#pragma unroll
      for (int part = 0; part < kParts; ++part) sums[part].settle();
      warp_sync();
      if (lane_id() == 0) mbarrier_arrive(s.stage_empty + stage.index);
      stage.advance(kStages);
      ++tap_offset;
      if (++tap_column == t.s) {
        tap_column = 0;
        tap_offset += t.halo_w - t.s;
      }
      if (++tap == a.steps.taps || step >= main_steps) {
        tap = tap_column = tap_offset = 0;
        if (lane_id() == 0) mbarrier_arrive(s.slot_empty + slot.index);
        slot.advance(a.slots);
      }
    }
    finish_group<Gradient>(a, s, tile, k0, group, sums);
  }
}

template <bool Gradient>
__global__ void __launch_bounds__(kThreads, 1) conv_hopper_kernel(const HopperProblem a) {
  if constexpr (!kHasWgmma) {
    refuse_to_run();
  } else {
    SharedMemory shared;
    Shared s;
    s.stages = shared.take<bf16>(kStages * kHopperStage);  // first: aligned to eight rows
    s.slots = shared.take<bf16>(a.slots * a.slot);
    s.staged = shared.take<float>(kGroups * kStaged);
    s.pixels = shared.take<int>(2 * a.tiles.halo());
    s.stage_full = shared.take<Mbarrier>(kStages);
    s.stage_empty = shared.take<Mbarrier>(kStages);
    s.slot_full = shared.take<Mbarrier>(kMaxSlots);
    s.slot_empty = shared.take<Mbarrier>(kMaxSlots);
    if (threadIdx.x == 0) {
      constexpr unsigned kReaders = kGroups * 4;  // warps
      for (int i = 0; i < kStages; ++i) {
        mbarrier_init(s.stage_full + i, 1);
        mbarrier_init(s.stage_empty + i, kReaders);
      }
      for (int i = 0; i < a.slots; ++i) {
        mbarrier_init(s.slot_full + i, kInputWarps);
        mbarrier_init(s.slot_empty + i, kReaders);
      }
      mbarrier_init_fence();
    }
    block_sync();
    if (warp_id() < 8) {
      give_up_registers<kFewRegisters>();
      if (warp_id() < kInputWarps)
        bring_input(a, s);
      else
        bring_filter(a, s);
    } else {
      take_registers<kManyRegisters>();
      multiply_tiles<Gradient>(a, s, warp_id() / 4 - 2);
    }
  }
}

template <bool Gradient>
__global__ void conv_hopper_pack_kernel(HopperSteps steps, int k, Global<const bf16> filter,
                                        Global<const bf16> shortcut, Global<bf16> packed,
                                        int64_t runs) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i < runs) pack_run<Gradient>(steps, k, filter, shortcut, packed, i);
}

// ---- host ----

size_t shared_size(const ConvTiles& t, int slots, int slot) {
  const auto ints = [](int n) { return static_cast<size_t>(n); };
  return shared_bytes<bf16>(ints(kStages * kHopperStage)) + shared_bytes<bf16>(ints(slots * slot)) +
         shared_bytes<float>(ints(kGroups * kStaged)) + shared_bytes<int>(ints(2 * t.halo())) +
         2 * shared_bytes<Mbarrier>(kStages) + 2 * shared_bytes<Mbarrier>(kMaxSlots);
}

// Everything but pointers.
struct HopperLaunch {
  HopperProblem a;
  int k = 0, at_once = 1;
  bool gradient = false;
  size_t shared = 0;

  int64_t runs() const { return packed_runs(a.blocks, a.steps.count()); }
  size_t workspace() const { return static_cast<size_t>(runs()) * 8 * sizeof(bf16); }
  unsigned grid() const { return static_cast<unsigned>(std::min(a.count(), at_once)); }

  void run(HopperProblem problem, const Run& r, const bf16* filter, const bf16* shortcut) const {
    bf16* packed = static_cast<bf16*>(r.workspace);
    problem.tiles = a.tiles;
    problem.steps = a.steps;
    problem.blocks = a.blocks;
    problem.slots = a.slots;
    problem.slot = a.slot;
    problem.packed = packed;
    const LaunchShape pack{.grid_x = blocks_for(runs(), 1)};
    const LaunchShape shape{.grid_x = grid(), .block = kThreads, .shared = shared};
    if (gradient) {
      launch<conv_hopper_pack_kernel<true>>(pack, r.stream, a.steps, k, filter, shortcut, packed,
                                            runs());
      launch<conv_hopper_kernel<true>>(shape, r.stream, problem);
    } else {
      launch<conv_hopper_pack_kernel<false>>(pack, r.stream, a.steps, k, filter, shortcut, packed,
                                             runs());
      launch<conv_hopper_kernel<false>>(shape, r.stream, problem);
    }
  }
};

// nullopt where a block does not fit, or 64 rows of a tile would be parts of several images.
std::optional<HopperLaunch> plan_hopper(const ConvChip& chip, const ConvTiles& t,
                                        const HopperSteps& steps, int k, bool gradient) {
  if (chip.wgmma_blocks <= 0 || steps.channels % 8 != 0 || steps.more % 8 != 0) return std::nullopt;
  if (t.tile_images > 1 && kHopperPart % t.pixels() != 0) return std::nullopt;
  if (t.halo_h > kMaxHaloSide || t.halo_w > kMaxHaloSide) return std::nullopt;
  HopperLaunch plan{.k = k, .at_once = chip.wgmma_blocks, .gradient = gradient};
  plan.a.tiles = t;
  plan.a.steps = steps;
  plan.a.blocks = (k + kHopperColumns - 1) / kHopperColumns;
  plan.a.slot = (steps.more > 0 ? std::max(t.halo(), kHopperRows) : t.halo()) * kHopperPitch;
  for (plan.a.slots = kMaxSlots; plan.a.slots >= 2; --plan.a.slots) {
    plan.shared = shared_size(t, plan.a.slots, plan.a.slot);
    if (plan.shared <= chip.shared_bytes) return plan;
  }
  return std::nullopt;
}

ConvGrid grid_of(const HopperLaunch& plan) {
  return {.blocks = plan.a.count(), .columns = kHopperColumns, .shared = plan.shared};
}

}  // namespace

ConvPlan hopper_forward(const ConvChip& chip, const ConvDesc& d, const ConvSlots& s, Out y,
                        Out statistics) {
  if (d.x.c % 8 != 0 || d.shortcut_c % 8 != 0) return {};
  const HopperSteps steps{
      .channels = d.c(), .more = d.shortcut_c + d.shortcut_c2, .taps = d.r * d.s};
  const auto plan = plan_hopper(chip, forward_tiles(d, kHopperRows), steps, d.k, false);
  if (!plan) return {};
  return {plan->workspace(),
          [=, plan = *plan](const Run& r) {
            HopperProblem a;
            a.in = make_input<bf16>(d, s, r);
            const bf16* shortcut_filter = nullptr;
            if (d.shortcut_c > 0) {
              a.shortcut = make_shortcut<bf16>(d, s, r);
              shortcut_filter = r.in<bf16>(s.shortcut_filter);
            }
            a.out = make_output<bf16>(d, s, r, y, statistics);
            plan.run(a, r, r.in<bf16>(s.filter), shortcut_filter);
          },
          grid_of(*plan)};
}

ConvPlan hopper_dgrad(const ConvChip& chip, const ConvDesc& d, const ConvSlots& s, In dy,
                      const GradientSlots& to) {
  const HopperSteps steps{.channels = d.k, .taps = d.r * d.s};
  const auto plan = plan_hopper(chip, dgrad_tiles(d, kHopperRows), steps, d.c(), true);
  if (!plan) return {};
  return {plan->workspace(),
          [=, plan = *plan](const Run& r) {
            HopperProblem a;
            a.in = plain_input(r.in<bf16>(dy), d.k, d.y().pixels());
            a.out = gradient_output<bf16>(d, s, to, r);
            plan.run(a, r, r.in<bf16>(s.filter), nullptr);
          },
          grid_of(*plan)};
}

}  // namespace ddpm::cuda
