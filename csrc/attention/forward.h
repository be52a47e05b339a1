// The forward kernel: O = (SiLU(alpha Q K^T) masked) V * scale, jagged, without softmax: no running maximum, no rescaling.
//
// Persistent blocks take tiles of queries off a list. One thread of the first warpgroup brings Q, K and V tiles by
// the copy engine, the other warpgroups compute: each holds 64 queries' rows of S and O in registers. Within a
// warpgroup the product S of the next key tile and the product P V of this one are in flight together; SiLU of the
// next runs while P V finishes. Between warpgroups turns are passed (barriers.h), so that one's SiLU runs beside
// another's products. With a relative bias the first warpgroup's other three warps prepare the bias of key tiles by
// turns (bias.h): one alone waits for memory longer than the products take. From D = 64 on that is for sequences that
// are left over: the others' bias is in memory (bias_store.h), and the copy engine brings each warpgroup's part of a tile
// to shared memory. Loads by the threads that need it took longer.
#pragma once

#include "attention/barriers.h"
#include "attention/bias.h"
#include "attention/bias_store.h"
#include "attention/mma.h"

namespace genrec::attention {

// kBiasStored_: the relative bias is in memory.
template <class Element_, int D_, bool kCausal_, Bias kBias_ = Bias::kNone, bool kBiasStored_ = false>
struct ForwardShape {
  using Element = Element_;
  static constexpr int D = D_;
  static constexpr bool kCausal = kCausal_;
  static constexpr Bias kBias = kBias_;
  static constexpr bool kBiasStored = kBiasStored_;
  static constexpr bool kRelative = kBias == Bias::kRelative && !kBiasStored;  // and is prepared here
  static constexpr bool kLeftOver = kRelative && D >= 64;  // serves sequences that have no place in a store
  // Registers decide: S and O take N / 2 and D / 2 of a thread's 232 (two consumers) or 160 (three). At D = 64 both would fit;
  // three are slower.
  static constexpr int kConsumers = D <= 32 ? 3 : 2;
  static constexpr int kQueries = 64 * kConsumers;
  static constexpr int kKeys = D == 256 ? 64 : 128;
  static constexpr int kBiasWarps = kRelative ? 3 : 0;
  static constexpr bool kBiasAhead = D > 64;  // registers left for the bias before the scores are there
  // When a warpgroup gives its turn to the next: when its products are issued; at D = 64, where SiLU takes longer than they do,
  // when kSooner of a thread's weights are there as well. Else both compute SiLU, then both wait for products.
  static constexpr bool kPassesLate = D == 64 && (kBias == Bias::kNone || kBiasStored);
  static constexpr int kSooner = !kPassesLate ? kKeys / 2 : kBiasStored ? 32 : 16;
  static constexpr int kFewTiles = 4;  // of keys, for which turns are not given late: beginning so takes time
  // Shared memory decides: 227 KiB. D = 256: 64 + 4 * 32 KiB.
  static constexpr int kQueryStages = D == 256 ? 1 : 2;
  static constexpr int kKeyStages = D <= 64 ? 4 : 2;
  static constexpr int kThreads = 128 * (1 + kConsumers);
  static constexpr int kProducerRegisters = kConsumers == 3 ? 32 : 40;
  static constexpr int kConsumerRegisters = kConsumers == 3 ? 160 : 232;

  using Warpgroups = cute::Layout<cute::Shape<cute::Int<kConsumers>, cute::_1, cute::_1>>;
  using ScoreMma = decltype(cute::make_tiled_mma(
      cute::GMMA::ss_op_selector<Element, Element, float,
                                 cute::Shape<cute::Int<kQueries>, cute::Int<kKeys>, cute::Int<D>>>(),
      Warpgroups{}));
  using OutMma = decltype(cute::make_tiled_mma(
      cute::GMMA::rs_op_selector<Element, Element, float,
                                 cute::Shape<cute::Int<kQueries>, cute::Int<D>, cute::Int<kKeys>>,
                                 cute::GMMA::Major::K, cute::GMMA::Major::MN>(),
      Warpgroups{}));

  using Params = cute::conditional_t<kBias == Bias::kNone, ForwardParams, BiasedParams<ForwardParams, kBias>>;
  using BiasMemory = cute::conditional_t<kRelative, RelativeBiasMemory<kQueries, kKeys, kBiasWarps, true>, NoBiasMemory>;

  // Of a bias in memory, each warpgroup's part of a tile.
  struct StoredBiasMemory {
    alignas(128) uint4 tiles[kConsumers][kKeys / kCellKeys * kBiasPartBytes / 16];
    Ring<1> rings[kConsumers];
  };

  struct Work {
    TileRecord tile;
    int head;
  };

  struct alignas(1024) Shared {
    alignas(1024) Element q[kQueryStages][kQueries * D];
    alignas(1024) Element k[kKeyStages][kKeys * D];
    alignas(1024) Element v[kKeyStages][kKeys * D];
    Ring<kQueryStages> q_ring;
    Ring<kKeyStages> k_ring, v_ring;
    Ring<2> work_ring;
    Work work[2];
    BiasMemory bias;
    cute::conditional_t<kBiasStored, StoredBiasMemory, NoBiasMemory> stored_bias;
  };
  static_assert(sizeof(Shared) <= 232448, "more shared memory than a block may have");
};

// The tiles of keys that a tile of queries needs; both roles ask, and must agree.
template <class Shape>
__device__ inline TileRanges forward_key_tiles(const SequenceMask<Shape::kCausal>& mask, const TileRecord& tile) {
  const int i0 = tile.first + tile.keys - tile.queries;
  return mask.key_tiles(i0, smaller(i0 + Shape::kQueries, tile.keys), Shape::kKeys);
}

// The first unit from w on, of those that the block takes, whose sequence is the kernel's.
template <class Shape>
__device__ inline int pick_forward_unit(const typename Shape::Params& p, int w, int units) {
  if constexpr (Shape::kLeftOver || Shape::kBiasStored) {
    while (w < units &&
           is_stored(p.bias.store, p.list.tiles[work_unit(w, p.common.heads).tile].sequence) != Shape::kBiasStored)
      w = add_atomically(p.common.counter, 1) + static_cast<int>(gridDim.x);
  }
  return w;
}

template <class Shape>
__device__ inline void forward_produce(const typename Shape::Params& p, typename Shape::Shared& shared) {
  using Element = typename Shape::Element;
  constexpr int D = Shape::D;
  Place<2> work(1);
  Place<Shape::kQueryStages> q(1);
  Place<Shape::kKeyStages> k(1), v(1);
  const int heads = p.common.heads, units = *p.list.length * heads;
  for (int w = blockIdx.x;; work.next()) {
    w = pick_forward_unit<Shape>(p, w, units);
    shared.work_ring.empty[work.stage].wait(work.parity);
    if (w >= units) {
      shared.work[work.stage].tile.sequence = -1;
      shared.work_ring.full[work.stage].arrive();
      return;
    }
    const WorkUnit unit = work_unit(w, heads);
    const TileRecord tile = p.list.tiles[unit.tile];
    const int following = add_atomically(p.common.counter, 1) + static_cast<int>(gridDim.x);  // used only after the loads below
    shared.work[work.stage].tile = tile, shared.work[work.stage].head = unit.head;
    const SequenceMask<Shape::kCausal> mask(tile.keys, tile.contexts, tile.targets, p.common.rule);
    const TileRanges ranges = forward_key_tiles<Shape>(mask, tile);
    shared.work_ring.full[work.stage].arrive();

    const auto load_keys = [&](int n) {
      shared.k_ring.empty[k.stage].wait(k.parity);
      shared.k_ring.full[k.stage].arrive_and_expect_tx(kTileBytes<Element, Shape::kKeys, D>);
      load_tile<Element, Shape::kKeys, D>(p.k, shared.k_ring.full[k.stage], shared.k[k.stage],
                                          tile.key_start + n * Shape::kKeys, unit.head);
      k.next();
    };
    const auto load_values = [&](int n) {
      shared.v_ring.empty[v.stage].wait(v.parity);
      shared.v_ring.full[v.stage].arrive_and_expect_tx(kTileBytes<Element, Shape::kKeys, D>);
      load_tile<Element, Shape::kKeys, D>(p.v, shared.v_ring.full[v.stage], shared.v[v.stage],
                                          tile.key_start + n * Shape::kKeys, unit.head);
      v.next();
    };
    // In the order in which buffers are given back: K0 Q K1 V0 K2 V1 ... Any other would let one load wait for a buffer
    // that only a later one's consumer gives back.
    const int count = ranges.count();
    if (count > 0) load_keys(ranges.tile(0));
    shared.q_ring.empty[q.stage].wait(q.parity);
    shared.q_ring.full[q.stage].arrive_and_expect_tx(kTileBytes<Element, Shape::kQueries, D>);
    load_tile<Element, Shape::kQueries, D>(p.q, shared.q_ring.full[q.stage], shared.q[q.stage],
                                           tile.query_start + tile.first, unit.head);
    q.next();
    CUTE_NO_UNROLL
    for (int n = 1; n < count; ++n) {
      load_keys(ranges.tile(n));
      load_values(ranges.tile(n - 1));
    }
    if (count > 0) load_values(ranges.tile(count - 1));
    w = following;
  }
}

// The thread that brings the parts of a bias in memory.
template <class Shape>
__device__ inline void forward_load_bias(const typename Shape::Params& p, typename Shape::Shared& shared) {
  constexpr int kParts = Shape::kKeys / kCellKeys;
  Place<2> work(0);
  Place<1> at(1);
  for (;; work.next()) {
    shared.work_ring.full[work.stage].wait(work.parity);
    keep_accesses();
    const TileRecord tile = shared.work[work.stage].tile;
    arrive_as_warp(shared.work_ring.empty[work.stage]);
    if (tile.sequence < 0) return;
    const SequenceMask<Shape::kCausal> mask(tile.keys, tile.contexts, tile.targets, p.common.rule);
    const TileRanges ranges = forward_key_tiles<Shape>(mask, tile);
    StoredBiasRow rows[Shape::kConsumers];
    CUTE_UNROLL
    for (int c = 0; c < Shape::kConsumers; ++c) rows[c] = StoredBiasRow(p.bias.store, tile, mask, tile.first / 64 + c);
    const int count = ranges.count();
    CUTE_NO_UNROLL
    for (int n = 0; n < count; ++n, at.next()) {
      CUTE_UNROLL
      for (int c = 0; c < Shape::kConsumers; ++c) {
        Ring<1>& ring = shared.stored_bias.rings[c];
        ring.empty[0].wait(at.parity);
        ring.full[0].arrive_and_expect_tx(kParts * kBiasPartBytes);
        for (int m = 0; m < kParts; ++m)
          copy_in_bulk<false>(shared.stored_bias.tiles[c] + m * (kBiasPartBytes / 16),
                              rows[c].part(ranges.tile(n) * kParts + m), kBiasPartBytes, ring.full[0]);
      }
    }
  }
}

// One of the warps that prepare the bias of key tiles. Tiles are dealt out in the order in which they are consumed, those
// of all units of work in one sequence: warp n has every kBiasWarps-th, and stage n of the ring to itself.
template <class Shape>
__device__ inline void forward_prepare_bias(const typename Shape::Params& p, typename Shape::Shared& shared, int warp) {
  constexpr int kWarps = Shape::kBiasWarps;
  auto& bias_tile = shared.bias.tiles[warp];
  Place<2> work(0);
  Place<1> turn(1);
  int next = warp;  // of the unit's tiles
  for (;; work.next()) {
    shared.work_ring.full[work.stage].wait(work.parity);
    const TileRecord tile = shared.work[work.stage].tile;
    release(shared.work_ring.empty[work.stage]);
    if (tile.sequence < 0) return;
    const SequenceMask<Shape::kCausal> mask(tile.keys, tile.contexts, tile.targets, p.common.rule);
    const TileRanges ranges = forward_key_tiles<Shape>(mask, tile);
    const int count = ranges.count();
    if (next < count) {
      BiasWriter<true, Shape::kQueries, Shape::kKeys> writer(p.bias, shared.bias.buckets, tile, 0.5f);
      if (p.common.rule.causal) writer.looks_back = mask.contexts;
      CUTE_NO_UNROLL
      for (; next < count; next += kWarps, turn.next()) {
        const int first_key = ranges.tile(next) * Shape::kKeys;
        writer.fetch(first_key);
        shared.bias.ring.empty[warp].wait(turn.parity);
        writer.put(bias_tile, first_key);
        release(shared.bias.ring.full[warp]);
      }
    }
    next -= count;
  }
}

// Of a thread's scores those from kFrom to before kTo, h (bias.h) already, become weights.
template <int kFrom, int kTo, class Scores>
__device__ inline void weigh(Scores& scores) {
  CUTE_UNROLL
  for (int e = kFrom; e < kTo; ++e) scores(e) = silu_of_half(scores(e));
}

template <class Shape>
__device__ inline void forward_consume(const typename Shape::Params& p, typename Shape::Shared& shared, int warpgroup) {
  using namespace cute;
  using Element = typename Shape::Element;
  using Work = typename Shape::Work;
  constexpr int D = Shape::D;
  typename Shape::ScoreMma score_mma;
  typename Shape::OutMma out_mma;
  const auto threads = make_layout(Int<Shape::kConsumers>{}, Int<128>{});
  const auto score_slice = score_mma.get_slice(threads(warpgroup));
  const auto out_slice = out_mma.get_slice(threads(warpgroup));
  const auto q_tile = operand_a(score_slice, make_tensor(
      make_smem_ptr(shared.q[0]), TileLayout<Element, Shape::kQueries, D, Shape::kQueryStages>{}));
  const auto k_tile = operand_b(score_slice, make_tensor(
      make_smem_ptr(shared.k[0]), TileLayout<Element, Shape::kKeys, D, Shape::kKeyStages>{}));
  const auto v_tile = operand_b(out_slice, make_tensor(
      make_smem_ptr(shared.v[0]), TransposedLayout<Element, Shape::kKeys, D, Shape::kKeyStages>{}));

  const Lane lane;
  const Turns<Shape::kConsumers> turns(warpgroup);
  Place<2> work(0);
  Place<Shape::kQueryStages> q(0);
  Place<Shape::kKeyStages> k(0), v(0);
  Place<larger(Shape::kBiasWarps, 1)> bias(0);  // or of the part of a stored one
  for (;; work.next(), q.next()) {
    shared.work_ring.full[work.stage].wait(work.parity);
    const TileRecord tile = shared.work[work.stage].tile;
    // With a relative bias it is kept until the unit is done: what is rarely asked for is read again, for want of registers.
    conditional_t<Shape::kRelative, const Work&, const Work> unit = shared.work[work.stage];
    const auto release_unit = [&] { release(shared.work_ring.empty[work.stage]); };
    if (!Shape::kRelative) release_unit();
    if (tile.sequence < 0) break;

    const SequenceMask<Shape::kCausal> mask(tile.keys, tile.contexts, tile.targets, p.common.rule);
    const TileRanges ranges = forward_key_tiles<Shape>(mask, tile);
    const int count = ranges.count(), i0 = tile.first + tile.keys - tile.queries;
    const int i1 = smaller(i0 + Shape::kQueries, tile.keys), row = i0 + 64 * warpgroup + lane.row();
    const RowSight low = mask.row(row), high = mask.row(row + 8);
    const RowBand band = mask.rows(i0, i1);
    const int fixed_row = 64 * warpgroup + lane.row();
    const auto query_time = [&](int down) {
      if constexpr (Shape::kRelative) return TileTimes<true>(p.bias, unit.tile).fixed(unit.tile.first + fixed_row + down);
    };
    uint32_t times[2] = {0, 0};  // lowest digits, of the thread's two rows
    if constexpr (Shape::kRelative) {
      for (int half = 0; half < 2 && p.bias.time != nullptr; ++half)
        times[half] = static_cast<uint32_t>(query_time(8 * half));
    }
    BiasValues<Shape::kKeys / 2, Shape::kBiasAhead> values;
    StoredBias<Shape::kBiasStored ? Shape::kKeys : 0> stored;
    // Before the products are issued: loads behind them would wait until the tensor cores take those up.
    const auto read_stored_bias = [&] {
      if constexpr (Shape::kBiasStored) {
        shared.stored_bias.rings[warpgroup].full[0].wait(bias.parity);
        keep_accesses();
        stored.read(shared.stored_bias.tiles[warpgroup], lane);
        release_read(shared.stored_bias.rings[warpgroup].empty[0], stored.some_bits());
        bias.next();
      }
    };
    const auto read_bias = [&] {  // beside the products that give the scores
      if constexpr (Shape::kRelative) {
        shared.bias.ring.full[bias.stage].wait(bias.parity);
        values.read(shared.bias.tiles[bias.stage], fixed_row, lane.column());
      }
    };
    const bool passes_late = Shape::kPassesLate && count > Shape::kFewTiles;
    // Of the n-th tile, to `weights`; `finish_last` has the products that read those of the tile before finished.
    const auto to_weights = [&](auto& scores, int n, auto& weights, auto finish_last) {
      constexpr int kScores = Shape::kKeys / 2;
      const int j0 = ranges.tile(n) * Shape::kKeys;
      if constexpr (Shape::kRelative) {
        add_bias_by_parts(scores, p.common.half_alpha, values, shared.bias.tiles[bias.stage], shared.bias.buckets,
                          fixed_row, lane.column(), times[0], times[1], query_time,
                          [&](int column) { return TileTimes<true>(p.bias, unit.tile).streamed(j0 + column); });
        release(shared.bias.ring.empty[bias.stage]);
        bias.next();
      } else if constexpr (Shape::kBiasStored) {
        stored.add_to(scores, p.common.half_alpha);
      } else if constexpr (Shape::kBias == Bias::kDense) {
        add_dense_bias<true>(scores, p.common.half_alpha, p.bias, tile.sequence, unit.head,
                             tile.first + 64 * warpgroup + lane.row(), j0 + lane.column(), tile.queries, tile.keys);
      } else {
        CUTE_UNROLL
        for (int e = 0; e < kScores; ++e) scores(e) *= p.common.half_alpha;
      }
      weigh<0, Shape::kSooner>(scores);
      if (!band.all_see(j0, j0 + Shape::kKeys))  // what is no weight yet becomes one of zero
        hide_unseen_columns<Shape::kCausal>(scores, low, high, j0 + lane.column());
      if (passes_late) turns.pass();
      finish_last();
      weigh<Shape::kSooner, kScores>(scores);
      convert<Element>(scores, weights);
    };

    Tensor out = partition_fragment_C(out_mma, Extent<Shape::kQueries, D>{});
    clear(out);
    shared.q_ring.full[q.stage].wait(q.parity);
    if (count > 0) {
      auto weights = make_operand<Element, Shape::kKeys>();
      {
        Tensor scores = partition_fragment_C(score_mma, Extent<Shape::kQueries, Shape::kKeys>{});
        shared.k_ring.full[k.stage].wait(k.parity);
        read_stored_bias();
        turns.wait();
        issue_product<true>(score_mma, q_tile(_, _, _, q.stage), k_tile(_, _, _, k.stage), scores);
        if (!passes_late) turns.pass();
        read_bias();
        wait_for<0>(scores);
        release(shared.k_ring.empty[k.stage]);
        k.next();
        to_weights(scores, 0, weights, [] {});
      }
      CUTE_NO_UNROLL
      for (int n = 1; n < count; ++n) {
        Tensor scores = partition_fragment_C(score_mma, Extent<Shape::kQueries, Shape::kKeys>{});
        shared.k_ring.full[k.stage].wait(k.parity);
        read_stored_bias();
        turns.wait();
        issue_product<true>(score_mma, q_tile(_, _, _, q.stage), k_tile(_, _, _, k.stage), scores);
        shared.v_ring.full[v.stage].wait(v.parity);
        issue_product<false>(out_mma, weights, v_tile(_, _, _, v.stage), out);
        if (!passes_late) turns.pass();
        read_bias();
        wait_for<1>(scores);
        release(shared.k_ring.empty[k.stage]);
        k.next();
        to_weights(scores, n, weights, [&] {
          wait_for<0>(out);
          release(shared.v_ring.empty[v.stage]);
          v.next();
        });
      }
      release(shared.q_ring.empty[q.stage]);
      shared.v_ring.full[v.stage].wait(v.parity);
      issue_product<false>(out_mma, weights, v_tile(_, _, _, v.stage), out);
      wait_for<0>(out);
      release(shared.v_ring.empty[v.stage]);
      v.next();
    } else {
      release(shared.q_ring.empty[q.stage]);
    }
    const TileRecord done = unit.tile;
    const int first = done.first + 64 * warpgroup, head = unit.head;
    if (Shape::kRelative) release_unit();
    const float scale = p.common.scales ? p.common.scales[done.sequence] : p.common.scale;
    store_rows<Element>(out, scale, p.out, int64_t{done.query_start} + first, head, 0, done.queries - first);
  }
  turns.finish();
}

template <class Shape>
__global__ void __launch_bounds__(Shape::kThreads, 1) forward_kernel(const __grid_constant__ typename Shape::Params p) {
  if constexpr (Shape::kLeftOver) {
    wait_for_kernel_before();
    if (p.bias.store.left != nullptr && *p.bias.store.left == 0) return;
  }
  GENREC_SHARED_MEMORY(memory);
  auto& shared = *reinterpret_cast<typename Shape::Shared*>(memory);
  constexpr int kReaders = Shape::kConsumers * kArrivalsPerWarpgroup;
  if (threadIdx.x == 0) {
    shared.q_ring.init(kReaders);
    shared.k_ring.init(kReaders);
    shared.v_ring.init(kReaders);
    shared.work_ring.init(kReaders + Shape::kBiasWarps + Shape::kBiasStored);
    if constexpr (Shape::kRelative) shared.bias.ring.init_between_warps(kReaders);
    if constexpr (Shape::kBiasStored) {
      for (Ring<1>& ring : shared.stored_bias.rings) ring.init(kArrivalsPerWarpgroup);
    }
    fence_new_barriers();
    for (const CUtensorMap* map : {&p.q, &p.k, &p.v}) prefetch_map(*map);
  }
  if constexpr (Shape::kRelative) fill_buckets<Shape::kThreads>(shared.bias.buckets, p.bias, 0.5f);
  sync_block(Shape::kThreads);
  if constexpr (Shape::kBiasStored) follow_kernel_before();
  const int warpgroup = uniform(threadIdx.x / 128);
  if (warpgroup == 0) {
    give_registers<Shape::kProducerRegisters>();
    if (threadIdx.x == 0) forward_produce<Shape>(p, shared);
    if constexpr (Shape::kBiasStored) {
      if (threadIdx.x == 32) forward_load_bias<Shape>(p, shared);
    }
    if constexpr (Shape::kRelative) {
      const int warp = uniform(threadIdx.x / 32);
      if (warp > 0) forward_prepare_bias<Shape>(p, shared, warp - 1);
    }
  } else {
    take_registers<Shape::kConsumerRegisters>();
    forward_consume<Shape>(p, shared, warpgroup - 1);
  }
}

}  // namespace genrec::attention
