// What the backward kernels over tiles of keys without a bias share: shapes, the loading warps, the loop over units of work.
//
// The work is that of backward.h. The consumers differ (backward_gather.h, backward_keys.h, backward_relay.h); all keep
// products queued for the tensor cores, across steps too.
#pragma once

#include "attention/backward_steps.h"

namespace genrec::attention {

// A block of three warpgroups starts with 168 registers a thread; setmaxnreg only moves them between warpgroups, and
// waits for ever for what isn't there.
constexpr bool fits_registers(int producer, int consumer) { return producer + 2 * consumer <= 3 * 168; }

// What gathering dQ needs of shared memory.
template <class Element, int kDs, int kDq, int kStages>
struct GatherMemory {
  alignas(1024) Element ds[kStages][kDs];
  alignas(1024) float dq[kDq];
};
struct NoGatherMemory {};

// Shared memory of a kernel's block.
template <class Element, int D, int kKeys, int kQueries, int kKeyStages, int kValueStages, int kQueryStages,
          bool kGathers>
struct alignas(1024) PipelinedShared {
  alignas(1024) Element k[kKeyStages][kKeys * D];
  alignas(1024) Element v[kValueStages][kKeys * D];
  alignas(1024) Element q[kQueryStages][kQueries * D];
  alignas(1024) Element d_out[kQueryStages][kQueries * D];
  using Gather = GatherMemory<Element, kQueries * kKeys, kQueries * D, kQueryStages>;
  cute::conditional_t<kGathers, Gather, NoGatherMemory> gather;
  Ring<kKeyStages> k_ring;
  Ring<kValueStages> v_ring;
  Ring<kQueryStages> q_ring, d_out_ring;
  Ring<kQueryStages> ds_ring;  // full: both warpgroups have written theirs; empty: both have read it
  Ring<2> work_ring;
  PipelinedWork work[2];
  StepRecord steps[2 * kQueryStages];  // record_place says where
  ColumnSight sights[2][64];  // who sees each of a warpgroup's keys

  __device__ void init_more(int consumers) { ds_ring.init_between_warps(consumers, consumers); }
};

// D up to 128: 64 keys for each warpgroup, as in backward.h. Up to 64, 128 queries a step: half the shared memory's
// traffic for each product. At 64 SiLU' is kept in fp16 to make room in the registers (it lies between -0.1 and 1.1; bf16
// would lose eight times as much).
template <class Element_, int D_, bool kCausal_, bool kGathers_>
struct PipelinedShape {
  using Element = Element_;
  static constexpr bool kGathers = kGathers_;  // dQ (backward_gather.h); else that is another kernel's work
  static constexpr bool kStores = false;       // dS for that kernel (ds_store.h)
  static constexpr bool kStoredOnly = false;   // of sequences that have no place there nothing is computed
  static constexpr bool kReadsBias = false;    // of memory (BiasStore)
  using Params = BackwardParams;
  static constexpr int kQueryBox = kGathers ? (D_ <= 64 ? 128 : 64) : kBoxRows, kKeyBox = kGathers ? 128 : kBoxRows;
  static constexpr int D = D_, kKeys = 128, kQueries = D <= 64 ? 128 : 64;
  static constexpr bool kCausal = kCausal_, kPacked = D == 64;
  static constexpr int kConsumers = 2, kKeyReaders = 2, kKeyStages = 2;
  // Shared memory decides: 227 KiB.
  static constexpr int kValueStages = D == 128 && kGathers ? 1 : 2, kQueryStages = D == 128 && !kGathers ? 3 : 2;
  static constexpr int kThreads = 128 * (1 + kConsumers);
  static constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;
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

  using Shared = PipelinedShared<Element, D, kKeys, kQueries, kKeyStages, kValueStages, kQueryStages, kGathers>;
  static_assert(sizeof(Shared) <= 232448, "more shared memory than a block may have");
  static_assert(fits_registers(kProducerRegisters, kConsumerRegisters), "more registers than the block was given");

  static __device__ int first_key(int warpgroup) { return 64 * warpgroup; }
};

// The warps that load: one K, V and the units of work; one Q, with the steps' records; one dO, where dQ isn't gathered,
// else the second both; one the records where they say more. One thread for them all would keep more than its 24
// registers hold, and wait for what it spilled before each load.
enum class Loader : int { kKeys, kQueries, kGradients, kRecords };
template <class Shape>
constexpr int kStreamLoaders = Shape::kGathers ? 1 : Shape::kStores ? 3 : 2;  // those that read the units of work

// K and V, in a warp's first lane.
template <class Shape>
__device__ inline void load_key_tiles(const BackwardParams& p, typename Shape::Shared& shared) {
  using Element = typename Shape::Element;
  constexpr int D = Shape::D, kKeys = Shape::kKeys, kQueries = Shape::kQueries;
  constexpr uint32_t kKeyBytes = kTileBytes<Element, kKeys, D>;
  Place<2> work(1);
  Place<Shape::kKeyStages> keys(1);
  Place<Shape::kValueStages> values(1);
  const int heads = p.common.heads, units = *p.list.length * heads;
  for (int w = add_atomically(p.common.counter, 1);; work.next(), keys.next(), values.next()) {
    if constexpr (Shape::kStoredOnly) w = pick_unit<true>(p, w, units);
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
    const int count = mask.query_tiles(tile.first, tile.first + kKeys, kQueries, tile.queries).count();
    shared.work[work.stage] = {tile, unit.head, count};
    shared.work_ring.full[work.stage].arrive();

    const auto load = [&](const CUtensorMap& map, auto& ring, auto& buffers, const auto& place) {
      ring.empty[place.stage].wait(place.parity);
      ring.full[place.stage].arrive_and_expect_tx(kKeyBytes);
      load_tile<Element, kKeys, D, Shape::kKeyBox>(map, ring.full[place.stage], buffers[place.stage],
                                                   tile.key_start + tile.first, unit.head);
    };
    load(p.k, shared.k_ring, shared.k, keys);
    if (count > 0) {
      load(p.v, shared.v_ring, shared.v, values);
    } else {  // nothing sees the tile, it has no V: the barrier completes without one, so that phases keep step with K's
      shared.v_ring.empty[values.stage].wait(values.parity);
      shared.v_ring.full[values.stage].arrive();
    }
  }
}

// What a step's threads will read of the bias, into the L2 cache. Four heads read it at about the same time, and the first
// would wait for the device's memory for as long as a step takes.
template <class Shape>
__device__ inline void prefetch_bias(const typename Shape::Params& p, const CellPlaces& places, int64_t heads_before,
                                     const TileRecord& tile, int m) {
  using Parts = typename Shape::Parts;
  constexpr int kBytes = Parts::kElements * 2;
  CUTE_UNROLL
  for (int column = 0; column < Shape::kKeys / kCellKeys; ++column) {
    const int64_t part = places.part<Parts>(m, tile.first / kCellKeys + column);
    if (part >= 0) prefetch_to_l2(static_cast<const char*>(p.bias.data) + (part - heads_before) * kBytes, kBytes);
  }
}

// Q, the steps' records, dO: a warp, whose first lane loads.
template <class Shape, bool kLoadsQ, bool kWritesRecords, bool kLoadsDOut>
__device__ inline void load_query_tiles(const typename Shape::Params& p, typename Shape::Shared& shared) {
  using Element = typename Shape::Element;
  constexpr int D = Shape::D, kKeys = Shape::kKeys, kQueries = Shape::kQueries;
  Place<2> work(0);
  Place<Shape::kQueryStages> q(1);
  const bool loads = threadIdx.x % 32 == 0;
  for (;; work.next()) {
    shared.work_ring.full[work.stage].wait(work.parity);
    const TileRecord tile = shared.work[work.stage].tile;
    const int head = shared.work[work.stage].head;
    release(shared.work_ring.empty[work.stage]);
    if (tile.sequence < 0) return;
    const SequenceMask<Shape::kCausal> mask(tile.keys, tile.contexts, tile.targets, p.common.rule);
    const TileRanges ranges = mask.query_tiles(tile.first, tile.first + kKeys, kQueries, tile.queries);
    const int count = ranges.count();
    const ColumnBand band = mask.columns(tile.first, tile.first + kKeys);
    const auto places = step_places<Shape>(p, tile, mask, head);
    int64_t heads_before = 0;
    if constexpr (Shape::kReadsBias && kWritesRecords) heads_before = parts_of_heads<Shape>(p, places, tile);
    const auto load = [&](const CUtensorMap& map, auto& ring, auto& buffers, int m) {
      ring.full[q.stage].arrive_and_expect_tx(kTileBytes<Element, kQueries, D>);
      load_tile<Element, kQueries, D, Shape::kQueryBox>(map, ring.full[q.stage], buffers[q.stage],
                                                        tile.query_start + m * kQueries, head);
    };
    CUTE_NO_UNROLL
    for (int i = 0; i < count; ++i, q.next()) {
      const int m = ranges.tile(i);
      if constexpr (Shape::kReadsBias && kWritesRecords) {
        constexpr int kAhead = 3;
        for (int n = i == 0 ? 0 : i + kAhead; loads && n <= i + kAhead && n < count; ++n)
          prefetch_bias<Shape>(p, places, heads_before, tile, ranges.tile(n));
      }
      if constexpr (kLoadsQ || kWritesRecords) shared.q_ring.empty[q.stage].wait(q.parity);
      if constexpr (kLoadsQ) {
        if (loads) load(p.q, shared.q_ring, shared.q, m);
      }
      if constexpr (kWritesRecords) {
        if (loads) {
          const int next_m = ranges.tile(smaller(i + 1, count - 1));
          shared.steps[record_place(q, true)] =
              step_record<Shape>(p, tile, mask, band, places, heads_before, m, next_m);
          shared.q_ring.full[q.stage].arrive();
        }
      }
      if constexpr (kLoadsDOut) {
        shared.d_out_ring.empty[q.stage].wait(q.parity);
        if (loads) load(p.d_out, shared.d_out_ring, shared.d_out, m);
      }
    }
  }
}

template <class Shape>
__device__ inline void pipelined_produce(const typename Shape::Params& p, typename Shape::Shared& shared) {
  const auto loader = static_cast<Loader>(uniform(threadIdx.x / 32));
  if (loader == Loader::kKeys) {
    if (threadIdx.x == 0) load_key_tiles<Shape>(p, shared);
  } else if (loader == Loader::kQueries) {
    load_query_tiles<Shape, true, !Shape::kStores, Shape::kGathers>(p, shared);
  } else if (loader == Loader::kGradients && !Shape::kGathers) {
    load_query_tiles<Shape, false, false, true>(p, shared);
  } else if (loader == Loader::kRecords && Shape::kStores) {
    load_query_tiles<Shape, false, true, false>(p, shared);
  }
}

// What all consumers share: the loop over units of work.
template <class Shape, class Self>
struct PipelinedLoop {
  using Element = typename Shape::Element;
  using Shared = typename Shape::Shared;
  static constexpr int D = Shape::D, kQueries = Shape::kQueries, kKeys = Shape::kKeys;

  const typename Shape::Params& p;
  Shared& shared;
  const int warpgroup;
  const Lane lane;
  const int thread = settled(threadIdx.x % 128);
  Place<2> work{0};
  Place<Shape::kKeyStages> keys{0};
  Place<Shape::kValueStages> values{0};
  Place<Shape::kQueryStages> q{0};

  __device__ PipelinedLoop(const typename Shape::Params& params, Shared& memory, int group)
      : p(params), shared(memory), warpgroup(group) {}

  __device__ void run() {
    for (;; work.next(), keys.next(), values.next()) {
      shared.work_ring.full[work.stage].wait(work.parity);
      const int count = shared.work[work.stage].steps;
      if (shared.work[work.stage].tile.sequence < 0) break;
      static_cast<Self*>(this)->one_tile(count);
      release(shared.work_ring.empty[work.stage]);
    }
    if (Shape::kGathers && lane.lane == 0) wait_for_bulk_sums();
  }

 protected:
  // Who sees each of this warpgroup's keys.
  __device__ void write_sights() {
    const TileRecord& tile = shared.work[work.stage].tile;
    sync_threads(kTurnTaken + warpgroup, 128);  // all have read the last tile's
    if (thread < 64) {
      const SequenceMask<Shape::kCausal> mask(tile.keys, tile.contexts, tile.targets, p.common.rule);
      shared.sights[warpgroup][thread] = mask.column(tile.first + Shape::first_key(warpgroup) + thread);
    }
    sync_threads(kTurnTaken + warpgroup, 128);
  }

  template <class Mma>
  __device__ auto slice(Mma const& mma) const {
    return mma.get_slice(cute::make_layout(cute::_2{}, cute::_128{})(warpgroup));
  }

  __device__ auto staged_queries(Element* data) const {
    return cute::make_tensor(cute::make_smem_ptr(data), TileLayout<Element, kQueries, D, Shape::kQueryStages>{});
  }

  __device__ auto staged_queries_transposed(Element* data) const {
    return cute::make_tensor(cute::make_smem_ptr(data),
                             TransposedLayout<Element, kQueries, D, Shape::kQueryStages>{});
  }

  template <int kStages>
  __device__ auto staged_keys(Element (&data)[kStages][kKeys * D]) const {
    return cute::make_tensor(cute::make_smem_ptr(data[0]), TileLayout<Element, kKeys, D, kStages>{});
  }

  __device__ auto staged_keys_transposed(Element* data) const {
    return cute::make_tensor(cute::make_smem_ptr(data), TransposedLayout<Element, kKeys, D, Shape::kKeyStages>{});
  }

  // As ScoreLayout, (queries, keys, stages).
  __device__ auto staged_scores(Element* data) const {
    using Extents = cute::Shape<cute::Int<kQueries>, cute::Int<kKeys>, cute::Int<Shape::kQueryStages>>;
    using Atom = cute::GMMA::Layout_MN_SW128_Atom<Element>;
    using Order = cute::Step<cute::_2, cute::_1, cute::_3>;
    return cute::make_tensor(cute::make_smem_ptr(data), cute::tile_to_shape(Atom{}, Extents{}, Order{}));
  }

  __device__ const StepRecord& record(const Place<Shape::kQueryStages>& at) const {
    return shared.steps[record_place(at, false)];
  }

  // Adds dQ of the step's query tile to its sum.
  template <class Dq>
  __device__ void gather(const Dq& dq, const StepRecord& step) const {
    constexpr int kWarp = kQueries * D / 8;
    const int64_t place = 2 * step.place + warpgroup;
    add_dq_in_bulk(dq, shared.gather.dq + (4 * warpgroup + lane.warp) * kWarp,
                   p.dq_sum + (4 * place + lane.warp) * kWarp, p.turns == nullptr ? nullptr : p.turns + place, step.rank, warpgroup, thread);
  }

  // dK or dV: rows of the warpgroup's 64 keys, times the scale of the weights and `factor`.
  template <class Acc>
  __device__ void store(const Acc& acc, float factor, const Output& out) const {
    const auto& [tile, head, steps] = shared.work[work.stage];
    const float scale = p.common.scales ? p.common.scales[tile.sequence] : p.common.scale;
    const int first = tile.first + Shape::first_key(warpgroup);
    store_rows<Element>(acc, factor * scale, out, int64_t{tile.key_start} + first, head, 0, tile.keys - first);
  }
};

template <class Shape, class Consumer>
__global__ void __launch_bounds__(Shape::kThreads, 1)
    pipelined_backward_kernel(const __grid_constant__ typename Shape::Params p) {
  GENREC_SHARED_MEMORY(memory);
  auto& shared = *reinterpret_cast<typename Shape::Shared*>(memory);
  if (threadIdx.x == 0) {
    constexpr int kArrivals = Shape::kConsumers * kArrivalsPerWarpgroup;
    shared.k_ring.init(Shape::kKeyReaders * kArrivalsPerWarpgroup);
    shared.v_ring.init(Shape::kKeyReaders * kArrivalsPerWarpgroup);
    shared.q_ring.init(kArrivals, 2);  // Q and the step's record
    shared.d_out_ring.init(kArrivals);
    shared.work_ring.init(kArrivals + kStreamLoaders<Shape>);
    shared.init_more(kArrivals);
    fence_new_barriers();
    for (const CUtensorMap* map : {&p.q, &p.k, &p.v, &p.d_out}) prefetch_map(*map);
  }
  sync_block(Shape::kThreads);
  const int warpgroup = uniform(threadIdx.x / 128);
  if (warpgroup == 0) {
    give_registers<Shape::kProducerRegisters>();
    pipelined_produce<Shape>(p, shared);
  } else {
    take_registers<Shape::kConsumerRegisters>();
    Consumer(p, shared, warpgroup - 1).run();
  }
}

}  // namespace genrec::attention
