// dQ = dS K at D = 128 with a relative bias, and the gradients of its tables, from dS as the pass before left it in device
// memory (ds_store.h).
//
// Summed beside the products that give dK and dV, the tables' gradients are what that pass waits for: its consumers leave
// few registers, and neither issue slots nor shared memory are free. Here a product is all that the consumers have, three
// quarters of the issue slots are free, and eight warps with 112 registers each take the blocks of 64 x 64 pairs by turns.
//
// A persistent block takes 192 queries and goes over the tiles of 64 keys that they see, as in backward_stored.h. One
// warpgroup gives dQ of all 192, 64 at a time. Two warps of the one that loads prepare what is to be known of a step's
// times: of each block whether one bucket holds all its pairs, or which edges cut it. Blocks are small, so that most are of
// the first kind and nearly all others are cut by one edge or two.
#pragma once

#include "attention/backward_bias.h"
#include "attention/backward_stored.h"

namespace genrec::attention {

// How a block's buckets are told, as in bias_tile.h, its keys being the fixed rows.
struct BlockKind {
  TimeKind kind;
  int sign;          // 1: keys are later than queries; -1: the reverse
  int first, edges;  // the block's first bucket; the number of edges that cut it
};

// What BlockSums has of a block's times. kFew: the queries' rise, and those with near < key time - shift are on one side of
// an edge.
struct alignas(16) BlockTimes : BlockKind {
  static constexpr int kMostEdges = 8;  // more take as long as look-ups
  int near[64];  // of each query: time - base
  int64_t base, shift[kMostEdges];
};

// A step: a tile of keys and all queries of the unit. Written by the warp that prepares it.
struct SumsStep {
  TileRecord tile;  // of queries
  int key;          // the first
  int parts;        // a bit for each 64 of the queries that see any of the keys; -1: there are no more steps
  float scale;
};

template <class Element_, int D_, bool kCausal_, class Parts_>
struct StoredSumsShape {
  using Element = Element_;
  static constexpr int D = D_, kQueries = kCellQueries, kKeys = kCellKeys;
  static constexpr bool kCausal = kCausal_;
  using Parts = Parts_;
  static_assert(Parts::kRows == 64 && D == 128, "a part is a block of the warps that sum");
  using Stored = StoredSumsShape;             // whose parts dS lies in
  static constexpr bool kGivesDq = true;      // so that it may be launched where no table is summed
  static constexpr Bias kBias = Bias::kRelative;
  static constexpr bool kRelative = true, kSumsTables = true;
  using Params = BiasedParams<BackwardParams, kBias>;
  // Shared memory decides: 227 KiB. Nearly three cells are being summed, the others on their way; K is wanted by its product
  // alone, soon after it came.
  static constexpr int kStages = 5, kKeyStages = 2;
  static constexpr int kPreparers = 2, kSummingWarps = 8;
  static constexpr int kThreads = 128 * (2 + kSummingWarps / 4);
  static constexpr int kProducerRegisters = 56, kConsumerRegisters = 232, kGradientRegisters = 112;
  static_assert(kProducerRegisters + kConsumerRegisters + kSummingWarps / 4 * kGradientRegisters <=
                    65536 / kThreads / 8 * 8 * (kThreads / 128), "more registers than the launch claims");

  // What BlockSums wants to know.
  static constexpr int kTableCopies = kSummingWarps, kCopies = kTableCopies;
  static constexpr bool kSumsByProducts = true, kSplitTables = false;
  using Block = TiledBlock;
  using BlockTile = BlockTimes;
  using BlockMemory = SmallBlockMemory;

  using DqMma = decltype(cute::make_tiled_mma(
      cute::GMMA::ss_op_selector<Element, Element, float, cute::Shape<cute::_64, cute::Int<D>, cute::Int<kKeys>>,
                                 cute::GMMA::Major::MN, cute::GMMA::Major::MN>()));

  struct alignas(1024) Shared {
    alignas(1024) Element ds[kStages][kCellElements];
    alignas(1024) Element k[kKeyStages][kKeys * D];
    Ring<kStages> ring;  // dS and what is prepared of a step
    Ring<kKeyStages> k_ring;
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

// A cell in parts: (queries of a part, keys, parts of all stages).
template <class Element, class Parts, int kStages>
using PartLayout = decltype(cute::tile_to_shape(
    cute::GMMA::Layout_MN_INTER_Atom<Element>{},
    cute::Shape<cute::Int<Parts::kRows>, cute::Int<kCellKeys>, cute::Int<Parts::kCount * kStages>>{},
    cute::Step<cute::_2, cute::_1, cute::_3>{}));

// The units of work whose sequences have a place in the store: each block takes the next one, or, where tables have to
// repeat bit by bit, every gridDim-th.
struct StoredUnits {
  const BackwardParams& p;
  const int units;

  __device__ int first() const { return from(p.turns != nullptr ? static_cast<int>(blockIdx.x) : another(0)); }
  __device__ int after(int unit) const { return from(another(unit)); }

 private:
  __device__ int another(int unit) const {
    return p.turns != nullptr ? unit + static_cast<int>(gridDim.x) : add_atomically(p.common.counter, 1);
  }
  __device__ int from(int unit) const {
    while (unit < units && p.store.first[p.list.tiles[work_unit(unit, p.common.heads).tile].sequence] < 0)
      unit = another(unit);
    return unit;
  }
};

// Steps behind the last one, so that each warp that sums has a block of one of them.
template <class Shape>
constexpr int kEndSteps = divide_up(Shape::kSummingWarps, Shape::Parts::kCount);

// Takes units of work, and brings dS.
template <class Shape>
__device__ inline void sums_produce(const typename Shape::Params& p, typename Shape::Shared& shared) {
  using Stored = typename Shape::Stored;
  constexpr int kKeys = Shape::kKeys;
  Place<2> work(1);
  Place<Shape::kStages> at(1);
  const int heads = p.common.heads, units = *p.list.length * heads;
  const StoredUnits order{p, units};
  for (int w = order.first();; work.next()) {
    shared.work_ring.empty[work.stage].wait(work.parity);
    if (w >= units) break;
    const WorkUnit unit = work_unit(w, heads);
    const TileRecord tile = p.list.tiles[unit.tile];
    w = order.after(w);
    const UnitSight<Stored> sight(p.common, tile);
    const CellPlaces places(p.store, stored_sequence(tile, sight.mask), tile.sequence, unit.head, heads);
    const int count = sight.ranges.count();
    shared.work[work.stage] = {tile, unit.head, count};
    shared.work_ring.full[work.stage].arrive();
    CUTE_NO_UNROLL
    for (int n = 0; n < count; ++n, at.next()) {
      const int key = sight.ranges.tile(n) * kKeys, parts = sight.parts(tile, key);
      FullBarrier& full = shared.ring.full[at.stage];
      shared.ring.empty[at.stage].wait(at.parity);
      full.arrive_and_expect_tx(kCellElements * sizeof(typename Shape::Element));
      load_parts<Stored>(p, places.cell(tile.first / Shape::kQueries, key / kKeys), parts, full, shared.ds[at.stage]);
    }
  }
  shared.work[work.stage].tile.sequence = -1;
  shared.work_ring.full[work.stage].arrive();
  for (int n = 0; n < kEndSteps<Shape> && (!Shape::kGivesDq || sums_tables<Shape>(p)); ++n, at.next()) {
    shared.ring.empty[at.stage].wait(at.parity);
    shared.ring.full[at.stage].arrive();
  }
}

// Another thread brings K: it would have to wait for its place before it goes on with dS.
template <class Shape>
__device__ inline void sums_load_keys(const typename Shape::Params& p, typename Shape::Shared& shared) {
  using Element = typename Shape::Element;
  constexpr int D = Shape::D, kKeys = Shape::kKeys;
  Place<2> work(0);
  Place<Shape::kKeyStages> at(1);
  for (;; work.next()) {
    shared.work_ring.full[work.stage].wait(work.parity);
    keep_accesses();
    const TileRecord tile = shared.work[work.stage].tile;
    const int head = shared.work[work.stage].head;
    arrive_as_warp(shared.work_ring.empty[work.stage]);
    if (tile.sequence < 0) return;
    const UnitSight<Shape> sight(p.common, tile);
    const int count = sight.ranges.count();
    CUTE_NO_UNROLL
    for (int n = 0; n < count; ++n, at.next()) {
      FullBarrier& full = shared.k_ring.full[at.stage];
      shared.k_ring.empty[at.stage].wait(at.parity);
      full.arrive_and_expect_tx(kTileBytes<Element, kKeys, D>);
      load_tile<Element, kKeys, D, kBoxRows>(p.k, full, shared.k[at.stage],
                                             tile.key_start + sight.ranges.tile(n) * kKeys, head);
    }
  }
}

struct PartTimes {
  TimeSpan span;
  bool rise;
};

// One of the warps that prepare steps, by turns. It comes by a stage not each time that this is filled; yet no phase of
// `empty` misleads it: when it has waited for a later stage, the turn that it left out has been given back.
template <class Shape>
struct SumsPreparer {
  static constexpr int kParts = Shape::Parts::kCount, kQueries = Shape::kQueries;
  const typename Shape::Params& p;
  typename Shape::Shared& shared;
  const int lane = threadIdx.x % 32;
  Place<Shape::kStages> place{1};

  __device__ void run(int warp) {
    for (int n = 0; n < warp; ++n) place.next();
    Place<2> work(0);
    int next = warp;  // of the unit's steps
    for (;; work.next()) {
      shared.work_ring.full[work.stage].wait(work.parity);
      const TileRecord tile = shared.work[work.stage].tile;
      release(shared.work_ring.empty[work.stage]);
      if (tile.sequence < 0) break;
      const UnitSight<Shape> sight(p.common, tile);
      const int count = sight.ranges.count();
      if (next < count) next = one_unit(tile, sight, next, count);
      next -= count;
    }
    for (; next < kEndSteps<Shape>; next += Shape::kPreparers) {
      shared.ring.empty[place.stage].wait(place.parity);
      announce({{}, 0, -1, 0.f});
    }
  }

 private:
  __device__ void announce(const SumsStep& step) {
    if (lane == 0) shared.steps[place.stage] = step;
    release(shared.ring.full[place.stage]);
    CUTE_UNROLL
    for (int n = 0; n < Shape::kPreparers; ++n) place.next();
  }

  // Prepares steps from `next` on; returns the first that isn't the unit's any more.
  __device__ int one_unit(const TileRecord& tile, const UnitSight<Shape>& sight, int next, int count) {
    const TileTimes<false> times(p.bias, tile);
    const float scale = p.common.scales ? p.common.scales[tile.sequence] : p.common.scale;
    const bool timed = p.bias.time_sums != nullptr;
    PartTimes queries{{0, 0}, false};  // of the 64 of the part that the lane's number names
    int later[kQueries / 32];          // the lane's queries, from the first of their part on
    CUTE_UNROLL
    for (int part = 0; part < kParts && timed; ++part) {
      const int query = tile.first + 64 * part + lane;
      const int64_t first = times.streamed(query), second = times.streamed(query + 32);
      TimeSpan span{first, first};
      span.take({second, second});
      span = span.of_warp();
      later[2 * part] = static_cast<int>(first - span.low), later[2 * part + 1] = static_cast<int>(second - span.low);
      const bool rise = rising(later[2 * part], later[2 * part + 1]);
      if (lane >= part) queries = {span, rise};
    }
    CUTE_NO_UNROLL
    for (; next < count; next += Shape::kPreparers) {
      const int key = sight.ranges.tile(next) * Shape::kKeys, parts = sight.parts(tile, key);
      int64_t first = 0, second = 0;
      BlockKind kind{};
      if (timed) {  // now: waiting for room goes on beside it
        first = times.fixed(key + lane), second = times.fixed(key + lane + 32);
        TimeSpan keys{first, first};
        keys.take({second, second});
        kind = kind_of(keys.of_warp(), queries);
      }
      shared.ring.empty[place.stage].wait(place.parity);
      if (timed) {
        int64_t* const own = shared.times[place.stage];
        own[lane] = first, own[lane + 32] = second;
        put_times(kind, queries.span.low, later);
      }
      announce({tile, key, parts, scale});
    }
    return next;
  }

  // Whether 64 numbers, of each lane two, never fall.
  __device__ bool rising(int first, int second) const {
    const auto following = [&](int number) {
      return static_cast<int>(float_bits(from_lane(float_of(static_cast<uint32_t>(number)), (lane + 1) % 32)));
    };
    const int after_first = following(lane == 0 ? second : first), after_second = following(second);
    return !any_lane(after_first < first || (lane < 31 && after_second < second));
  }

  // As BiasWriter does for a tile, each lane for the part that its number names.
  __device__ BlockKind kind_of(const TimeSpan& keys, const PartTimes& part) const {
    const BucketTables& buckets = shared.buckets;
    const TimeSpan& queries = part.span;
    constexpr int64_t kSafe = int64_t{1} << 61, kShort = int64_t{1} << (kNearBits - 1);
    if (keys.low <= -kSafe || keys.high >= kSafe || queries.low <= -kSafe || queries.high >= kSafe)
      return {TimeKind::kWide, 1, 0, 0};
    const TimeDistances apart(keys, queries);
    const int first = bucket_of(buckets, distance_of(apart.nearest, 0));
    const int edges = bucket_of(buckets, distance_of(apart.farthest, 0)) - first;
    const bool brief = keys.high - keys.low < kShort && queries.high - queries.low < kShort;
    const bool few = apart.one_sign() && edges <= BlockTimes::kMostEdges && brief && part.rise;
    const bool near = apart.farthest < int64_t{1} << kNearBits;
    return {edges == 0 ? TimeKind::kOne : few ? TimeKind::kFew : near ? TimeKind::kNear : TimeKind::kWide,
            apart.ahead >= 0 ? 1 : -1, first, edges};
  }

  // `base`: the least of the part's times.
  __device__ void put_times(const BlockKind& kind, int64_t base, const int (&later)[kQueries / 32]) const {
    BlockTimes(&blocks)[kParts] = shared.blocks[place.stage];
    const bool few = kind.kind == TimeKind::kFew;
    if (lane < kParts) {
      BlockTimes& block = blocks[lane];
      static_cast<BlockKind&>(block) = kind;
      block.base = base;
      // Keys are later by an edge where near <= key time - edge - base, earlier where not near < key time + edge - base.
      CUTE_NO_UNROLL
      for (int k = 0; few && k < kind.edges; ++k)
        block.shift[k] = base + kind.sign * shared.buckets.edges[kind.first + 1 + k] - (kind.sign > 0);
    }
    if (!any_lane(few || kind.kind == TimeKind::kNear)) return;
    CUTE_UNROLL
    for (int n = 0; n < kQueries / 32; ++n) blocks[n / 2].near[n % 2 * 32 + lane] = later[n];
  }
};

// One of the warps that sum.
template <class Shape>
struct StoredSumsWarp : BlockSums<Shape> {
  using Base = BlockSums<Shape>;
  using Base::p, Base::lane, Base::warp;
  typename Shape::Shared& shared;

  __device__ StoredSumsWarp(const typename Shape::Params& params, typename Shape::Shared& memory, int number)
      : Base(params, memory.buckets, memory.sums[number], number), shared(memory) {}

  __device__ void run() {
    constexpr uint32_t kParts = Shape::Parts::kCount;
    this->clear();
    const bool ordered = p.turns != nullptr;
    uint32_t mine = ordered ? warp : take();  // counts the blocks of all steps
    Place<Shape::kStages> at(0);
    // Each warp sees each step, or phases of a barrier would pass it by.
    for (uint32_t before = 0;; before += kParts, at.next()) {
      shared.ring.full[at.stage].wait(at.parity);
      for (; mine < before + kParts; mine = ordered ? mine + Shape::kSummingWarps : take()) {
        const auto& [tile, key, parts, scale] = shared.steps[at.stage];
        if (parts < 0) return this->store();
        const int part = mine - before;
        if (!(parts >> part & 1)) continue;
        const char* block = reinterpret_cast<const char*>(shared.ds[at.stage] + part * Shape::Parts::kElements);
        this->add_block(block, shared.blocks[at.stage][part], tile, shared.times[at.stage], key, tile.first + 64 * part,
                        0, scale);
      }
      release(shared.ring.empty[at.stage]);
    }
  }

 private:
  // The next block that nobody has. Who has which may differ from run to run, and with it the order of sums.
  __device__ uint32_t take() const {
    return largest_of_warp(lane == 0 ? static_cast<uint32_t>(add_atomically(&shared.taken, 1)) : 0u);
  }
};

template <class Shape>
__device__ inline void sums_consume(const typename Shape::Params& p, typename Shape::Shared& shared) {
  using namespace cute;
  using Element = typename Shape::Element;
  using Parts = typename Shape::Parts;
  constexpr int D = Shape::D, kKeys = Shape::kKeys, kStages = Shape::kStages, kParts = Parts::kCount;
  typename Shape::DqMma dq_mma;
  const auto slice = dq_mma.get_slice(0);
  const auto ds_parts = operand_a(slice, make_tensor(make_smem_ptr(shared.ds[0]), PartLayout<Element, Parts, kStages>{}));
  const auto k_columns = operand_b(slice, make_tensor(
      make_smem_ptr(shared.k[0]), TransposedLayout<Element, kKeys, D, Shape::kKeyStages>{}));

  Place<2> work(0);
  Place<kStages> at(0), done(0);
  Place<Shape::kKeyStages> k(0), k_done(0);
  for (;; work.next()) {
    shared.work_ring.full[work.stage].wait(work.parity);
    const int count = shared.work[work.stage].steps;
    if (shared.work[work.stage].tile.sequence < 0) break;
    Tensor first = partition_fragment_C(dq_mma, Extent<64, D>{});
    Tensor second = partition_fragment_C(dq_mma, Extent<64, D>{});
    Tensor third = partition_fragment_C(dq_mma, Extent<64, D>{});
    const auto issue = [&](auto starts) {
      constexpr bool kStarts = decltype(starts)::value;
      shared.k_ring.full[k.stage].wait(k.parity);
      shared.ring.full[at.stage].wait(at.parity);
      const auto keys = k_columns(_, _, _, k.stage);
      issue_product<kStarts>(dq_mma, ds_parts(_, _, _, kParts * at.stage), keys, first);
      issue_product<kStarts>(dq_mma, ds_parts(_, _, _, kParts * at.stage + 1), keys, second);
      issue_product<kStarts>(dq_mma, ds_parts(_, _, _, kParts * at.stage + 2), keys, third);
      at.next(), k.next();
    };
    const auto finish = [&](auto pending) {
      constexpr int kPending = decltype(pending)::value;
      wait_for<kPending>(first), wait_for<kPending>(second), wait_for<kPending>(third);
      release(shared.ring.empty[done.stage]);
      release(shared.k_ring.empty[k_done.stage]);
      done.next(), k_done.next();
    };
    const auto store = [&](const auto& dq, int part) {
      const auto& [tile, head, steps] = shared.work[work.stage];
      const float scale = p.common.scales ? p.common.scales[tile.sequence] : p.common.scale;
      const int row = tile.first + 64 * part;
      store_rows<Element>(dq, 2.f * p.common.half_alpha * scale, p.dq, int64_t{tile.query_start} + row, head, 0,
                          tile.queries - row);
    };
    if (count > 0) {
      issue(true_type{});
      CUTE_NO_UNROLL
      for (int n = 1; n < count; ++n) {
        issue(false_type{});
        finish(Int<kParts>{});
      }
      finish(_0{});
      store(first, 0), store(second, 1), store(third, 2);
    } else {
      clear(first);
      CUTE_NO_UNROLL
      for (int part = 0; part < kParts; ++part) store(first, part);
    }
    release(shared.work_ring.empty[work.stage]);
  }
}

template <class Shape>
__global__ void __launch_bounds__(Shape::kThreads, 1) stored_sums_kernel(const __grid_constant__ typename Shape::Params p) {
  GENREC_SHARED_MEMORY(memory);
  auto& shared = *reinterpret_cast<typename Shape::Shared*>(memory);
  const bool sums = sums_tables<Shape>(p);
  if (threadIdx.x == 0) {
    shared.ring.init(kArrivalsPerWarpgroup + (sums ? Shape::kSummingWarps : 0), 1 + (sums ? kArrivalsPerWarp : 0));
    shared.k_ring.init(kArrivalsPerWarpgroup);
    shared.work_ring.init(kArrivalsPerWarpgroup + 1 + (sums ? Shape::kPreparers : 0));
    shared.taken = 0;
    fence_new_barriers();
    prefetch_map(p.k);
  }
  if (p.bias.time_sums != nullptr) fill_buckets<Shape::kThreads>(shared.buckets, p.bias, 1.f);
  sync_block(Shape::kThreads);
  follow_kernel_before();
  const int warpgroup = uniform(threadIdx.x / 128);
  if (warpgroup == 0) {
    give_registers<Shape::kProducerRegisters>();
    const int warp = uniform(threadIdx.x / 32);
    if (threadIdx.x == 0) sums_produce<Shape>(p, shared);
    if (threadIdx.x == 32 * (1 + Shape::kPreparers)) sums_load_keys<Shape>(p, shared);
    if (warp > 0 && warp <= Shape::kPreparers && sums) SumsPreparer<Shape>{p, shared}.run(warp - 1);
  } else if (warpgroup == 1) {
    take_registers<Shape::kConsumerRegisters>();
    sums_consume<Shape>(p, shared);
  } else {
    give_registers<Shape::kGradientRegisters>();
    if (sums) StoredSumsWarp<Shape>(p, shared, uniform(threadIdx.x / 32) - 8).run();
  }
}

}  // namespace genrec::attention
