// The bias of a tile of scores.
//
// A tile has fixed rows (queries forward, keys backward: the accumulators' rows) and streams past tiles of the others.
// For the relative bias a warp beside the one that loads prepares each streamed tile while the products of the one
// before run: the piece of the position table that the tile needs, the streamed times, and how their buckets are told:
//
//   kOne   all distances of the tile lie in one bucket: its weight is in the piece of the position table already;
//   kFew   up to three edges cut the tile, and all distances have one sign s: s (f - g) >= edge is, with
//          near = s g - base, near <= s f - edge - base: one comparison of 32 bits and one addition for each edge;
//   kNear  distances below 2^30: an interval, an edge, a weight are looked up (buckets.h);
//   kWide  the rest, in 64 bits.
//
// Most tiles far from the diagonal are of the first two kinds. Everything is halved: SiLU(x) = h + h tanh(h), h = x / 2.
#pragma once

#include <cute/tensor.hpp>

#include "attention/barriers.h"
#include "attention/buckets.h"
#include "attention/mma.h"

namespace genrec::attention {

enum class TimeKind : int { kOne, kFew, kNear, kWide };

constexpr int kFewEdges = 3;

// What a streamed tile's scores are added from. In shared memory; one warp writes, the consumers read.
template <int kFixed, int kStreamed>
struct BiasTile {
  static constexpr int kRows = kFixed, kColumns = kStreamed;
  static constexpr int kWindow = kFixed + kStreamed - 1;
  // 16 banks between the copies: the even and the odd rows of a warp read beside each other.
  static constexpr int kStride = (kWindow + 15) / 32 * 32 + 16;

  // Entry column - row + kFixed - 1, twice: the second copy starts at entry 1, so that any two neighbours are aligned.
  alignas(16) float window[2][kStride];
  int near[kStreamed];
  int64_t base, shift[kFewEdges];  // shift: edge + base
  float step[kFewEdges];           // from the weight before an edge to that behind it
  TimeKind kind;
  int sign, first, edges;          // the tile's first bucket; the number of edges that cut it (kFew)
};

struct NoBiasMemory {};

template <int kFixed, int kStreamed, int kStages>
struct RelativeBiasMemory {
  BiasTile<kFixed, kStreamed> tiles[kStages];
  BucketTables buckets;
  Ring<kStages> ring;
};

// Times of one sequence's rows; those beyond its end are its last one's.
struct SequenceTimes {
  const int64_t* of_keys;
  const int64_t* of_queries;
  int keys, queries;

  __device__ SequenceTimes(const RelativeBias& bias, const TileRecord& tile)
      : of_keys(bias.key_times + tile.key_start),
        of_queries(bias.query_times ? bias.query_times + tile.query_start : nullptr),
        keys(tile.keys), queries(tile.queries) {}
  __device__ int64_t key(int j) const { return of_keys[smaller(j, keys - 1)]; }
  // Counted from the sequence's first query.
  __device__ int64_t query(int i) const {
    return of_queries ? of_queries[smaller(i, queries - 1)] : key(i + keys - queries + 1);
  }
};

// Which of the two is fixed. Rows are counted from the sequence's first key or query.
template <bool kStreamsKeys>
struct TileTimes : SequenceTimes {
  using SequenceTimes::SequenceTimes;
  __device__ int64_t fixed(int row) const { return kStreamsKeys ? query(row) : key(row); }
  __device__ int64_t streamed(int row) const { return kStreamsKeys ? key(row) : query(row); }
};

struct TimeSpan {
  int64_t low, high;

  __device__ void take(int64_t time) {
    low = time < low ? time : low;
    high = time > high ? time : high;
  }
  // Of the warp's lanes together.
  __device__ void gather() {
    CUTE_UNROLL
    for (int lanes = 16; lanes > 0; lanes /= 2) {
      const int64_t other_low = exchange_time(low, lanes), other_high = exchange_time(high, lanes);
      take(other_low);
      take(other_high);
    }
  }

 private:
  __device__ static int64_t exchange_time(int64_t time, int lanes) {
    const auto bits = static_cast<uint64_t>(time);
    const uint64_t high = exchange(static_cast<uint32_t>(bits >> 32), lanes);
    return static_cast<int64_t>(high << 32 | exchange(static_cast<uint32_t>(bits), lanes));
  }
};

// The warp that prepares tiles.
template <bool kStreamsKeys, int kFixed, int kStreamed>
struct BiasWriter {
  using Tile = BiasTile<kFixed, kStreamed>;
  const RelativeBias& bias;
  const BucketTables& buckets;
  const TileTimes<kStreamsKeys> times;
  const int lane, shift;
  int first_fixed;
  TimeSpan fixed{kNoDistance, -kNoDistance};

  // `record`: of the fixed tile.
  __device__ BiasWriter(const RelativeBias& b, const BucketTables& tables, const TileRecord& record)
      : bias(b), buckets(tables), times(b, record), lane(threadIdx.x % 32), shift(record.keys - record.queries),
        first_fixed(record.first) {
    if (bias.time == nullptr) return;
    CUTE_UNROLL
    for (int n = 0; n < kFixed; n += 32) fixed.take(times.fixed(first_fixed + n + lane));
    fixed.gather();
  }

  __device__ void write(Tile& tile, int first_streamed) const {
    float constant = 0.f;
    TimeKind kind = TimeKind::kOne;
    if (bias.time != nullptr) kind = write_times(tile, first_streamed, constant);
    if (lane == 0) tile.kind = kind;
    write_window(tile, first_streamed, constant);
  }

 private:
  // How buckets are told; `constant`: the half weight that every pair has.
  __device__ TimeKind write_times(Tile& tile, int first_streamed, float& constant) const {
    constexpr int kOwn = kStreamed / 32;
    int64_t own[kOwn];
    TimeSpan streamed{kNoDistance, -kNoDistance};
    CUTE_UNROLL
    for (int n = 0; n < kOwn; ++n) streamed.take(own[n] = times.streamed(first_streamed + 32 * n + lane));
    streamed.gather();
    constexpr int64_t kSafe = int64_t{1} << 61, kShort = int64_t{1} << (kNearBits - 1);
    const bool safe = fixed.low > -kSafe && fixed.high < kSafe && streamed.low > -kSafe && streamed.high < kSafe;
    if (!safe) return TimeKind::kWide;
    const int64_t ahead = fixed.low - streamed.high, behind = streamed.low - fixed.high;
    const int64_t farthest = larger64(fixed.high - streamed.low, streamed.high - fixed.low);
    const int first = bucket_of(buckets, distance_of(larger64(larger64(ahead, behind), 0), 0));
    const int edges = bucket_of(buckets, distance_of(farthest, 0)) - first;
    const bool one_sign = ahead >= 0 || behind >= 0;
    const bool few = one_sign && edges <= kFewEdges && fixed.high - fixed.low < kShort &&
                     streamed.high - streamed.low < kShort;
    if (lane == 0) tile.first = first;
    if (edges == 0 || few) constant = buckets.half_weights[first];
    if (edges == 0) return TimeKind::kOne;
    const int sign = !few || ahead >= 0 ? 1 : -1;
    const int64_t base = sign > 0 ? streamed.low : -streamed.high;
    CUTE_UNROLL
    for (int n = 0; n < kOwn; ++n) tile.near[32 * n + lane] = static_cast<int>(sign * own[n] - base);
    if (lane == 0) tile.sign = sign, tile.base = base, tile.edges = edges;
    if (!few) return farthest < int64_t{1} << kNearBits ? TimeKind::kNear : TimeKind::kWide;
    if (lane < edges) {
      tile.shift[lane] = buckets.edges[first + 1 + lane] + base;
      tile.step[lane] = buckets.half_weights[first + 1 + lane] - buckets.half_weights[first + lane];
    }
    return TimeKind::kFew;
  }

  __device__ void write_window(Tile& tile, int first_streamed, float constant) const {
    // Entry x of a tile of queries and keys is table entry (key - query + M - 1): it rises with x where keys stream.
    const int apart = kStreamsKeys ? first_streamed - (first_fixed + shift) - (kFixed - 1)
                                   : first_fixed - (first_streamed + shift) + (kFixed - 1);
    const int first = apart + bias.max_positions - 1, last = 2 * bias.max_positions - 2;
    for (int x = lane; x < Tile::kWindow; x += 32) {
      float value = constant;
      if (bias.position != nullptr) {
        const int entry = kStreamsKeys ? first + x : first - x;
        value += 0.5f * bias.position[larger(0, smaller(entry, last))];  // pairs outside of the sequence are hidden
      }
      tile.window[0][x] = value;
      if (x > 0) tile.window[1][x - 1] = value;
    }
  }

  __device__ static int64_t larger64(int64_t a, int64_t b) { return a > b ? a : b; }
};

// Turns a thread's scores s into h = (alpha s + bias) / 2. `row`, `column`: where its accumulators lie in the tile;
// `low`, `high`: times of its two rows; `streamed(column)`: a streamed row's time.
template <class Scores, class Tile, class Streamed>
__device__ inline void add_relative_bias(Scores& scores, float half_alpha, const Tile& tile, const BucketTables& buckets,
                                         int row, int column, int64_t low, int64_t high, Streamed streamed) {
  constexpr int kSize = decltype(cute::size(scores))::value;
  const int x = column - row + Tile::kRows - 1, odd = x & 1;
  const float* window = tile.window[odd] + (x - odd);
  float2 before = *reinterpret_cast<const float2*>(window - 8);  // of the thread's second row, 8 further down
  CUTE_UNROLL
  for (int e = 0; e < kSize; e += 4) {
    if (e % 16 == 0) keep_order();
    const float2 now = *reinterpret_cast<const float2*>(window + 2 * e);
    scores(e) = fmaf(scores(e), half_alpha, now.x);
    scores(e + 1) = fmaf(scores(e + 1), half_alpha, now.y);
    scores(e + 2) = fmaf(scores(e + 2), half_alpha, before.x);
    scores(e + 3) = fmaf(scores(e + 3), half_alpha, before.y);
    before = now;
  }
  const TimeKind kind = tile.kind;
  const int* near = tile.near + column;
  if (kind == TimeKind::kFew) {
    for (int k = 0; k < tile.edges; ++k) {
      const int reach_low = static_cast<int>(tile.sign * low - tile.shift[k]);
      const int reach_high = static_cast<int>(tile.sign * high - tile.shift[k]);
      const float step = tile.step[k];
      CUTE_UNROLL
      for (int e = 0; e < kSize; e += 4) {
        if (e % 16 == 0) keep_order();
        const int2 times = *reinterpret_cast<const int2*>(near + 2 * e);
        if (times.x <= reach_low) scores(e) += step;
        if (times.y <= reach_low) scores(e + 1) += step;
        if (times.x <= reach_high) scores(e + 2) += step;
        if (times.y <= reach_high) scores(e + 3) += step;
      }
    }
  } else if (kind == TimeKind::kNear) {
    const int near_low = static_cast<int>(low - tile.base), near_high = static_cast<int>(high - tile.base);
    CUTE_UNROLL
    for (int e = 0; e < kSize; ++e) {
      if (e % 8 == 0) keep_order();
      const int apart = (element_row(e) ? near_high : near_low) - near[element_column(e)];
      scores(e) += buckets.half_weights[near_bucket_of(buckets, apart)];
    }
  } else if (kind == TimeKind::kWide) {
    CUTE_UNROLL
    for (int e = 0; e < kSize; ++e) {
      if (e % 2 == 0) keep_order();
      const uint64_t apart = distance_of(element_row(e) ? high : low, streamed(column + element_column(e)));
      scores(e) += buckets.half_weights[bucket_of(buckets, apart)];
    }
  }
}

// The same for a dense bias. `query`, `key`: the thread's first pair, counted from the sequence's first query and key;
// pairs at `queries` and `keys` or beyond have none.
template <bool kStreamsKeys, class Scores>
__device__ inline void add_dense_bias(Scores& scores, float half_alpha, const DenseBias& bias, int sequence, int head,
                                      int query, int key, int queries, int keys) {
  constexpr int kSize = decltype(cute::size(scores))::value;
  const float* from = bias.data + sequence * bias.batch_stride + head * bias.head_stride;
  CUTE_UNROLL
  for (int e = 0; e < kSize; ++e) {
    const int i = query + (kStreamsKeys ? element_row(e) : element_column(e));
    const int j = key + (kStreamsKeys ? element_column(e) : element_row(e));
    const float value = i < queries && j < keys ? from[i * bias.row_stride + j] : 0.f;
    scores(e) = fmaf(scores(e), half_alpha, 0.5f * value);
  }
}

}  // namespace genrec::attention
