// dQ without a bias, by tiles of queries: a second pass behind one that gives dK and dV (backward_plain.h says where). Of
// sequences whose dS that pass has left in memory dQ is another kernel's work (backward_stored.h).
//
// It computes S and dP once more, seven products in place of five. In exchange nothing is added up in device memory: the
// fp32 reductions of dQ, one for each pair of tiles, are zeroed before, converted behind, and keep the L2 cache busy for
// longer than these products the tensor cores. dQ is also the same in every run.
//
// As in the forward pass a persistent block takes 128 queries, 64 for each of its two consumer warpgroups, and goes over
// the tiles of keys that they see. dS stays in registers, the A operand of dQ += dS K. A step's products are dQ of
// the tile before, S and dP: K is given back first, and has been loaded again when the next step asks for it.
#pragma once

#include "attention/backward_pipelined.h"

namespace genrec::attention {

// What the producer tells the consumers of a tile of keys, and so saves them the registers to find out.
struct KeyRecord {
  int first, masked;
};

template <class Element_, int D_, bool kCausal_>
struct QueryShape {
  using Element = Element_;
  static constexpr int D = D_, kQueries = 128, kKeys = 64;
  static constexpr bool kCausal = kCausal_;
  static constexpr int kConsumers = 2;
  // Shared memory decides: 227 KiB. D = 256: 2 * 64 + 3 * 32 KiB.
  static constexpr int kQueryStages = D == 256 ? 1 : 2, kKeyStages = D == 256 ? 2 : 3, kValueStages = D == 256 ? 1 : 2;
  static constexpr int kThreads = 128 * (1 + kConsumers);
  static constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;
  static constexpr bool kTurns = D < 256;  // measured: 3 % faster at 128, 8 % slower at 256

  using Warpgroups = cute::Layout<cute::Shape<cute::_2, cute::_1, cute::_1>>;
  using ScoreMma = decltype(cute::make_tiled_mma(
      cute::GMMA::ss_op_selector<Element, Element, float,
                                 cute::Shape<cute::Int<kQueries>, cute::Int<kKeys>, cute::Int<D>>>(),
      Warpgroups{}));
  using DqMma = decltype(cute::make_tiled_mma(
      cute::GMMA::rs_op_selector<Element, Element, float,
                                 cute::Shape<cute::Int<kQueries>, cute::Int<D>, cute::Int<kKeys>>,
                                 cute::GMMA::Major::K, cute::GMMA::Major::MN>(),
      Warpgroups{}));

  struct alignas(1024) Shared {
    alignas(1024) Element q[kQueryStages][kQueries * D];
    alignas(1024) Element d_out[kQueryStages][kQueries * D];
    alignas(1024) Element k[kKeyStages][kKeys * D];
    alignas(1024) Element v[kValueStages][kKeys * D];
    Ring<kQueryStages> q_ring, d_out_ring;
    Ring<kKeyStages> k_ring;
    Ring<kValueStages> v_ring;
    Ring<2> work_ring;
    PipelinedWork work[2];
    KeyRecord steps[kKeyStages];
    RowSight sights[kConsumers][64];  // what each of a warpgroup's queries sees
  };
  static_assert(sizeof(Shared) <= 232448, "more shared memory than a block may have");
  static_assert(fits_registers(kProducerRegisters, kConsumerRegisters), "more registers than the block was given");
};

// Who loads: a warp the units of work, Q and dO, one K, one V. One thread for them all would keep more than its 24
// registers hold, and wait for what it spilled before each load.
constexpr int kKeyLoaders = 2;  // those that read the units of work

// The units of work, Q and dO, in a warp's first lane.
template <class Shape>
__device__ inline void load_queries(const BackwardParams& p, typename Shape::Shared& shared) {
  using Element = typename Shape::Element;
  constexpr int D = Shape::D;
  Place<2> work(1);
  Place<Shape::kQueryStages> q(1);
  const int heads = p.common.heads, units = *p.list.length * heads;
  for (int w = add_atomically(p.common.counter, 1);; work.next(), q.next()) {
    if (p.store.first != nullptr) w = pick_unit<false>(p, w, units);
    shared.work_ring.empty[work.stage].wait(work.parity);
    if (w >= units) {
      shared.work[work.stage].tile.sequence = -1;
      shared.work_ring.full[work.stage].arrive();
      return;
    }
    const WorkUnit unit = work_unit(w, heads);
    const TileRecord tile = p.list.tiles[unit.tile];
    w = add_atomically(p.common.counter, 1);
    const SequenceMask<Shape::kCausal> mask(tile.keys, tile.contexts, tile.targets, p.common.rule);
    const int i0 = tile.first + tile.keys - tile.queries, i1 = smaller(i0 + Shape::kQueries, tile.keys);
    shared.work[work.stage] = {tile, unit.head, mask.key_tiles(i0, i1, Shape::kKeys).count()};
    shared.work_ring.full[work.stage].arrive();

    const auto load = [&](const CUtensorMap& map, auto& ring, auto& buffers) {
      ring.empty[q.stage].wait(q.parity);
      ring.full[q.stage].arrive_and_expect_tx(kTileBytes<Element, Shape::kQueries, D>);
      load_tile<Element, Shape::kQueries, D, kBoxRows>(map, ring.full[q.stage], buffers[q.stage],
                                                       tile.query_start + tile.first, unit.head);
    };
    load(p.q, shared.q_ring, shared.q);
    load(p.d_out, shared.d_out_ring, shared.d_out);
  }
}

// K with the steps' records, or V: a warp, whose first lane loads.
template <class Shape, bool kRecords, class Tiles, int kStages>
__device__ inline void load_keys(const BackwardParams& p, typename Shape::Shared& shared, const CUtensorMap& map,
                                 Tiles& buffers, Ring<kStages>& ring) {
  using Element = typename Shape::Element;
  constexpr int D = Shape::D;
  Place<2> work(0);
  Place<kStages> place(1);
  for (;; work.next()) {
    shared.work_ring.full[work.stage].wait(work.parity);
    const TileRecord tile = shared.work[work.stage].tile;
    const int head = shared.work[work.stage].head;
    release(shared.work_ring.empty[work.stage]);
    if (tile.sequence < 0) return;
    const SequenceMask<Shape::kCausal> mask(tile.keys, tile.contexts, tile.targets, p.common.rule);
    const int i0 = tile.first + tile.keys - tile.queries, i1 = smaller(i0 + Shape::kQueries, tile.keys);
    const TileRanges ranges = mask.key_tiles(i0, i1, Shape::kKeys);
    const RowBand band = mask.rows(i0, i1);
    const int count = ranges.count();
    CUTE_NO_UNROLL
    for (int n = 0; n < count; ++n, place.next()) {
      const int first = ranges.tile(n) * Shape::kKeys;
      ring.empty[place.stage].wait(place.parity);
      if (threadIdx.x % 32 == 0) {
        ring.full[place.stage].arrive_and_expect_tx(kTileBytes<Element, Shape::kKeys, D>);
        load_tile<Element, Shape::kKeys, D, kBoxRows>(map, ring.full[place.stage], buffers[place.stage],
                                                      tile.key_start + first, head);
        if constexpr (kRecords) {
          shared.steps[place.stage] = {first, !band.all_see(first, first + Shape::kKeys)};
          ring.full[place.stage].arrive();
        }
      }
    }
  }
}

template <class Shape>
__device__ inline void queries_produce(const BackwardParams& p, typename Shape::Shared& shared) {
  const int warp = uniform(threadIdx.x / 32);
  if (warp == 0) {
    if (threadIdx.x == 0) load_queries<Shape>(p, shared);
  } else if (warp == 1) {
    load_keys<Shape, true>(p, shared, p.k, shared.k, shared.k_ring);
  } else if (warp == 2) {
    load_keys<Shape, false>(p, shared, p.v, shared.v, shared.v_ring);
  }
}

// Scores become SiLU's derivatives, in place; of a masked tile, zero where the thread's rows, which see what `sights` say
// of the warpgroup's, don't see a column. `column`: the thread's first.
template <class Shape, class Scores>
__device__ inline void to_derivatives(Scores& scores, float half_alpha, bool masked, const RowSight* sights, Lane lane,
                                      int column) {
  CUTE_UNROLL
  for (int e = 0; e < cute::size(scores); ++e) scores(e) = silu_and_derivative(scores(e), half_alpha).derivative;
  if (masked) hide_unseen_columns<Shape::kCausal>(scores, sights[lane.row()], sights[lane.row() + 8], column);
}

template <class Shape>
__device__ inline void write_row_sights(const BackwardParams& p, typename Shape::Shared& shared, const TileRecord& tile,
                                        int warpgroup) {
  const int thread = threadIdx.x % 128;
  sync_threads(kTurnTaken + warpgroup, 128);  // all have read the last tile's
  if (thread < 64) {
    const SequenceMask<Shape::kCausal> mask(tile.keys, tile.contexts, tile.targets, p.common.rule);
    shared.sights[warpgroup][thread] = mask.row(tile.first + tile.keys - tile.queries + 64 * warpgroup + thread);
  }
  sync_threads(kTurnTaken + warpgroup, 128);
}

template <class Shape>
__device__ inline void queries_consume(const BackwardParams& p, typename Shape::Shared& shared, int warpgroup) {
  using namespace cute;
  using Element = typename Shape::Element;
  constexpr int D = Shape::D, kQueries = Shape::kQueries, kKeys = Shape::kKeys;
  typename Shape::ScoreMma score_mma;
  typename Shape::DqMma dq_mma;
  const auto threads = make_layout(_2{}, _128{});
  const auto score_slice = score_mma.get_slice(threads(warpgroup));
  const auto dq_slice = dq_mma.get_slice(threads(warpgroup));
  using QueryTiles = TileLayout<Element, kQueries, D, Shape::kQueryStages>;
  const auto q_tile = operand_a(score_slice, make_tensor(make_smem_ptr(shared.q[0]), QueryTiles{}));
  const auto d_out_tile = operand_a(score_slice, make_tensor(make_smem_ptr(shared.d_out[0]), QueryTiles{}));
  const auto k_tile = operand_b(score_slice, make_tensor(
      make_smem_ptr(shared.k[0]), TileLayout<Element, kKeys, D, Shape::kKeyStages>{}));
  const auto v_tile = operand_b(score_slice, make_tensor(
      make_smem_ptr(shared.v[0]), TileLayout<Element, kKeys, D, Shape::kValueStages>{}));
  const auto k_columns = operand_b(dq_slice, make_tensor(
      make_smem_ptr(shared.k[0]), TransposedLayout<Element, kKeys, D, Shape::kKeyStages>{}));

  const Lane lane;
  const Turns<Shape::kTurns ? 2 : 1> turns(warpgroup);
  Place<2> work(0);
  Place<Shape::kQueryStages> q(0);
  Place<Shape::kKeyStages> k(0), done(0);  // done: the tile whose K dQ still needs
  Place<Shape::kValueStages> v(0);
  for (;; work.next(), q.next()) {
    shared.work_ring.full[work.stage].wait(work.parity);
    const int count = shared.work[work.stage].steps;
    if (shared.work[work.stage].tile.sequence < 0) break;
    write_row_sights<Shape>(p, shared, shared.work[work.stage].tile, warpgroup);

    Tensor dq = partition_fragment_C(dq_mma, Extent<kQueries, D>{});
    clear(dq);
    auto ds = make_operand<Element, kKeys>();
    // S and dP of key tile n become dS; dQ of the tile before is issued ahead of them.
    const auto step = [&](auto has_before) {
      constexpr bool kBefore = decltype(has_before)::value;
      Tensor scores = partition_fragment_C(score_mma, Extent<kQueries, kKeys>{});
      Tensor d_weights = partition_fragment_C(score_mma, Extent<kQueries, kKeys>{});
      if (Shape::kTurns) shared.k_ring.full[k.stage].wait(k.parity);
      turns.wait();
      if constexpr (kBefore) issue_product<false>(dq_mma, ds, k_columns(_, _, _, done.stage), dq);
      if (!Shape::kTurns) shared.k_ring.full[k.stage].wait(k.parity);
      const auto [first, masked] = shared.steps[k.stage];  // now: beside products shared memory is slow
      issue_product<true>(score_mma, settled_operand(q_tile(_, _, _, q.stage)), k_tile(_, _, _, k.stage), scores);
      k.next();
      shared.v_ring.full[v.stage].wait(v.parity);
      issue_product<true>(score_mma, settled_operand(d_out_tile(_, _, _, q.stage)), v_tile(_, _, _, v.stage), d_weights);
      turns.pass();
      if constexpr (kBefore) {
        wait_for<2>(dq);
        release(shared.k_ring.empty[done.stage]);
        done.next();
      }
      wait_for<1>(scores);
      to_derivatives<Shape>(scores, p.common.half_alpha, masked, shared.sights[warpgroup], lane, first + lane.column());
      wait_for<0>(d_weights);
      release(shared.v_ring.empty[v.stage]);
      v.next();
      CUTE_UNROLL
      for (int e = 0; e < size(scores); ++e) d_weights(e) *= scores(e);
      convert<Element>(d_weights, ds);
    };
    shared.q_ring.full[q.stage].wait(q.parity);
    shared.d_out_ring.full[q.stage].wait(q.parity);
    if (count > 0) {
      step(false_type{});
      CUTE_NO_UNROLL
      for (int n = 1; n < count; ++n) step(true_type{});
      issue_product<false>(dq_mma, ds, k_columns(_, _, _, done.stage), dq);
      wait_for<0>(dq);
      release(shared.k_ring.empty[done.stage]);
      done.next();
    }
    release(shared.q_ring.empty[q.stage]);
    release(shared.d_out_ring.empty[q.stage]);
    const auto& [tile, head, steps] = shared.work[work.stage];
    const int first = tile.first + 64 * warpgroup;
    const float scale = p.common.scales ? p.common.scales[tile.sequence] : p.common.scale;
    store_rows<Element>(dq, 2.f * p.common.half_alpha * scale, p.dq, int64_t{tile.query_start} + first, head, 0,
                        tile.queries - first);
    release(shared.work_ring.empty[work.stage]);
  }
  turns.finish();
}

template <class Shape>
__global__ void __launch_bounds__(Shape::kThreads, 1) queries_kernel(const __grid_constant__ BackwardParams p) {
  if (p.store.left != nullptr && *p.store.left == 0) return;
  GENREC_SHARED_MEMORY(memory);
  auto& shared = *reinterpret_cast<typename Shape::Shared*>(memory);
  if (threadIdx.x == 0) {
    constexpr int kArrivals = Shape::kConsumers * kArrivalsPerWarpgroup;
    shared.q_ring.init(kArrivals);
    shared.d_out_ring.init(kArrivals);
    shared.k_ring.init(kArrivals, 2);  // K and its record
    shared.v_ring.init(kArrivals);
    shared.work_ring.init(kArrivals + kKeyLoaders);
    fence_new_barriers();
    for (const CUtensorMap* map : {&p.q, &p.k, &p.v, &p.d_out}) prefetch_map(*map);
  }
  sync_block(Shape::kThreads);
  const int warpgroup = uniform(threadIdx.x / 128);
  if (warpgroup == 0) {
    give_registers<Shape::kProducerRegisters>();
    queries_produce<Shape>(p, shared);
  } else {
    take_registers<Shape::kConsumerRegisters>();
    queries_consume<Shape>(p, shared, warpgroup - 1);
  }
}

}  // namespace genrec::attention
