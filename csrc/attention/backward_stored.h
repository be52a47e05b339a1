// dQ = dS K at D = 256, with dS as the pass before left it in device memory (ds_store.h): nothing but a matrix product.
//
// A persistent block takes 192 queries, 64 for each of its three consumer warpgroups, and goes over the tiles of keys that
// they see. A cell of dS lies in memory as wgmma reads it, in blocks of 8 x 8, so that one copy brings it. The
// accumulators leave no room for more; 56 KiB a step for 1,536 cycles of products keep the L2 cache busy for longer than
// the tensor cores.
#pragma once

#include "attention/backward_pipelined.h"

namespace genrec::attention {

// (queries, keys, stages) in blocks of 8 x 8, queries contiguous, keys' blocks before queries'.
template <class Element, int kStages>
using CellLayout = decltype(cute::tile_to_shape(
    cute::GMMA::Layout_MN_INTER_Atom<Element>{},
    cute::Shape<cute::Int<kCellQueries>, cute::Int<kCellKeys>, cute::Int<kStages>>{},
    cute::Step<cute::_2, cute::_1, cute::_3>{}));

// `Parts_`: those of the pass that wrote dS.
template <class Element_, int D_, bool kCausal_, class Parts_>
struct StoredShape {
  using Element = Element_;
  static constexpr int D = D_, kQueries = kCellQueries, kKeys = kCellKeys;
  using Parts = Parts_;
  static constexpr bool kCausal = kCausal_;
  static constexpr int kConsumers = kQueries / 64, kStages = 4;
  static constexpr int kThreads = 128 * (1 + kConsumers);
  static constexpr int kProducerRegisters = 32, kConsumerRegisters = 160;
  static_assert(kProducerRegisters + kConsumers * kConsumerRegisters <= 65536 / 128, "more registers than there are");

  // Halves of the columns: a product's accumulators must be fewer than the 128 registers that 512 threads start with.
  static constexpr int kColumns = D / 2;
  using DqMma = decltype(cute::make_tiled_mma(
      cute::GMMA::ss_op_selector<Element, Element, float,
                                 cute::Shape<cute::Int<kQueries>, cute::Int<kColumns>, cute::Int<kKeys>>,
                                 cute::GMMA::Major::MN, cute::GMMA::Major::MN>(),
      cute::Layout<cute::Shape<cute::Int<kConsumers>, cute::_1, cute::_1>>{}));

  struct alignas(1024) Shared {
    alignas(1024) Element ds[kStages][kCellElements];
    alignas(1024) Element k[kStages][kKeys * D];
    Ring<kStages> ring;  // dS and K
    Ring<2> work_ring;
    PipelinedWork work[2];
  };
  static_assert(sizeof(Shared) <= 232448, "more shared memory than a block may have");
};

// Which keys a unit's queries see.
template <class Shape>
struct UnitSight {
  using Mask = SequenceMask<Shape::kCausal>;
  const Mask mask;
  const TileRanges ranges;
  const RowBand band;
  const bool whole;

  __device__ UnitSight(const Common& common, const TileRecord& tile)
      : UnitSight(Mask(tile.keys, tile.contexts, tile.targets, common.rule), tile.first + tile.keys - tile.queries) {}

  // Which parts of the cell of keys from `key` on see any of them, as bits.
  __device__ int parts(const TileRecord& tile, int key) const {
    constexpr int kCount = Shape::Parts::kCount;
    if (whole && band.all_see(key, key + Shape::kKeys)) return (1 << kCount) - 1;
    const TileRanges seeing = mask.query_tiles(key, key + Shape::kKeys, Shape::Parts::kRows, tile.queries);
    int parts = 0;
    for (int part = 0; part < kCount; ++part) {
      const int m = tile.first / Shape::Parts::kRows + part;
      parts |= (seeing.rank(m) < seeing.rank(m + 1)) << part;
    }
    return parts;
  }

 private:
  __device__ UnitSight(const Mask& of, int i0)
      : mask(of), ranges(of.key_tiles(i0, smaller(i0 + Shape::kQueries, of.keys), Shape::kKeys)),
        band(of.rows(i0, smaller(i0 + Shape::kQueries, of.keys))), whole(i0 + Shape::kQueries <= of.keys) {}
};

// dS of a cell. Parts that nothing is seen of are zeros: the pass before need not have visited them.
template <class Shape>
__device__ inline void load_parts(const BackwardParams& p, int64_t cell, int parts, FullBarrier& full,
                                  typename Shape::Element* to) {
  using Element = typename Shape::Element;
  using Parts = typename Shape::Parts;
  const Element* from = static_cast<const Element*>(p.store.data) + cell * kCellElements;
  if (parts == (1 << Parts::kCount) - 1) {
    copy_in_bulk(to, from, kCellElements * sizeof(Element), full);
    return;
  }
  for (int part = 0; part < Parts::kCount; ++part) {
    copy_in_bulk(to + part * Parts::kElements,
                 parts >> part & 1 ? from + part * Parts::kElements : static_cast<const Element*>(p.store.zeros),
                 Parts::kElements * sizeof(Element), full);
  }
}

template <class Shape>
__device__ inline void stored_produce(const BackwardParams& p, typename Shape::Shared& shared) {
  using Element = typename Shape::Element;
  constexpr int D = Shape::D, kKeys = Shape::kKeys;
  Place<2> work(1);
  Place<Shape::kStages> at(1);
  const int heads = p.common.heads, units = *p.list.length * heads;
  for (int w = add_atomically(p.common.counter, 1);; work.next()) {
    w = pick_unit<true>(p, w, units);
    shared.work_ring.empty[work.stage].wait(work.parity);
    if (w >= units) {
      shared.work[work.stage].tile.sequence = -1;
      shared.work_ring.full[work.stage].arrive();
      return;
    }
    const WorkUnit unit = work_unit(w, heads);
    const TileRecord tile = p.list.tiles[unit.tile];
    w = add_atomically(p.common.counter, 1);
    const UnitSight<Shape> sight(p.common, tile);
    const CellPlaces places(p.store, stored_sequence(tile, sight.mask), tile.sequence, unit.head, heads);
    const int count = sight.ranges.count();
    shared.work[work.stage] = {tile, unit.head, count};
    shared.work_ring.full[work.stage].arrive();
    CUTE_NO_UNROLL
    for (int n = 0; n < count; ++n, at.next()) {
      const int key = sight.ranges.tile(n) * kKeys, parts = sight.parts(tile, key);
      FullBarrier& full = shared.ring.full[at.stage];
      shared.ring.empty[at.stage].wait(at.parity);
      full.arrive_and_expect_tx(kTileBytes<Element, kKeys, D> + kCellElements * sizeof(Element));
      load_parts<Shape>(p, places.cell(tile.first / Shape::kQueries, key / kKeys), parts, full, shared.ds[at.stage]);
      load_tile<Element, kKeys, D, kBoxRows>(p.k, full, shared.k[at.stage], tile.key_start + key, unit.head);
    }
  }
}

template <class Shape>
__device__ inline void stored_consume(const BackwardParams& p, typename Shape::Shared& shared, int warpgroup) {
  using namespace cute;
  using Element = typename Shape::Element;
  constexpr int D = Shape::D, kQueries = Shape::kQueries, kKeys = Shape::kKeys, kStages = Shape::kStages;
  typename Shape::DqMma dq_mma;
  const auto slice = dq_mma.get_slice(make_layout(Int<Shape::kConsumers>{}, _128{})(warpgroup));
  const auto ds_tile = operand_a(slice, make_tensor(make_smem_ptr(shared.ds[0]), CellLayout<Element, kStages>{}));
  const auto k_columns = operand_b(slice, make_tensor(
      make_smem_ptr(shared.k[0]), TransposedLayout<Element, kKeys, D, kStages>{}));

  Place<2> work(0);
  Place<kStages> at(0), done(0);
  for (;; work.next()) {
    shared.work_ring.full[work.stage].wait(work.parity);
    const int count = shared.work[work.stage].steps;
    if (shared.work[work.stage].tile.sequence < 0) break;
    Tensor dq = partition_fragment_C(dq_mma, Extent<kQueries, D>{});
    clear(dq);
    const auto issue = [&] {
      shared.ring.full[at.stage].wait(at.parity);
      issue_product<false>(dq_mma, ds_tile(_, _, _, at.stage), k_columns(_, _, _, at.stage), dq);
      at.next();
    };
    const auto finish = [&](auto pending) {
      wait_for<decltype(pending)::value>(dq);
      release(shared.ring.empty[done.stage]);
      done.next();
    };
    if (count > 0) {
      issue();
      CUTE_NO_UNROLL
      for (int n = 1; n < count; ++n) {
        issue();
        finish(_1{});
      }
      finish(_0{});
    }
    const auto& [tile, head, steps] = shared.work[work.stage];
    const int first = tile.first + 64 * warpgroup;
    const float scale = p.common.scales ? p.common.scales[tile.sequence] : p.common.scale;
    store_rows<Element>(dq, 2.f * p.common.half_alpha * scale, p.dq, int64_t{tile.query_start} + first, head, 0,
                        tile.queries - first);
    release(shared.work_ring.empty[work.stage]);
  }
}

template <class Shape>
__global__ void __launch_bounds__(Shape::kThreads, 1) stored_kernel(const __grid_constant__ BackwardParams p) {
  GENREC_SHARED_MEMORY(memory);
  auto& shared = *reinterpret_cast<typename Shape::Shared*>(memory);
  if (threadIdx.x == 0) {
    constexpr int kArrivals = Shape::kConsumers * kArrivalsPerWarpgroup;
    shared.ring.init(kArrivals);
    shared.work_ring.init(kArrivals);
    fence_new_barriers();
    prefetch_map(p.k);
  }
  sync_block(Shape::kThreads);
  follow_kernel_before();
  const int warpgroup = uniform(threadIdx.x / 128);
  if (warpgroup == 0) {
    give_registers<Shape::kProducerRegisters>();
    if (threadIdx.x == 0) stored_produce<Shape>(p, shared);
  } else {
    take_registers<Shape::kConsumerRegisters>();
    stored_consume<Shape>(p, shared, warpgroup - 1);
  }
}

}  // namespace genrec::attention
