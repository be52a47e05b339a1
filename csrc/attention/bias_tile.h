// The bias of a tile of scores.
//
// A tile has fixed rows (queries forward, keys backward: the accumulators' rows) and streams past tiles of the others.
// For the relative bias warps beside the one that loads prepare each streamed tile while the products of those before
// run: the piece of the position table that the tile needs, the streamed times, and how the buckets of distances are told.
//
// How buckets are told of a tile's times f of fixed and g of streamed rows, whichever of these will do first:
//
//   one bucket: all distances of the tile lie in it; its weight is in the piece of the position table already;
//   few edges cut the tile, and all distances have one sign s: s (f - g) >= edge is, with near = s g - base,
//     near <= s f - edge - base: one comparison of 32 bits and one addition for each edge;
//   distances below 2^30: an interval, an edge, a weight are looked up (buckets.h);
//   the rest: the same in 64 bits.
//
// Most tiles far from the diagonal are of the first kind. Forward the others are cut into parts, 16 fixed rows (a warp's)
// by 32 streamed ones, each of which is told in its own way: few edges cut a part even near the diagonal, where
// look-ups for the whole tile took longer than its products.
//
// Everything is halved: SiLU(x) = h + h tanh(h), h = x / 2. Or, where products are added to the bias, divided by alpha.
#pragma once

#include <cute/tensor.hpp>

#include "attention/barriers.h"
#include "attention/buckets.h"
#include "attention/mma.h"

namespace genrec::attention {

// Of a tile as a whole: one bucket; up to kFewEdges edges and distances of one sign; distances below 2^30; any.
enum class TimeKind : int { kOne, kFew, kNear, kWide };

constexpr int kFewEdges = 5;

// Of a part: kEdges + n for n edges that cut it, or how its weights are looked up. kInWindow: those of the whole tile are
// in the window already.
constexpr int kPartEdges = 5;
enum PartKind : uint8_t { kInWindow = 0, kEdges = 1, kLookUp = kEdges + kPartEdges + 1, kLookUpWide };

// A streamed row is behind the edge of fixed row f where its `near` is at most s f - origin + reach.
struct BiasEdge {
  int reach;
  float step;
};

struct BiasPart {
  BiasEdge edge[kPartEdges];
  float weight;  // before all edges; 0 where weights are looked up
};

template <int kPartRows, int kPartColumns>
struct BiasParts {
  BiasPart parts[kPartRows][kPartColumns];
  alignas(4) uint8_t kinds[kPartRows][4];  // those that a warp needs are one word, the rest of it is zero
  uint32_t origin;                         // the lowest digits of the least s f
};

struct NoBiasParts {};

// What a streamed tile's scores are added from. In shared memory; one warp writes, the consumers read.
template <int kFixed, int kStreamed, bool kHasParts = false>
struct BiasTile : cute::conditional_t<kHasParts, BiasParts<kFixed / 16, kStreamed / 32>, NoBiasParts> {
  static constexpr bool kParts = kHasParts;
  static constexpr int kRows = kFixed, kColumns = kStreamed;
  static constexpr int kPartRows = kFixed / 16, kPartColumns = kStreamed / 32;
  static constexpr int kWindow = kFixed + kStreamed - 1;
  // 16 banks between the copies: the even and the odd rows of a warp read beside each other.
  static constexpr int kStride = (kWindow + 15) / 32 * 32 + 16;

  // Entry column - row + kFixed - 1, twice: the second copy starts at entry 1, so that any two neighbours are aligned.
  alignas(16) float window[2][kStride];
  int near[kStreamed];
  int64_t base, shift[kFewEdges];  // shift: edge + base
  float step[kFewEdges];           // from the weight before an edge to that behind it
  TimeKind kind;
  int sign, first, edges;          // the tile's first bucket; the number of edges that cut it
};

struct NoBiasMemory {};

template <int kFixed, int kStreamed, int kStages, bool kParts = false>
struct RelativeBiasMemory {
  BiasTile<kFixed, kStreamed, kParts> tiles[kStages];
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

// Least and largest of the times that a warp's lanes hold.
struct TimeSpan {
  int64_t low, high;

  __device__ void take(const TimeSpan& other) {
    low = other.low < low ? other.low : low;
    high = other.high > high ? other.high : high;
  }
  // Of all lanes.
  __device__ TimeSpan of_warp() const { return {~largest(~low), largest(high)}; }
  // Of 16 neighbouring lanes.
  __device__ TimeSpan of_half_warp() const {
    TimeSpan span = *this;
    CUTE_UNROLL
    for (int lanes = 8; lanes > 0; lanes /= 2) {
      const TimeSpan other{exchange_time(span.low, lanes), exchange_time(span.high, lanes)};
      span.take(other);
    }
    return span;
  }

 private:
  // First by the high words, then by the low words of those that have the largest.
  __device__ static int64_t largest(int64_t time) {
    const int word = static_cast<int>(time >> 32), high = largest_of_warp(word);
    const uint32_t low = largest_of_warp(word == high ? static_cast<uint32_t>(time) : 0u);
    return join(static_cast<uint32_t>(high), low);
  }
  __device__ static int64_t join(uint32_t high, uint32_t low) {
    return static_cast<int64_t>(static_cast<uint64_t>(high) << 32 | low);
  }
  __device__ static int64_t exchange_time(int64_t time, int lanes) {
    const auto bits = static_cast<uint64_t>(time);
    return join(exchange(static_cast<uint32_t>(bits >> 32), lanes), exchange(static_cast<uint32_t>(bits), lanes));
  }
};

// What lies between the times f of fixed and g of streamed rows; none of them beyond 2^61.
struct TimeDistances {
  int64_t ahead, behind;  // least f - g and least g - f: all distances have one sign where either isn't negative
  int64_t nearest, farthest;

  __device__ TimeDistances(const TimeSpan& fixed, const TimeSpan& streamed)
      : ahead(fixed.low - streamed.high), behind(streamed.low - fixed.high), nearest(larger(larger(ahead, behind), 0)),
        farthest(larger(fixed.high - streamed.low, streamed.high - fixed.low)) {}
  __device__ bool one_sign() const { return ahead >= 0 || behind >= 0; }

 private:
  __device__ static int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
};

struct Buckets {
  int first, last;
};

// A warp that prepares tiles. Forward they are cut into parts.
template <bool kStreamsKeys, int kFixed, int kStreamed>
struct BiasWriter {
  using Tile = BiasTile<kFixed, kStreamed, kStreamsKeys>;
  static constexpr int kOwn = kStreamed / 32;             // streamed rows of a lane
  static constexpr int kPairs = 16 / Tile::kPartColumns;  // pairs of 16 fixed rows that the lanes have parts of at once
  static constexpr int kOwnParts = divide_up(kFixed / 32, kPairs);
  const RelativeBias& bias;
  const BucketTables& buckets;
  const TileTimes<kStreamsKeys> times;
  const float factor;  // of weights
  const int lane, shift;
  int first_fixed;
  int looks_back = kNever;  // rows from this one on, counted as keys are, see no later ones: parts of such need no weights
  TimeSpan fixed{kNoDistance, -kNoDistance};
  TimeSpan rows[kOwnParts];  // those of the lane's parts
  int64_t own[kOwn];

  // `record`: of the fixed tile; `weights_times`: what the weights of `tables` were multiplied with.
  __device__ BiasWriter(const RelativeBias& b, const BucketTables& tables, const TileRecord& record, float weights_times)
      : bias(b), buckets(tables), times(b, record), factor(weights_times), lane(threadIdx.x % 32), shift(record.keys - record.queries),
        first_fixed(record.first) {
    if (bias.time == nullptr) return;
    CUTE_UNROLL
    for (int n = 0; n < kFixed / 32; ++n) {
      const int64_t time = times.fixed(first_fixed + 32 * n + lane);
      fixed.take({time, time});
      if constexpr (Tile::kParts) {
        const TimeSpan half = TimeSpan{time, time}.of_half_warp();
        if (n == pair(n / kPairs) || n % kPairs == 0) rows[n / kPairs] = half;  // lanes without a part have another's
      }
    }
    fixed = fixed.of_warp();
  }

  // Reads what `put` needs: waiting for room in the ring goes on beside it.
  __device__ void fetch(int first_streamed) {
    if (bias.time == nullptr) return;
    CUTE_UNROLL
    for (int n = 0; n < kOwn; ++n) own[n] = times.streamed(first_streamed + 32 * n + lane);
  }

  __device__ void put(Tile& tile, int first_streamed) const {
    float constant = 0.f;
    TimeKind kind = TimeKind::kOne;
    if (bias.time != nullptr) {
      kind = put_times(tile, first_streamed, constant);
    } else {
      put_kinds(tile, kInWindow);
    }
    if (lane == 0) tile.kind = kind;
    put_window(tile, first_streamed, constant);
  }

  __device__ void write(Tile& tile, int first_streamed) {
    fetch(first_streamed);
    put(tile, first_streamed);
  }

 private:
  // Which pair of 16 fixed rows the lane's n-th part lies in; half-warps have one each.
  __device__ int pair(int n) const { return lane % 16 / Tile::kPartColumns + kPairs * n; }

  // All parts alike.
  __device__ void put_kinds(Tile& tile, PartKind kind) const {
    if constexpr (Tile::kParts) {
      for (int n = lane; n < Tile::kPartRows; n += 32) {
        *reinterpret_cast<uint32_t*>(tile.kinds[n]) = static_cast<uint32_t>(kind) * 0x1010101u;
        for (int column = 0; column < Tile::kPartColumns && kind != kInWindow; ++column) tile.parts[n][column].weight = 0.f;
      }
    }
  }

  // How buckets are told; `constant`: the weight that goes into the window.
  __device__ TimeKind put_times(Tile& tile, int first_streamed, float& constant) const {
    TimeSpan streamed{kNoDistance, -kNoDistance}, columns;  // columns: of the lane's parts
    CUTE_UNROLL
    for (int n = 0; n < kOwn; ++n) {
      const TimeSpan span = TimeSpan{own[n], own[n]}.of_warp();
      streamed.take(span);
      if (n == 0 || n == lane % Tile::kPartColumns) columns = span;
    }
    constexpr int64_t kSafe = int64_t{1} << 61, kShort = int64_t{1} << (kNearBits - 1);
    if (fixed.low <= -kSafe || fixed.high >= kSafe || streamed.low <= -kSafe || streamed.high >= kSafe) {
      put_kinds(tile, kLookUpWide);
      return TimeKind::kWide;
    }
    const TimeDistances apart(fixed, streamed);
    Buckets found[kOwnParts];
    const Buckets all = find_buckets(apart, columns, found);
    const int edges = all.last - all.first;
    if (lane == 0) tile.first = all.first;
    const bool brief = fixed.high - fixed.low < kShort && streamed.high - streamed.low < kShort;
    const bool few = apart.one_sign() && edges <= kFewEdges && brief;
    if (edges == 0 || (few && !Tile::kParts)) constant = buckets.weights[all.first];
    if (edges == 0) {
      put_kinds(tile, kInWindow);
      return TimeKind::kOne;
    }
    const int sign = !few || apart.ahead >= 0 ? 1 : -1;
    const int64_t base = sign > 0 ? streamed.low : -streamed.high, origin = sign > 0 ? fixed.low : -fixed.high;
    CUTE_UNROLL
    for (int n = 0; n < kOwn; ++n) tile.near[32 * n + lane] = static_cast<int>(sign * own[n] - base);
    if (lane == 0) tile.sign = sign, tile.base = base, tile.edges = edges;
    if constexpr (Tile::kParts) {
      if (lane == 0) tile.origin = static_cast<uint32_t>(origin);
      put_parts(tile, first_streamed, columns, found, brief, sign, origin - base);
    } else if (few && lane < edges) {
      tile.shift[lane] = buckets.edges[all.first + 1 + lane] + base;
      tile.step[lane] = buckets.weights[all.first + 1 + lane] - buckets.weights[all.first + lane];
    }
    return few ? TimeKind::kFew : apart.farthest < int64_t{1} << kNearBits ? TimeKind::kNear : TimeKind::kWide;
  }

  __device__ Buckets buckets_of(const TimeDistances& apart) const {
    return {bucket_of(buckets, distance_of(apart.nearest, 0)), bucket_of(buckets, distance_of(apart.farthest, 0))};
  }

  // The tile's, and those of the lane's parts.
  __device__ Buckets find_buckets(const TimeDistances& apart, const TimeSpan& columns, Buckets (&found)[kOwnParts]) const {
    if constexpr (!Tile::kParts) return buckets_of(apart);
    Buckets all{kMostBuckets, 0};
    CUTE_UNROLL
    for (int n = 0; n < kOwnParts; ++n) {
      found[n] = buckets_of(TimeDistances(rows[n], columns));
      all.first = smaller(all.first, found[n].first);
      all.last = larger(all.last, found[n].last);
    }
    return {-largest_of_warp(-all.first), largest_of_warp(all.last)};
  }

  __device__ void put_parts(Tile& tile, int first_streamed, const TimeSpan& columns, const Buckets (&found)[kOwnParts],
                            bool brief, int sign, int64_t offset) const {
    const int column = lane % Tile::kPartColumns;
    CUTE_UNROLL
    for (int n = 0; n < kOwnParts; ++n) {
      const int row = 2 * pair(n) + lane / 16;
      if (row >= Tile::kPartRows) continue;
      if (Tile::kPartColumns < 4) tile.kinds[row][3 - column] = kInWindow;
      const int first_row = first_fixed + shift + 16 * row;
      if (first_row >= looks_back && first_streamed + 32 * column > first_row + 15) {
        tile.kinds[row][column] = kInWindow;
        tile.parts[row][column].weight = 0.f;
        continue;
      }
      tile.kinds[row][column] = put_part(tile.parts[row][column], TimeDistances(rows[n], columns), found[n].first,
                                         found[n].last - found[n].first, brief, sign, offset);
    }
  }

  // `from`, `edges`: the part's first bucket, and how many edges come behind it; `brief`: whether the tile's times fit
  // into 30 bits; `offset`: origin - base.
  __device__ PartKind put_part(BiasPart& part, const TimeDistances& apart, int from, int edges, bool brief, int sign,
                               int64_t offset) const {
    const bool few = edges == 0 || (apart.one_sign() && edges <= kPartEdges && brief);
    part.weight = 0.f;
    if (!few) return apart.farthest < int64_t{1} << kNearBits ? kLookUp : kLookUpWide;
    // Distances s (f - g) fall as `near` rises; where they are negative ones, sizes rise: steps are taken back.
    const bool falling = (apart.ahead >= 0) == (sign > 0);
    part.weight = buckets.weights[falling ? from : from + edges];
    CUTE_NO_UNROLL
    for (int k = 0; k < edges; ++k) {
      constexpr int64_t kBeyond = int64_t{1} << kNearBits;  // every near, and none
      const int64_t edge = buckets.edges[from + 1 + k];
      const float step = buckets.weights[from + 1 + k] - buckets.weights[from + k];
      const int64_t reach = falling ? offset - edge : offset + edge - 1;
      part.edge[k] = {static_cast<int>(reach < -kBeyond ? -kBeyond : reach > kBeyond ? kBeyond : reach),
                      falling ? step : -step};
    }
    return static_cast<PartKind>(kEdges + edges);
  }

  __device__ void put_window(Tile& tile, int first_streamed, float constant) const {
    // Entry x of a tile of queries and keys is table entry (key - query + M - 1): it rises with x where keys stream.
    const int apart = kStreamsKeys ? first_streamed - (first_fixed + shift) - (kFixed - 1)
                                   : first_fixed - (first_streamed + shift) + (kFixed - 1);
    const int first = apart + bias.max_positions - 1, last = 2 * bias.max_positions - 2;
    for (int x = lane; x < Tile::kWindow; x += 32) {
      float value = constant;
      if (bias.position != nullptr) {
        const int entry = kStreamsKeys ? first + x : first - x;
        value += factor * bias.position[larger(0, smaller(entry, last))];  // pairs outside of the sequence are hidden
      }
      tile.window[0][x] = value;
      if (x > 0) tile.window[1][x - 1] = value;
    }
  }
};

}  // namespace genrec::attention
