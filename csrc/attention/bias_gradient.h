// Gradients of the relative bias's tables, summed beside the products by warps that have nothing else to do.
//
// The gradient dS of a tile's scores lies in shared memory, (queries, keys) in 16 bits, for dQ = dS K; these warps read it
// there, 64 x 64 pairs at a time, and the consumers pay for no more than a barrier. A warp has its own copies of the tables.
// Additions of floating-point numbers have a fixed order, and a last kernel adds the copies up.
//
// Position: bias_diagonals.h; what it gives is added to the warp's copy by reductions that nobody waits for, and nobody
// else adds to that copy. Time: up to five edges are compared with; where buckets are looked up, bias_histogram.h adds.
//
// Beside the consumers' products a read of shared memory takes some 200 cycles, and a warp waits for its own alone: what a
// block takes is the number of its waits. So reads are issued some rows before their use.
#pragma once

#include "attention/bias.h"
#include "attention/bias_diagonals.h"
#include "attention/bias_histogram.h"
#include "attention/launch.h"

namespace genrec::attention {

// A step of the backward kernel: a tile of keys and one of queries. Written by the warp that prepares its bias.
struct BiasStep {
  TileRecord tile;  // of keys
  int unit;         // counts the tiles of keys; -1: there are no more steps
  int m;            // number of the query tile
  bool masked;      // whether some pairs are hidden
};

// How the warps share the work. Teams of up to two take turns by steps. Each warp of a team has 64 of the keys; or, where
// there is room for one copy of their memory only, one has the position table and the other the time table.
template <int kWarps, bool kSplitTables>
struct GradientTeams {
  static constexpr int kTeam = kWarps < 2 ? 1 : 2, kTeams = kWarps < 2 ? 1 : kWarps / kTeam;
  static constexpr int kCopies = kSplitTables ? 1 : kWarps;
  static constexpr int kBlocks = kSplitTables ? 2 : 1;  // of 64 keys for one warp, of the tile's 128
};

template <int kCopies, int kBlocks, int kBuffers>
struct GradientMemory {
  BucketSums buckets[kCopies];
  float diagonals[kCopies][8][136];
  int64_t times[kCopies][64 * kBlocks];  // of the warp's keys
  int reach[kCopies][64];                // of each key row: what `near` of a query is compared with
  Ring<kBuffers> ds_ring;
};

template <class Shape>
struct BiasGradientWarp {
  using Element = typename Shape::Element;
  using Tile = typename Shape::BiasTile;
  using Teams = typename Shape::Teams;
  using Diagonals = DiagonalSums<Element, Shape::kSumsByProducts>;
  static constexpr int kKeys = Shape::kKeys;
  static constexpr bool kSplit = Shape::kSplitTables;
  static constexpr int kBlocks = Teams::kBlocks;
  static_assert(64 * kBlocks * (kSplit ? 1 : Teams::kTeam) == kKeys, "keys that no warp has");

  const typename Shape::Params& p;
  typename Shape::Shared& shared;
  const int warp;
  int lane;
  const int copy;
  BucketSums& buckets;
  int (&reach)[64];
  int64_t (&times)[64 * kBlocks];

  __device__ BiasGradientWarp(const typename Shape::Params& params, typename Shape::Shared& memory, int number)
      : p(params), shared(memory), warp(number), lane(threadIdx.x % 32), copy(kSplit ? 0 : number),
        buckets(memory.gradient.buckets[copy]), reach(memory.gradient.reach[copy]),
        times(memory.gradient.times[copy]) {}

  __device__ void run() {
    if (sums_time()) clear_buckets();
    if (sums_position()) Diagonals(shared.gradient.diagonals[copy], lane).clear_margins();
    int unit = -1;
    for (uint32_t n = warp / Teams::kTeam;; n += Teams::kTeams) {  // steps: all that is kept of the places in both rings
      const int stage = n % Shape::kBiasStages, buffer = n % Shape::kScoreBuffers;
      shared.bias.ring.full[stage].wait(n / Shape::kBiasStages % 2);
      const BiasStep& step = shared.steps[stage];
      if (step.unit < 0) break;
      if (step.unit != unit) {
        unit = step.unit;
        load_times(step.tile);
      }
      shared.gradient.ds_ring.full[buffer].wait(n / Shape::kScoreBuffers % 2);
      const char* scores = reinterpret_cast<const char*>(shared.ds[buffer]);
      CUTE_NO_UNROLL
      for (int b = 0; b < kBlocks; ++b) {
        CUTE_NO_UNROLL
        for (int queries = 0; queries < Shape::kQueries; queries += 64) {
          const int keys = first_key(b);
          add_block(scores + queries / 64 * kKeys * 128 + keys * 128, shared.bias.tiles[stage], step, &times[64 * b],
                    keys, queries);
        }
      }
      release(shared.bias.ring.empty[stage]);
      release(shared.gradient.ds_ring.empty[buffer]);
    }
    if (sums_time()) store_buckets();
  }

 private:
  // Constant but where warps split the tables.
  __device__ bool sums_position() const { return !kSplit || warp == 0; }
  __device__ bool sums_time() const { return (!kSplit || warp == 1) && p.bias.time_sums != nullptr; }

  // Of the warp's block `b`, in the tile of keys.
  __device__ int first_key(int b) const { return kSplit ? 64 * b : 64 * (b * Teams::kTeam + warp % Teams::kTeam); }

  // Queries `query` (even) and the next of key row `key` of a block.
  __device__ static uint32_t read(const char* block, int key, int query) {
    return *reinterpret_cast<const uint32_t*>(block + key * 128 + (query * 2 ^ key % 8 * 16));
  }

  // Calls use(words, reach) for the lane's 8 queries of each of its 16 key rows. kAhead reads are under way: beside the
  // consumers' products shared memory takes some 200 cycles, and nothing else of the warp hides them.
  template <int kAhead, class Use>
  __device__ void each_row(const char* block, Use use) const {
    static_assert(kAhead % 2 == 0 && 16 % kAhead == 0, "rows are unrolled by kAhead, even and odd ones are swizzled apart");
    const int row = lane / 8, even = row * 128 + (lane % 8 ^ row) * 16;
    uint4 words[kAhead];
    int from[kAhead];
    const auto fetch = [&](int n, int a) {  // row 4 n + lane / 8, n % kAhead = a
      words[a] = *reinterpret_cast<const uint4*>(block + 512 * n + (even ^ a % 2 * 64));
      from[a] = reach[4 * n + row];
    };
    CUTE_UNROLL
    for (int a = 0; a < kAhead; ++a) fetch(a, a);
    CUTE_NO_UNROLL
    for (int n = 0; n < 16; n += kAhead) {
      CUTE_UNROLL
      for (int a = 0; a < kAhead; ++a) {
        use(words[a], from[a]);
        fetch((n + kAhead) % 16 + a, a);  // into the same registers: a copy would wait
        keep_order();                     // or the assembler would read just before use
      }
    }
  }

  __device__ void load_near(const Tile& tile, int queries, int (&near)[8]) const {
    CUTE_UNROLL
    for (int q = 0; q < 8; q += 2) {
      const int2 two = *reinterpret_cast<const int2*>(tile.near + queries + lane % 8 * 8 + q);
      near[q] = two.x, near[q + 1] = two.y;
    }
  }

  __device__ void load_times(const TileRecord& tile) {
    if (!sums_time()) return;
    const TileTimes<false> all(p.bias, tile);
    CUTE_UNROLL
    for (int b = 0; b < kBlocks; ++b) {
      const int key = tile.first + first_key(b) + lane;
      const int64_t first = all.fixed(key), second = all.fixed(key + 32);
      times[64 * b + lane] = first, times[64 * b + lane + 32] = second;  // read by the same lane
    }
  }

  // `block`: dS of 64 queries, from `queries` of the step on, and 64 keys, whose times are `own`, from `keys` of the tile
  // on.
  __device__ void add_block(const char* block, const Tile& tile, const BiasStep& step, const int64_t* own,
                            int keys, int queries) {
    lane = settled(lane);  // what follows from it is dozens of registers: not kept from block to block
    const float scale = p.common.scales ? p.common.scales[step.tile.sequence] : p.common.scale;
    const int key = step.tile.first + keys, query = step.m * Shape::kQueries + queries;
    float total = 0.f;  // the lane's share of the sum of all
    if (sums_position()) total = add_diagonals(block, key - (query + step.tile.keys - step.tile.queries), scale);
    if (!sums_time()) return;
    lane = settled(lane);
    const TimeKind kind = tile.kind;
    if (kind == TimeKind::kOne) {
      add_few<0>(block, tile, queries, total, scale);
    } else if (kind == TimeKind::kFew) {
      write_reach(own, tile.sign, tile.shift[0]);
      add_between(block, tile, queries, total, scale);
    } else {
      const float largest = largest_of(block);
      if (!(largest - largest == 0.f)) {
        add_slowly(block, step.tile, own, query, scale);
      } else if (largest > 0.f) {  // or all of it is hidden
        const BucketCounter counter(buckets, lane, largest);
        if (kind == TimeKind::kNear) {
          write_reach(own, 1, tile.base);
          add_near(block, tile, queries, counter);
        } else {
          add_wide(block, step.tile, own, query, counter);
        }
        const bool known = kind == TimeKind::kNear;  // in which buckets the tile's pairs lie
        counter.flush(scale, known ? tile.first : 0, known ? tile.first + tile.edges : kMostBuckets - 1);
      }
    }
    sync_warp();  // `reach` is written next
  }

  // Adds the sums along the diagonals to this warp's copy of the position table; `apart`: key - query of the block's first
  // pair. Returns the lane's share of the sum of all.
  __device__ float add_diagonals(const char* block, int apart, float scale) const {
    const Diagonals diagonals(shared.gradient.diagonals[copy], lane);
    float sums[4];
    diagonals.add_up(block, sums);
    const float total = sums[0] + sums[1] + sums[2] + sums[3];
    if (Shape::kSumsByProducts && any_lane(!(total - total == 0.f))) diagonals.add_up_slowly(block, sums);
    if (p.bias.position_sums == nullptr) return total;
    const int entries = 2 * p.bias.max_positions - 1, first = apart + p.bias.max_positions - 64 + lane;
    float* table = p.bias.position_sums + (int64_t{blockIdx.x} * Teams::kCopies + copy) * entries;
    CUTE_UNROLL
    for (int n = 0; n < 4; ++n) {  // those outside of the table have no pair in the sequence
      const int place = first + 32 * n;
      if (place >= 0 && place < entries) add_to_global(table + place, scale * sums[n]);
    }
    return total;
  }

  // reach = sign * time - base, of the block's 64 key rows.
  __device__ void write_reach(const int64_t* own, int sign, int64_t base) {
    CUTE_UNROLL
    for (int k = lane; k < 64; k += 32) reach[k] = static_cast<int>(sign * own[k] - base);
    sync_warp();
  }

  __device__ void add_between(const char* block, const Tile& tile, int queries, float total, float scale) {
    const int count = tile.edges;
    if (count == 1) add_few<1>(block, tile, queries, total, scale);
    if (count == 2) add_few<2>(block, tile, queries, total, scale);
    if (count == 3) add_few<3>(block, tile, queries, total, scale);
    if constexpr (kFewEdges > 3) {
      if (count == 4) add_few<4>(block, tile, queries, total, scale);
      if (count == 5) add_few<5>(block, tile, queries, total, scale);
    }
  }

  // kEdges edges cut the tile: sums of what lies behind each. Where the warps split the tables `total` is still to be
  // summed.
  template <int kEdges>
  __device__ void add_few(const char* block, const Tile& tile, int queries, float total, float scale) {
    int near[8], further[kEdges + 1];
    float behind[kEdges + 1];
    if (kEdges > 0) load_near(tile, queries, near);
    CUTE_UNROLL
    for (int e = 0; e < kEdges; ++e) {
      behind[e] = 0.f;
      further[e] = static_cast<int>(tile.shift[e] - tile.shift[0]);
    }
    const auto add_row = [&](const uint4& words, int from) {
      const uint32_t pairs[4] = {words.x, words.y, words.z, words.w};
      CUTE_UNROLL
      for (int q = 0; q < 8; q += 2) {
        const auto ds = two_of<Element>(pairs[q / 2]);
        if (kSplit) total += ds[0] + ds[1];
        CUTE_UNROLL
        for (int e = 0; e < kEdges; ++e) {
          if (near[q] <= from - further[e]) behind[e] += ds[0];
          if (near[q + 1] <= from - further[e]) behind[e] += ds[1];
        }
      }
    };
    constexpr int kAhead = Shape::kGradientRegisters <= 40 || kEdges > 2 ? 2 : 4;
    if constexpr (kEdges > 0 || kSplit) each_row<kAhead>(block, add_row);
    // Shares of the buckets' sums, then the sums.
    float values[kEdges + 1] = {total};
    CUTE_UNROLL
    for (int e = 0; e < kEdges; ++e) {
      values[e] -= behind[e], values[e + 1] = behind[e];
    }
    CUTE_UNROLL
    for (int lanes = 16; lanes > 0; lanes /= 2) {
      CUTE_UNROLL
      for (int e = 0; e <= kEdges; ++e) values[e] += float_of(exchange(float_bits(values[e]), lanes));
    }
    if (lane > 0) return;
    float* sums = &buckets.sums[tile.first];
    float old[kEdges + 1];
    CUTE_UNROLL
    for (int e = 0; e <= kEdges; ++e) old[e] = sums[e];
    CUTE_UNROLL
    for (int e = 0; e <= kEdges; ++e) sums[e] = old[e] + values[e] * scale;
  }

  // The largest size in a block.
  __device__ float largest_of(const char* block) const {
    uint32_t largest = 0;  // two at a time: without signs, larger numbers have larger words
    each_row<4>(block, [&](const uint4& words, int) {
      const uint32_t first = larger_halves(words.x & 0x7fff7fff, words.y & 0x7fff7fff);
      largest = larger_halves(largest, larger_halves(first, larger_halves(words.z & 0x7fff7fff, words.w & 0x7fff7fff)));
    });
    CUTE_UNROLL
    for (int lanes = 16; lanes > 0; lanes /= 2) largest = larger_halves(largest, exchange(largest, lanes));
    const auto both = two_of<Element>(largest);
    return largest >> 16 > (largest & 0xffff) ? both[1] : both[0];
  }

  // A lane has 4 queries of every second key row. Those of a row are added while the next row's are looked up.
  __device__ void add_near(const char* block, const Tile& tile, int queries, const BucketCounter& counter) const {
    int near[4], size[4];
    NearInterval found[4];
    CUTE_UNROLL
    for (int q = 0; q < 4; q += 2) {
      const int2 two = *reinterpret_cast<const int2*>(tile.near + queries + lane % 16 * 4 + q);
      near[q] = two.x, near[q + 1] = two.y;
    }
    const int row = lane / 16, first = row * 128 + (lane % 16 / 2 ^ row) * 16 + lane % 2 * 8;
    uint2 words[2];  // of rows n and n + 1 (of 2 n + lane / 16)
    int from[2];     // of rows n + 1 and n + 2
    const auto fetch_words = [&](uint32_t n, int a) {
      words[a] = *reinterpret_cast<const uint2*>(block + 256 * (n % 32) + (first ^ n % 4 * 32));
    };
    const auto fetch_reach = [&](uint32_t n, int a) { from[a] = reach[2 * n % 64 + row]; };
    const auto look_up = [&](int a, int q) {
      const int apart = from[a] - near[q];
      size[q] = apart < 0 ? -apart : apart;
      found[q] = near_interval_of(shared.bias.buckets, size[q]);
    };
    fetch_words(0, 0), fetch_reach(0, 0), fetch_reach(1, 1);
    CUTE_UNROLL
    for (int q = 0; q < 4; ++q) look_up(0, q);
    CUTE_NO_UNROLL
    for (uint32_t n = 0; n < 32; n += 2) {
      CUTE_UNROLL
      for (int a = 0; a < 2; ++a) {
        int bucket[4];
        CUTE_UNROLL
        for (int q = 0; q < 4; ++q) bucket[q] = found[q].bucket + (size[q] >= found[q].edge);
        fetch_words(n + a + 1, 1 - a), fetch_reach(n + a + 2, a);
        CUTE_UNROLL
        for (int q = 0; q < 4; ++q) look_up(1 - a, q);
        keep_order();
        CUTE_UNROLL
        for (int q = 0; q < 4; q += 2) {
          const auto two = two_of<Element>(q == 0 ? words[a].x : words[a].y);
          counter.add(bucket[q], two[0]);
          counter.add(bucket[q + 1], two[1]);
        }
      }
    }
  }

  __device__ void add_wide(const char* block, const TileRecord& tile, const int64_t* own, int query,
                           const BucketCounter& counter) const {
    each_pair(block, tile, own, query, [&](int bucket, float value) { counter.add(bucket, value); });
  }

  // For what isn't finite: the lanes in turn.
  __device__ void add_slowly(const char* block, const TileRecord& tile, const int64_t* own, int query,
                             float scale) const {
    each_pair(block, tile, own, query, [&](int bucket, float value) {
      CUTE_NO_UNROLL
      for (int turn = 0; turn < 32; ++turn) {
        if (lane == turn) buckets.sums[bucket] += value * scale;
        sync_warp();
      }
    });
  }

  // Calls use(bucket, value) for two queries of each key row, two rows at a time.
  template <class Use>
  __device__ void each_pair(const char* block, const TileRecord& tile, const int64_t* own, int query, Use use) const {
    const TileTimes<false> all(p.bias, tile);
    const int64_t first = all.streamed(query + 2 * lane), second = all.streamed(query + 2 * lane + 1);
    sync_warp();  // other lanes wrote some of `own`
    CUTE_NO_UNROLL
    for (int k = 0; k < 64; k += 2) {
      const BucketTables& tables = shared.bias.buckets;
      uint64_t distances[4];
      int bucket[4];
      int64_t edges[4];
      const uint32_t words[2] = {read(block, k, 2 * lane), read(block, k + 1, 2 * lane)};
      CUTE_UNROLL
      for (int j = 0; j < 4; ++j) {  // bucket_of, four side by side
        distances[j] = distance_of(own[k + j / 2], j % 2 ? second : first);
        bucket[j] = tables.before[interval_of(distances[j])];
      }
      keep_order();
      CUTE_UNROLL
      for (int j = 0; j < 4; ++j) edges[j] = tables.edges[bucket[j] + 1];
      keep_order();
      CUTE_UNROLL
      for (int j = 0; j < 4; ++j)
        use(bucket[j] + (distances[j] >= static_cast<uint64_t>(edges[j])), two_of<Element>(words[j / 2])[j % 2]);
    }
  }

  __device__ void clear_buckets() {
    for (int b = lane; b < kMostBuckets; b += 32) {
      for (int c = 0; c < BucketSums::kColumns; ++c) buckets.counts[b][c] = 0;
      buckets.sums[b] = 0.f;
    }
    sync_warp();
  }

  __device__ void store_buckets() const {
    sync_warp();
    float* sums = p.bias.time_sums + (int64_t{blockIdx.x} * Teams::kCopies + copy) * p.bias.buckets;
    for (int b = lane; b < smaller(p.bias.buckets, kMostBuckets); b += 32) sums[b] = buckets.sums[b];
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
