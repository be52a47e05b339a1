// Gradients of the relative bias's tables from one block of dS, 64 x 64 pairs in shared memory, by one warp.
//
// A warp has its own copies of the tables. Additions of floating-point numbers have a fixed order, and a last kernel adds
// the copies up. Position: bias_diagonals.h; what it gives is added to the warp's copy by reductions that nobody waits for,
// and nobody else adds to that copy. Over stored dS it is the block's copy where the order may differ from run to run.
// Time: a few edges are compared with, pair by pair or, where times rise, by bias_cuts.h; where buckets are looked up,
// bias_histogram.h adds.
//
// Beside products a read of shared memory takes some 200 cycles, and a warp waits for its own alone: what a block takes is
// the number of its waits. So reads are issued some rows before their use.
#pragma once

#include "attention/bias_cuts.h"
#include "attention/bias_histogram.h"
#include "attention/bias_tile.h"

namespace genrec::attention {

// A warp's own.
struct BlockMemory {
  BucketSums buckets;
  float diagonals[8][136];
  int reach[64];  // of each key: what `near` of a query is compared with
};

// Where there is less room: diagonals and counts in the same place.
struct SmallBlockMemory {
  BucketSums buckets;
  int reach[64];
};

// Shape::Block: how the block lies there (ds_block.h); Shape::BlockTile: what is known of its times, as a BiasTile has it
// (of tiled blocks: BlockTimes).
template <class Shape>
struct BlockSums {
  using Element = typename Shape::Element;
  using Block = typename Shape::Block;
  using Tile = typename Shape::BlockTile;
  using Memory = typename Shape::BlockMemory;
  static constexpr bool kTiled = cute::is_same_v<Block, TiledBlock>;
  using Diagonals =
      cute::conditional_t<kTiled, PairedDiagonalSums<Element>, DiagonalSums<Element, Shape::kSumsByProducts>>;
  static constexpr bool kSplit = Shape::kSplitTables, kOneScratch = cute::is_same_v<Memory, SmallBlockMemory>;
  static constexpr int kCopies = Shape::kTableCopies;

  const typename Shape::Params& p;
  const BucketTables& tables;
  Memory& memory;
  const int warp, copy;
  int lane;
  int (&reach)[64];
  // Of tiled blocks: the lane's share of what the last ones, of one bucket all, add to it.
  float pending = 0.f;
  int pending_bucket = 0;

  // `number`: of the warp; where warps split the tables, the first has the position table, the second the time table.
  __device__ BlockSums(const typename Shape::Params& params, const BucketTables& buckets, Memory& own, int number)
      : p(params), tables(buckets), memory(own), warp(number), copy(kSplit ? 0 : number), lane(threadIdx.x % 32),
        reach(own.reach) {}

  // Constant but where warps split the tables.
  __device__ bool sums_position() const { return !kSplit || warp == 0; }
  __device__ bool sums_time() const { return (!kSplit || warp == 1) && p.bias.time_sums != nullptr; }

  // Before the first block.
  __device__ void clear() {
    if (sums_time()) {
      if (!kOneScratch) clear_counts(0, kMostBuckets - 1);
      for (int b = lane; b < kMostBuckets; b += 32) memory.buckets.sums[b] = 0.f;
      sync_warp();
    }
    if (sums_position()) diagonals().clear_margins();
  }

  // `block`: dS of 64 keys, from `key` of the sequence on, whose times are `own`, and 64 queries, from `query` on, whose
  // `near` lie from `queries` on. `record`: of any tile of the sequence.
  __device__ void add_block(const char* block, const Tile& tile, const TileRecord& record, const int64_t* own, int key,
                            int query, int queries, float scale) {
    lane = settled(lane);  // what follows from it is dozens of registers: not kept from block to block
    float total = 0.f;  // the lane's share of the sum of all
    if (sums_position()) total = add_diagonals(block, key - (query + record.keys - record.queries), scale);
    if (!sums_time()) return;
    lane = settled(lane);
    const TimeKind kind = tile.kind;
    if (kind == TimeKind::kOne) {
      if constexpr (kTiled) {
        add_whole(tile.first, total * scale);
      } else {
        add_few<0>(block, tile, queries, total, scale);
      }
    } else if (kTiled && kind == TimeKind::kFew) {
      if constexpr (kTiled) add_cut(block, tile, own, total, scale);
    } else if (kind == TimeKind::kFew) {
      write_reach(own, tile.sign, tile.shift[0]);
      add_between(block, tile, queries, total, scale);
    } else {
      const float largest = largest_of(block);
      if (!(largest - largest == 0.f)) {
        add_slowly(block, record, own, query, scale);
      } else if (largest > 0.f) {  // or all of it is hidden
        const bool known = kind == TimeKind::kNear;  // in which buckets the tile's pairs lie
        const int first = known ? tile.first : 0, last = known ? tile.first + tile.edges : kMostBuckets - 1;
        if (kOneScratch) clear_counts(first, last);
        const BucketCounter counter(memory.buckets, lane, largest);
        if (kind == TimeKind::kNear) {
          write_reach(own, 1, tile.base);
          add_near(block, tile, queries, counter);
        } else {
          add_wide(block, record, own, query, counter);
        }
        counter.flush(scale, first, last);
        if (kOneScratch) diagonals().clear_margins();
      }
    }
    sync_warp();  // `reach` is written next
  }

  // Behind the last one.
  __device__ void store() {
    if (!sums_time()) return;
    if (kTiled) flush_pending();
    sync_warp();
    float* sums = p.bias.time_sums + (int64_t{blockIdx.x} * kCopies + copy) * p.bias.buckets;
    for (int b = lane; b < smaller(p.bias.buckets, kMostBuckets); b += 32) sums[b] = memory.buckets.sums[b];
  }

 private:
  __device__ Diagonals diagonals() const {
    if constexpr (kOneScratch) {
      using Scratch = typename Diagonals::Memory;
      static_assert(sizeof(Scratch) <= sizeof(memory.buckets.counts), "diagonals lie where counts do");
      return Diagonals(reinterpret_cast<Scratch&>(memory.buckets.counts), lane);
    } else {
      return Diagonals(memory.diagonals, lane);
    }
  }

  __device__ void clear_counts(int first, int last) const {
    CUTE_NO_UNROLL
    for (int b = first + lane; b <= last; b += 32) {
      int4* counts = reinterpret_cast<int4*>(memory.buckets.counts[b]);
      counts[0] = counts[1] = int4{0, 0, 0, 0};
    }
    sync_warp();
  }

  // Queries `query` (even) and the next of key row `key` of a block.
  __device__ static uint32_t read(const char* block, int key, int query) {
    return *reinterpret_cast<const uint32_t*>(block + Block::at(key, query / 8) + query % 8 * 2);
  }

  // Calls use(words, reach) for the lane's 8 queries of each of its 16 key rows. kAhead reads are under way: beside the
  // consumers' products shared memory takes some 200 cycles, and nothing else of the warp hides them.
  template <int kAhead, class Use>
  __device__ void each_row(const char* block, Use use) const {
    static_assert(kAhead % 2 == 0 && 16 % kAhead == 0, "rows are unrolled by kAhead, even and odd ones are swizzled apart");
    const int piece = lane % 8, row = lane / 8, even = Block::at(Block::key(row, piece), piece);
    uint4 words[kAhead];
    int from[kAhead];
    const auto fetch = [&](int n, int a) {  // row 4 n + lane / 8, n % kAhead = a
      words[a] = *reinterpret_cast<const uint4*>(block + Block::rows(4 * n) + (even ^ a % 2 * 64));
      from[a] = reach[Block::key(4 * n + row, piece)];
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

  // Adds the sums along the diagonals to this warp's copy of the position table; `apart`: key - query of the block's first
  // pair. Returns the lane's share of the sum of all.
  __device__ float add_diagonals(const char* block, int apart, float scale) const {
    const Diagonals diagonals = this->diagonals();
    float sums[4];
    diagonals.add_up(block, sums);
    const float total = sums[0] + sums[1] + sums[2] + sums[3];
    if (Shape::kSumsByProducts && any_lane(!(total - total == 0.f))) diagonals.add_up_slowly(block, sums);
    if (p.bias.position_sums == nullptr) return total;
    const int entries = 2 * p.bias.max_positions - 1, first = apart + p.bias.max_positions - 64 + lane;
    const bool shares = kTiled && p.turns == nullptr;
    const int64_t number = shares ? int64_t{blockIdx.x} : int64_t{blockIdx.x} * kCopies + copy;
    float* table = p.bias.position_sums + number * entries;
    if (kTiled && first >= lane && first - lane + 127 < entries) {
      table += first;
      CUTE_UNROLL
      for (int n = 0; n < 4; ++n) add_to_global(table + 32 * n, scale * sums[n]);
      return total;
    }
    CUTE_UNROLL
    for (int n = 0; n < 4; ++n) {  // those outside of the table have no pair in the sequence
      const int place = first + 32 * n;
      if (place >= 0 && place < entries) add_to_global(table + place, scale * sums[n]);
    }
    return total;
  }

  // All pairs are in one bucket; far from the diagonal those of the next block are in the same.
  __device__ void add_whole(int bucket, float share) {
    if (bucket != pending_bucket) {
      flush_pending();
      pending_bucket = bucket;
    }
    pending += share;
  }

  __device__ void flush_pending() {
    const float sum = sum_of_warp(pending);
    if (lane == 0) memory.buckets.sums[pending_bucket] += sum;
    pending = 0.f;
  }

  __device__ static float sum_of_warp(float share) {
    CUTE_UNROLL
    for (int lanes = 16; lanes > 0; lanes /= 2) share += float_of(exchange(float_bits(share), lanes));
    return share;
  }

  // Edges cut a block whose queries' times rise. `total`: the lane's share of the sum of all.
  __device__ void add_cut(const char* block, const Tile& tile, const int64_t* own, float total, float scale) {
    const bool keys_later = tile.sign > 0;  // then the first queries are those behind an edge
    const float all = sum_of_warp(total);
    float* const sums = &memory.buckets.sums[tile.first];
    const int edges = tile.edges;
    float before = 0.f;  // sum of the queries before the last edge
    if (keys_later) before = all;
    CUTE_NO_UNROLL
    for (int e = 0; e < edges; ++e) {
      const int64_t shift = tile.shift[e];
      int first, second;
      count_below(tile.near, static_cast<int>(own[lane] - shift), static_cast<int>(own[lane + 32] - shift), first, second);
      const float below = sum_below<Element>(block, first, second, lane);
      const float between = keys_later ? before - below : below - before;
      if (lane == 0) sums[e] += between * scale;
      before = below;
    }
    if (lane == 0) sums[edges] += (keys_later ? before : all - before) * scale;
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
    float* sums = &memory.buckets.sums[tile.first];
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
    const int piece = lane % 16 / 2, row = lane / 16;
    const int first = Block::at(Block::key(row, piece), piece) + lane % 2 * 8;
    uint2 words[2];  // of rows n and n + 1 (of 2 n + lane / 16)
    int from[2];     // of rows n + 1 and n + 2
    const auto fetch_words = [&](uint32_t n, int a) {
      words[a] = *reinterpret_cast<const uint2*>(block + Block::rows(2 * (n % 32)) + (first ^ n % 4 * 32));
    };
    const auto fetch_reach = [&](uint32_t n, int a) { from[a] = reach[Block::key(2 * n % 64 + row, piece)]; };
    const auto look_up = [&](int a, int q) {
      const int apart = from[a] - near[q];
      size[q] = apart < 0 ? -apart : apart;
      found[q] = near_interval_of(tables, size[q]);
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
        if (lane == turn) memory.buckets.sums[bucket] += value * scale;
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
    for (int n = 0; n < 64; n += 2) {
      uint64_t distances[4];
      int bucket[4];
      int64_t edges[4];
      const int keys[2] = {Block::key(n, lane / 4), Block::key(n + 1, lane / 4)};
      const uint32_t words[2] = {read(block, keys[0], 2 * lane), read(block, keys[1], 2 * lane)};
      CUTE_UNROLL
      for (int j = 0; j < 4; ++j) {  // bucket_of, four side by side
        distances[j] = distance_of(own[keys[j / 2]], j % 2 ? second : first);
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
};

}  // namespace genrec::attention
