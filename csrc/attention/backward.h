// The backward kernel with a bias: dK, dV and dQ in one pass over tiles of keys (two passes for D = 256, see Part).
//
// A persistent block holds a tile of keys, 64 rows for each of its two consumer warpgroups, and goes over the tiles of
// queries that see it. Scores are computed again, transposed: S^T = K Q^T, so that P^T and dS^T, kept in registers, are
// the A operands of dV += P^T dO and dK += dS^T Q. dS also goes through shared memory, for dQ = dS K over the keys of
// both warpgroups; dQ of a tile of queries gathers from all tiles of keys in an fp32 buffer in device memory
// (red.add of 16 bytes in register order: dq.h puts it in order, scaled and rounded, at the end).
//
// Hidden pairs get P = dS = 0, rows and columns beyond the sequence among them.
//
// With a relative bias more warps work beside the loading thread: one prepares the bias of each tile of queries (bias.h),
// up to four sum the gradients of its tables (bias_gradient.h).
#pragma once

#include "attention/backward_consumer.h"

namespace genrec::attention {

// At D = 256 the accumulators of both dK and dV don't fit the registers: one pass gives dV, another dK and dQ. That
// is one product more than the five of a single pass, at wgmma shapes that shared memory can feed.
enum class Part { kAll, kValues, kKeysAndQueries };

template <class Element_, int D_, bool kCausal_, Part kPart_, Bias kBias_>
struct BackwardShape {
  using Element = Element_;
  static constexpr int D = D_;
  static constexpr bool kCausal = kCausal_;
  static constexpr Part kPart = kPart_;
  static constexpr Bias kBias = kBias_;
  static_assert(kBias != Bias::kNone, "backward_plain.h has the kernels without a bias");
  static constexpr bool kRelative = kBias == Bias::kRelative;
  // With a relative bias from D = 128 on it serves sequences that have no place in the store of dS (backward_biased_keys.h,
  // backward_relay.h).
  static constexpr bool kLeftOver = kRelative && D >= 128;
  static constexpr bool kGivesValues = kPart != Part::kKeysAndQueries, kGivesKeys = kPart != Part::kValues;
  static constexpr int kConsumers = 2;
  static constexpr int kKeys = 128;
  static constexpr int kQueries = D <= 32 ? 128 : 64;
  static constexpr int kKeyBox = kLeftOver ? kBoxRows : kKeys;
  static constexpr int kQueryStages = D == 256 && kGivesKeys ? 1 : 2;
  static constexpr int kScoreBuffers = !kGivesKeys ? 0 : D == 256 ? 1 : 2;
  // dQ of a tile of queries: 64 rows go to both warpgroups by halves of the columns, 128 by halves of the rows.
  static constexpr bool kSplitColumns = kQueries == 64;
  static constexpr int kDqColumns = kSplitColumns ? D / 2 : D;

  using K = cute::Int<kKeys>;
  using Q = cute::Int<kQueries>;
  using Warpgroups = cute::Layout<cute::Shape<cute::_2, cute::_1, cute::_1>>;
  using ScoreMma = decltype(cute::make_tiled_mma(
      cute::GMMA::ss_op_selector<Element, Element, float, cute::Shape<K, Q, cute::Int<D>>>(), Warpgroups{}));
  using OutMma = decltype(cute::make_tiled_mma(
      cute::GMMA::rs_op_selector<Element, Element, float, cute::Shape<K, cute::Int<D>, Q>, cute::GMMA::Major::K,
                                 cute::GMMA::Major::MN>(),
      Warpgroups{}));
  using DqMma = decltype(cute::make_tiled_mma(
      cute::GMMA::ss_op_selector<Element, Element, float, cute::Shape<Q, cute::Int<kDqColumns>, K>,
                                 cute::GMMA::Major::MN, cute::GMMA::Major::MN>(),
      cute::Layout<cute::conditional_t<kSplitColumns, cute::Shape<cute::_1, cute::_2, cute::_1>,
                                       cute::Shape<cute::_2, cute::_1, cute::_1>>>{}));

  using Params = BiasedParams<BackwardParams, kBias>;
  using BiasTile = genrec::attention::BiasTile<kKeys, kQueries>;
  // Of prepared tiles. The warps that sum give them back late, so that two are few; at D = 256 there is no room for more.
  static constexpr int kBiasStages = D == 256 ? 2 : D == 128 ? 6 : 4;
  using BiasMemory = cute::conditional_t<kRelative, RelativeBiasMemory<kKeys, kQueries, kBiasStages>, NoBiasMemory>;
  // The tables' gradients come of dS in shared memory: of the pass that has it.
  static constexpr bool kSumsTables = kRelative && kGivesKeys;
  static constexpr int kGradientWarps = !kSumsTables ? 0 : D == 256 ? 2 : 4;
  static constexpr bool kSplitTables = D == 256;
  // How diagonals are summed. Measured, as a whole with other changes: additions win from D = 128 on and lose at 64.
  static constexpr bool kSumsByProducts = D <= 64;
  using Teams = GradientTeams<kGradientWarps, kSplitTables>;
  static constexpr int kTableCopies = Teams::kCopies;
  using Block = SwizzledBlock;
  using BlockTile = BiasTile;
  using BlockMemory = genrec::attention::BlockMemory;
  using Gradient = cute::conditional_t<
      kSumsTables, GradientMemory<larger(Teams::kCopies, 1), Teams::kBlocks, larger(kScoreBuffers, 1)>, NoBiasMemory>;

  // Four warps that sum have a warpgroup of their own, for which the consumers give registers. At D = 128 they can spare
  // eight (what masks spills some then; with 216 ptxas puts a wait behind every wgmma), the warps that prepare the rest.
  static constexpr bool kOwnWarpgroup = kGradientWarps == 4;
  static constexpr int kThreads = 128 * (1 + kConsumers + kOwnWarpgroup);
  static constexpr int kProducerRegisters = !kRelative || (kOwnWarpgroup && D == 128) ? 24 : 40;
  static constexpr int kGradientRegisters = !kOwnWarpgroup ? kProducerRegisters : D == 128 ? 40 : 56;
  static constexpr int kConsumerRegisters = !kRelative ? 240 : !kOwnWarpgroup ? 232 : D == 128 ? 224 : 208;
  // Whether the bias of a step is there before its scores' products, which are added to it: it is read beside the
  // products of the step before. Up to D = 64 the tables' gradients lose more by it than the scores win; at D = 256 the
  // pass for dK and dQ has no registers for it, that for dV lost.
  static constexpr bool kBiasFirst = kRelative && kPart == Part::kAll && D > 64;
  // Warps that prepare tiles, by turns.
  static constexpr int kPreparers =
      !kRelative ? 0 : kOwnWarpgroup && D == 128 ? 3 : kOwnWarpgroup || !kSumsTables ? 2 : 1;
  static_assert(1 + kPreparers + (kOwnWarpgroup ? 0 : kGradientWarps) <= 4, "more roles than warps");
  static_assert(kProducerRegisters + kConsumers * kConsumerRegisters + kOwnWarpgroup * kGradientRegisters <=
                    65536 / kThreads / 8 * 8 * (kThreads / 128), "more registers than the launch claims");

  struct Work {
    TileRecord tile;
    int head;
  };

  struct alignas(1024) Shared {
    alignas(1024) Element k[kKeys * D];
    alignas(1024) Element v[kGivesKeys ? kKeys * D : 64];
    alignas(1024) Element q[kQueryStages][kQueries * D];
    alignas(1024) Element d_out[kQueryStages][kQueries * D];
    alignas(1024) Element ds[kScoreBuffers > 0 ? kScoreBuffers : 1][kScoreBuffers > 0 ? kQueries * kKeys : 64];
    Ring<1> k_ring, v_ring;
    Ring<kQueryStages> q_ring, d_out_ring;
    Ring<2> work_ring;
    Work work[2];
    BiasMemory bias;
    cute::conditional_t<kRelative, BiasStep[kBiasStages], NoBiasMemory> steps;
    Gradient gradient;
  };
  static_assert(sizeof(Shared) <= 232448, "more shared memory than a block may have");
};

// Every unit comes off the counter; but sums of tables that repeat bit by bit need the same units in the same block, too:
// each takes every gridDim-th.
template <class Shape>
struct UnitsOfWork {
  const typename Shape::Params& p;
  const int units;

  __device__ int first() const { return from(dealt() ? static_cast<int>(blockIdx.x) : add_atomically(p.common.counter, 1)); }
  __device__ int after(int unit) const { return from(another(unit)); }

 private:
  __device__ bool dealt() const { return Shape::kRelative && p.turns != nullptr; }
  __device__ int another(int unit) const {
    return dealt() ? unit + static_cast<int>(gridDim.x) : add_atomically(p.common.counter, 1);
  }
  __device__ int from(int unit) const {
    if constexpr (Shape::kLeftOver) {
      while (unit < units && is_stored(p.store, p.list.tiles[work_unit(unit, p.common.heads).tile].sequence))
        unit = another(unit);
    }
    return unit;
  }
};

template <class Shape>
__device__ inline void backward_produce(const typename Shape::Params& p, typename Shape::Shared& shared) {
  using Element = typename Shape::Element;
  constexpr int D = Shape::D;
  Place<2> work(1);
  Place<1> keys(1);
  Place<Shape::kQueryStages> q(1);
  const int heads = p.common.heads, units = *p.list.length * heads;
  const UnitsOfWork<Shape> unit_list{p, units};
  // With ordered sums a block may wait for units taken before its own, never after.
  for (int w = unit_list.first();; work.next(), keys.next()) {
    shared.work_ring.empty[work.stage].wait(work.parity);
    if (w >= units) {
      shared.work[work.stage].tile.sequence = -1;
      shared.work_ring.full[work.stage].arrive();
      return;
    }
    const WorkUnit unit = work_unit(w, heads);
    const TileRecord tile = p.list.tiles[unit.tile];
    w = unit_list.after(w);
    shared.work[work.stage] = {tile, unit.head};
    shared.work_ring.full[work.stage].arrive();

    constexpr uint32_t kKeyBytes = kTileBytes<Element, Shape::kKeys, D>;
    constexpr uint32_t kQueryBytes = kTileBytes<Element, Shape::kQueries, D>;
    shared.k_ring.empty[0].wait(keys.parity);
    shared.k_ring.full[0].arrive_and_expect_tx(kKeyBytes);
    load_tile<Element, Shape::kKeys, D, Shape::kKeyBox>(p.k, shared.k_ring.full[0], shared.k, tile.key_start + tile.first, unit.head);
    const SequenceMask<Shape::kCausal> mask(tile.keys, tile.contexts, tile.targets, p.common.rule);
    const TileRanges ranges =
        mask.query_tiles(tile.first, tile.first + Shape::kKeys, Shape::kQueries, tile.queries);
    const int count = ranges.count();
    CUTE_NO_UNROLL
    for (int i = 0; i < count; ++i) {
      const int row = tile.query_start + ranges.tile(i) * Shape::kQueries;
      shared.q_ring.empty[q.stage].wait(q.parity);
      shared.q_ring.full[q.stage].arrive_and_expect_tx(kQueryBytes);
      load_tile<Element, Shape::kQueries, D>(p.q, shared.q_ring.full[q.stage], shared.q[q.stage], row, unit.head);
      if (Shape::kGivesKeys && i == 0) {  // after the first Q: S needs K and Q only
        shared.v_ring.empty[0].wait(keys.parity);
        shared.v_ring.full[0].arrive_and_expect_tx(kKeyBytes);
        load_tile<Element, Shape::kKeys, D, Shape::kKeyBox>(p.v, shared.v_ring.full[0], shared.v, tile.key_start + tile.first,
                                            unit.head);
      }
      shared.d_out_ring.empty[q.stage].wait(q.parity);
      shared.d_out_ring.full[q.stage].arrive_and_expect_tx(kQueryBytes);
      load_tile<Element, Shape::kQueries, D>(p.d_out, shared.d_out_ring.full[q.stage], shared.d_out[q.stage], row,
                                             unit.head);
      q.next();
    }
    // A tile that nothing sees has no V: the barrier completes without one, so that phases keep step with K's.
    if (Shape::kGivesKeys && count == 0) {
      shared.v_ring.empty[0].wait(keys.parity);
      shared.v_ring.full[0].arrive();
    }
  }
}

template <class Shape>
__global__ void __launch_bounds__(Shape::kThreads, 1) backward_kernel(const __grid_constant__ typename Shape::Params p) {
  if (Shape::kLeftOver) wait_for_kernel_before();
  if (Shape::kLeftOver && p.store.left != nullptr && *p.store.left == 0) return;
  GENREC_SHARED_MEMORY(memory);
  auto& shared = *reinterpret_cast<typename Shape::Shared*>(memory);
  if (threadIdx.x == 0) {
    constexpr int kArrivals = Shape::kConsumers * kArrivalsPerWarpgroup;
    shared.k_ring.init(kArrivals);
    shared.v_ring.init(kArrivals);
    shared.q_ring.init(kArrivals);
    shared.d_out_ring.init(kArrivals);
    shared.work_ring.init(kArrivals + Shape::kPreparers);
    constexpr int kTeam = Shape::Teams::kTeam;
    if constexpr (Shape::kRelative) shared.bias.ring.init_between_warps(kArrivals + (sums_tables<Shape>(p) ? kTeam : 0));
    if constexpr (Shape::kSumsTables) shared.gradient.ds_ring.init_between_warps(kTeam, kArrivals);
    fence_new_barriers();
    for (const CUtensorMap* map : {&p.q, &p.k, &p.v, &p.d_out}) prefetch_map(*map);
  }
  if constexpr (Shape::kRelative) fill_buckets<Shape::kThreads>(shared.bias.buckets, p.bias, bias_factor<Shape>(p.common.half_alpha));
  sync_block(Shape::kThreads);
  const int warpgroup = uniform(threadIdx.x / 128);
  if (warpgroup == 0) {
    give_registers<Shape::kProducerRegisters>();
    if (threadIdx.x == 0) backward_produce<Shape>(p, shared);
    if constexpr (Shape::kRelative) {
      const int warp = uniform(threadIdx.x / 32) - 1, summing = warp - Shape::kPreparers;
      if (warp >= 0 && summing < 0) BiasPreparer<Shape>{p, shared}.run(warp);
      if constexpr (Shape::kSumsTables && !Shape::kOwnWarpgroup) {
        if (summing >= 0 && summing < Shape::kGradientWarps && sums_tables<Shape>(p))
          BiasGradientWarp<Shape>(p, shared, summing).run();
      }
    }
  } else if (Shape::kOwnWarpgroup && warpgroup > Shape::kConsumers) {
    give_registers<Shape::kGradientRegisters>();
    if constexpr (Shape::kOwnWarpgroup) {
      if (sums_tables<Shape>(p)) BiasGradientWarp<Shape>(p, shared, uniform(threadIdx.x / 32) % 4).run();
    }
  } else {
    take_registers<Shape::kConsumerRegisters>();
    BackwardConsumer<Shape>(p, shared, warpgroup - 1).run();
  }
}

}  // namespace genrec::attention
