// Gradients of the relative bias's tables, summed beside the products by warps that have nothing else to do.
//
// The gradient dS of a tile's scores lies in shared memory, (queries, keys) in 16 bits, for dQ = dS K; these warps read it
// there, 64 x 64 pairs at a time, and the consumers pay for no more than a barrier. Every sum has one owner: a lane its
// column of the warp's histogram, a warp its copy of the tables in device memory. Nothing is added by atomics, the order
// is fixed, and a last kernel adds the copies up.
//
// Position: lane l follows diagonals. In even key rows k it reads the word of queries 2 l + k and the next, around the
// corner behind query 63, in odd rows that of 2 l + k - 1: the 32 lanes read one row of 128 bytes, and a word belongs to
// the same two diagonals in every row, before the corner and behind it.
#pragma once

#include "attention/bias.h"
#include "attention/launch.h"

namespace genrec::attention {

template <int kWarps, int kColumns, int kBuffers>
struct GradientMemory {
  float histogram[kWarps][kMostBuckets][kColumns];
  int reach[kWarps][64];  // of each key row: what `near` of a query is compared with
  Ring<kBuffers> ds_ring;
};

template <class Shape>
struct BiasGradientWarp {
  using Element = typename Shape::Element;
  using Tile = typename Shape::BiasTile;
  static constexpr int kWarps = Shape::kGradientWarps, kColumns = Shape::kHistogramColumns, kKeys = Shape::kKeys;

  const typename Shape::Params& p;
  typename Shape::Shared& shared;
  const int warp, lane;
  float (&histogram)[kMostBuckets][kColumns];
  int (&reach)[64];

  __device__ BiasGradientWarp(const typename Shape::Params& params, typename Shape::Shared& memory, int number)
      : p(params), shared(memory), warp(number), lane(threadIdx.x % 32),
        histogram(memory.gradient.histogram[number]), reach(memory.gradient.reach[number]) {}

  __device__ void run() {
    for (int b = lane; b < kMostBuckets; b += 32)
      for (int c = 0; c < kColumns; ++c) histogram[b][c] = 0.f;
    sync_warp();
    Place<2> work(0), place(0);
    Place<Shape::kScoreBuffers> ds(0);
    for (;; work.next()) {
      shared.work_ring.full[work.stage].wait(work.parity);
      const TileRecord record = shared.work[work.stage].tile;
      release(shared.work_ring.empty[work.stage]);
      if (record.sequence < 0) break;
      const SequenceMask<Shape::kCausal> mask(record.keys, record.contexts, record.targets, p.common.rule);
      const TileRanges ranges =
          mask.query_tiles(record.first, record.first + kKeys, Shape::kQueries, record.queries);
      const float scale = p.common.scales ? p.common.scales[record.sequence] : p.common.scale;
      const int count = ranges.count();
      CUTE_NO_UNROLL
      for (int i = 0; i < count; ++i, place.next(), ds.next()) {
        shared.bias.ring.full[place.stage].wait(place.parity);
        shared.gradient.ds_ring.full[ds.stage].wait(ds.parity);
        const char* scores = reinterpret_cast<const char*>(shared.ds[ds.stage]);
        CUTE_NO_UNROLL
        for (int keys = 64 * warp; keys < kKeys; keys += 64 * kWarps) {
          CUTE_NO_UNROLL
          for (int queries = 0; queries < Shape::kQueries; queries += 64)
            add_block(scores + queries / 64 * kKeys * 128 + keys * 128, shared.bias.tiles[place.stage], record, keys,
                      ranges.tile(i) * Shape::kQueries, queries, scale);
        }
        release(shared.bias.ring.empty[place.stage]);
        release(shared.gradient.ds_ring.empty[ds.stage]);
      }
    }
    store_histogram();
  }

 private:
  struct Pair {
    float first, second;
  };

  __device__ static Pair unpack(uint32_t word) {
    const auto two = cutlass::NumericArrayConverter<float, Element, 2>{}(
        *reinterpret_cast<const cutlass::Array<Element, 2>*>(&word));
    return {two[0], two[1]};
  }

  // Queries `query` (even) and the next of key row `key` of a block.
  __device__ static Pair read(const char* block, int key, int query) {
    return unpack(*reinterpret_cast<const uint32_t*>(block + key * 128 + (query * 2 ^ key % 8 * 16)));
  }

  // `block`: dS of 64 queries, from row `queries` of query tile row `tile_row` on, and 64 keys from row `keys` of the key
  // tile on.
  __device__ void add_block(const char* block, const Tile& tile, const TileRecord& record, int keys, int tile_row,
                            int queries, float scale) {
    float total;
    if (p.bias.position_sums != nullptr) {
      const int query = tile_row + queries + record.keys - record.queries;
      total = add_diagonals(block, record.first + keys - query + p.bias.max_positions - 1, scale);
    } else {
      total = 0.f;
#pragma unroll 8
      for (int k = 0; k < 64; ++k) {
        const Pair ds = read(block, k, 2 * lane);
        total += ds.first + ds.second;
      }
    }
    if (p.bias.time_sums == nullptr) return;
    const TileTimes<false> times(p.bias, record);
    const TimeKind kind = tile.kind;
    if (kind == TimeKind::kOne) {
      add_to_histogram(tile.first, total * scale);
    } else if (kind == TimeKind::kFew) {
      write_reach(times, record.first + keys, tile.sign, tile.shift[0]);
      if (tile.edges == 1) add_few<1>(block, tile, queries, total, scale);
      if (tile.edges == 2) add_few<2>(block, tile, queries, total, scale);
      if (tile.edges == 3) add_few<3>(block, tile, queries, total, scale);
    } else {
      if (kind == TimeKind::kNear) write_reach(times, record.first + keys, 1, tile.base);
      const int2 near = *reinterpret_cast<const int2*>(tile.near + queries + 2 * lane);
      const int row = tile_row + queries + 2 * lane;
#pragma unroll 2
      for (int k = 0; k < 64; ++k) {
        const Pair ds = read(block, k, 2 * lane);
        int first, second;
        if (kind == TimeKind::kNear) {
          first = near_bucket_of(shared.bias.buckets, reach[k] - near.x);
          second = near_bucket_of(shared.bias.buckets, reach[k] - near.y);
        } else {
          const int64_t key = times.fixed(record.first + keys + k);
          first = bucket_of(shared.bias.buckets, distance_of(key, times.streamed(row)));
          second = bucket_of(shared.bias.buckets, distance_of(key, times.streamed(row + 1)));
        }
        add_to_histogram(first, ds.first * scale, second, ds.second * scale);
      }
    }
    sync_warp();
  }

  // Adds the sums along the diagonals key - query to this warp's copy of the position table, in which `entry` is that of
  // the block's first pair. Returns the lane's share of the sum of all.
  __device__ float add_diagonals(const char* block, int entry, float scale) {
    float* sums = p.bias.position_sums + (int64_t{blockIdx.x} * kWarps + warp) * (2 * p.bias.max_positions - 1);
    const int last = 2 * p.bias.max_positions - 2;
    // Query - key: 2 lane, 2 lane + 1, and 64 less. Those outside of the table have no pair in the sequence.
    const int places[4] = {entry - 2 * lane, entry - 2 * lane - 1, entry - 2 * lane + 64, entry - 2 * lane + 63};
    const bool exist[4] = {inside(places[0], last), inside(places[1], last), lane > 0 && inside(places[2], last),
                           inside(places[3], last)};
    float values[4];
    CUTE_UNROLL
    for (int n = 0; n < 4; ++n) values[n] = exist[n] ? sums[places[n]] : 0.f;
    // Even and odd key rows, before and behind the corner. Words of odd rows lie one diagonal lower.
    Pair even[2] = {{0.f, 0.f}, {0.f, 0.f}}, odd[2] = {{0.f, 0.f}, {0.f, 0.f}};
#pragma unroll 4
    for (int k = 0; k < 64; k += 2) {
      const int query = 2 * lane + k & 63;
      const bool direct = 2 * lane + k < 64;
      const Pair a = read(block, k, query), b = read(block, k + 1, query);
      if (direct) {
        even[0].first += a.first, even[0].second += a.second, odd[0].first += b.first, odd[0].second += b.second;
      } else {
        even[1].first += a.first, even[1].second += a.second, odd[1].first += b.first, odd[1].second += b.second;
      }
    }
    // The next lane's lower diagonal of odd rows is this one's upper of even rows; the last lane's is the first's.
    const int next = (lane + 1) % 32;
    const float direct = from_lane(odd[0].first, next), behind = from_lane(odd[1].first, next);
    values[0] += scale * (even[0].first + odd[0].second);
    values[1] += scale * (even[0].second + (lane < 31 ? direct : 0.f));
    values[2] += scale * (even[1].first + odd[1].second);
    values[3] += scale * (even[1].second + (lane < 31 ? behind : direct));
    CUTE_UNROLL
    for (int n = 0; n < 4; ++n)
      if (exist[n]) sums[places[n]] = values[n];
    sync_warp();  // other lanes read these entries next
    return even[0].first + even[0].second + even[1].first + even[1].second + odd[0].first + odd[0].second +
           odd[1].first + odd[1].second;
  }

  __device__ static bool inside(int place, int last) { return place >= 0 && place <= last; }

  // reach = sign * time - base, of 64 key rows from `key` on.
  __device__ void write_reach(const TileTimes<false>& times, int key, int sign, int64_t base) {
    CUTE_UNROLL
    for (int k = lane; k < 64; k += 32) reach[k] = static_cast<int>(sign * times.fixed(key + k) - base);
    sync_warp();
  }

  // kEdges edges cut the tile: sums of what lies behind each.
  template <int kEdges>
  __device__ void add_few(const char* block, const Tile& tile, int queries, float total, float scale) {
    const int2 near = *reinterpret_cast<const int2*>(tile.near + queries + 2 * lane);
    int further[kEdges];
    float behind[kEdges + 1];
    CUTE_UNROLL
    for (int e = 0; e < kEdges; ++e) further[e] = static_cast<int>(tile.shift[e] - tile.shift[0]), behind[e] = 0.f;
    behind[kEdges] = 0.f;
#pragma unroll 8
    for (int k = 0; k < 64; ++k) {
      const Pair ds = read(block, k, 2 * lane);
      CUTE_UNROLL
      for (int e = 0; e < kEdges; ++e) {
        const int most = reach[k] - further[e];
        if (near.x <= most) behind[e] += ds.first;
        if (near.y <= most) behind[e] += ds.second;
      }
    }
    add_to_histogram(tile.first, (total - behind[0]) * scale);
    CUTE_UNROLL
    for (int e = 0; e < kEdges; ++e) add_to_histogram(tile.first + 1 + e, (behind[e] - behind[e + 1]) * scale);
  }

  // Lanes that share a column take turns.
  __device__ void add_to_histogram(int bucket, float value) {
    CUTE_UNROLL
    for (int turn = 0; turn < 32 / kColumns; ++turn) {
      if (lane / kColumns == turn) histogram[bucket][lane % kColumns] += value;
      if (kColumns < 32) sync_warp();
    }
  }

  __device__ void add_to_histogram(int first, float a, int second, float b) {
    const bool same = first == second;
    CUTE_UNROLL
    for (int turn = 0; turn < 32 / kColumns; ++turn) {
      if (lane / kColumns == turn) {
        float *to = &histogram[first][lane % kColumns], *other = &histogram[second][lane % kColumns];
        const float old = *to, old_other = *other;  // both on their way before either is written
        *to = old + (same ? a + b : a);
        if (!same) *other = old_other + b;
      }
      if (kColumns < 32) sync_warp();
    }
  }

  __device__ void store_histogram() const {
    if (p.bias.time_sums == nullptr) return;
    sync_warp();
    float* sums = p.bias.time_sums + (int64_t{blockIdx.x} * kWarps + warp) * p.bias.buckets;
    for (int b = lane; b < smaller(p.bias.buckets, kMostBuckets); b += 32) {
      float sum = 0.f;
      for (int c = 0; c < kColumns; ++c) sum += histogram[b][c];
      sums[b] = sum;
    }
  }
};

// Adds copies up in a fixed order. A block has 32 entries: its 8 warps take a part of the copies each.
constexpr int kSumThreads = 256;

template <int kThreads>
__global__ void __launch_bounds__(kThreads) sum_tables_kernel(const SumParams p) {
  GENREC_SHARED_MEMORY(memory);
  float(*parts)[32] = reinterpret_cast<float(*)[32]>(memory);
  constexpr int kWarps = kThreads / 32;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, entry = blockIdx.x * 32 + lane;
  float sum = 0.f;
  if (entry < p.entries) {
#pragma unroll 8
    for (int c = warp; c < p.count; c += kWarps) sum += p.copies[int64_t{c} * p.entries + entry];
  }
  parts[warp][lane] = sum;
  sync_block(kThreads);
  if (warp != 0 || entry >= p.entries) return;
  for (int w = 1; w < kWarps; ++w) sum += parts[w][lane];
  p.table[entry] = sum;
}

}  // namespace genrec::attention
