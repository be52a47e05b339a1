// The gradients of the relative bias's tables at D = 256, from dS as the pass that gives dK and dV left it in device memory
// (ds_store.h).
//
// dQ is another kernel's (backward_stored.h): its accumulators leave no registers for warps that sum. dS is read a second
// time for that; reading is all that this kernel should wait for. A persistent block takes 192 queries and goes over the
// cells of 64 keys that they see. One thread has them copied, three warps prepare what is to be known of their times, and
// twelve take their blocks of 64 x 64 pairs by turns (backward_sums.h).
#pragma once

#include "attention/backward_sums.h"

namespace genrec::attention {

// `Stored_`: of the kernel that gives dQ of the same dS.
template <class Stored_>
struct TableSumsShape {
  using Stored = Stored_;
  using Element = typename Stored::Element;
  static constexpr int kQueries = kCellQueries, kKeys = kCellKeys;
  static constexpr bool kCausal = Stored::kCausal;
  using Parts = CellParts<64>;  // blocks, wherever the pass that wrote dS had its parts
  static constexpr Bias kBias = Bias::kRelative;
  static constexpr bool kRelative = true, kSumsTables = true, kGivesDq = false;
  using Params = BiasedParams<BackwardParams, kBias>;
  // Shared memory decides: 227 KiB. Four cells are being summed, the others on their way.
  static constexpr int kStages = 6;
  static constexpr int kPreparers = 3, kSummingWarps = 12;
  static_assert(kStages % kPreparers == 0, "a warp that prepares sees each phase of its stages");
  static constexpr int kThreads = 32 * (1 + kPreparers + kSummingWarps);
  static constexpr int kGradientRegisters = 65536 / kThreads;

  // What BlockSums wants to know.
  static constexpr int kTableCopies = kSummingWarps, kCopies = kTableCopies;
  static constexpr bool kSumsByProducts = true, kSplitTables = false;
  using Block = TiledBlock;
  using BlockTile = BlockTimes;
  using BlockMemory = SmallBlockMemory;

  struct alignas(1024) Shared {
    alignas(1024) Element ds[kStages][kCellElements];
    Ring<kStages> ring;  // dS and what is prepared of a step
    Ring<2> work_ring;
    PipelinedWork work[2];
    int taken;  // blocks, where any warp takes the next one
    SumsStep steps[kStages];
    BlockTimes blocks[kStages][Parts::kCount];
    int64_t times[kStages][kKeys];
    BucketTables buckets;
    BlockMemory sums[kSummingWarps];
  };
  static_assert(sizeof(Shared) <= 232448, "more shared memory than a block may have");
};

// Launched where a table's gradient is wanted.
template <class Shape>
__global__ void __launch_bounds__(Shape::kThreads, 1) table_sums_kernel(const __grid_constant__ typename Shape::Params p) {
  GENREC_SHARED_MEMORY(memory);
  auto& shared = *reinterpret_cast<typename Shape::Shared*>(memory);
  if (threadIdx.x == 0) {
    shared.ring.init(Shape::kSummingWarps, 1 + kArrivalsPerWarp);
    shared.work_ring.init(Shape::kPreparers);
    shared.taken = 0;
    fence_new_barriers();
  }
  if (p.bias.time_sums != nullptr) fill_buckets<Shape::kThreads>(shared.buckets, p.bias, 1.f);
  sync_block(Shape::kThreads);
  follow_kernel_before();
  const int warp = uniform(threadIdx.x / 32), summing = warp - 1 - Shape::kPreparers;
  if (warp == 0) {
    if (threadIdx.x == 0) sums_produce<Shape>(p, shared);
  } else if (summing < 0) {
    SumsPreparer<Shape>{p, shared}.run(warp - 1);
  } else {
    StoredSumsWarp<Shape>(p, shared, summing).run();
  }
}

}  // namespace genrec::attention
