// The bias added to scores, by the threads that hold them; what it is added from: bias_tile.h.
#pragma once

#include "attention/bias_tile.h"
#include "attention/mma.h"

namespace genrec::attention {

// What a thread reads of a tile for kSize scores: columns -8, 0, 8 ... of the window and their neighbours of its first row,
// which are columns 0, 8, 16 ... of the second, 8 further down; kinds of parts. `read` may come before the scores are
// there: with kAhead the values are held in registers from then on, the weights of parts added to them.
template <int kSize, bool kAhead>
struct BiasValues {
  static constexpr bool kHasWeights = kAhead;
  static constexpr int kBlocks = kSize / 4, kParts = kSize / 16;  // of 8 columns, and of 32
  uint32_t kinds;

  template <class Tile>
  __device__ void read(const Tile& tile, int row, int column) {
    // So that the compiler knows that they are the same in all lanes.
    kinds = largest_of_warp(*reinterpret_cast<const uint32_t*>(tile.kinds[row / 16]));
    const int x = column - row + Tile::kRows - 1, odd = x & 1;
    window_ = tile.window[odd] + (x - odd) - 8;
    if constexpr (kAhead) {
      CUTE_UNROLL
      for (int n = 0; n < kBlocks; ++n) first_[n] = load(n + 1);
      second_[0] = load(0);
      CUTE_UNROLL
      for (int p = 1; p < kParts; ++p) second_[p] = first_[4 * p - 1];
      if (kinds == kInWindow) return;
      CUTE_UNROLL
      for (int p = 0; p < kParts; ++p) {
        const float weight = tile.parts[row / 16][p].weight;
        second_[p].x += weight, second_[p].y += weight;
        CUTE_UNROLL
        for (int n = 4 * p; n < 4 * p + 4; ++n) first_[n].x += weight, first_[n].y += weight;
      }
    }
  }

  // Whether `add` adds all of the bias: no part has edges or is looked up.
  __device__ bool complete() const {
    static_assert(kInWindow == 0 && kEdges == 1, "the lowest bit tells apart what needs no more");
    return kHasWeights ? (kinds & ~0x01010101u) == 0 : kinds == 0;
  }

  // h = half_alpha s + window.
  template <class Scores>
  __device__ void add(Scores& scores, float half_alpha) const {
    float2 before = kAhead ? second_[0] : load(0);
    CUTE_UNROLL
    for (int e = 0; e < kSize; e += 4) {
      if (!kAhead && e % 16 == 0) keep_order();
      if (kAhead && e % 16 == 0) before = second_[e / 16];
      const float2 now = kAhead ? first_[e / 4] : load(e / 4 + 1);
      scores(e) = fmaf(scores(e), half_alpha, now.x);
      scores(e + 1) = fmaf(scores(e + 1), half_alpha, now.y);
      scores(e + 2) = fmaf(scores(e + 2), half_alpha, before.x);
      scores(e + 3) = fmaf(scores(e + 3), half_alpha, before.y);
      before = now;
    }
  }

 private:
  const float* window_;
  // Of the thread's first row; and of its second in each part's first 8 columns, those of the others are the first's.
  float2 first_[kAhead ? kBlocks : 1], second_[kAhead ? kParts : 1];

  __device__ float2 load(int n) const { return *reinterpret_cast<const float2*>(window_ + 8 * n); }
};

// The edges of 16 scores from the `first`-th on, a part of a tile. `near`: of the thread's first column of it; `low`,
// `high`: s f of its rows, lowest digits. kAhead: times are read once for all edges, and each edge before the last is done
// with; that takes a dozen registers.
template <bool kAhead, class Scores, class Tile>
__device__ inline void add_edges(Scores& scores, int first, const Tile& tile, const BiasPart& part, int edges,
                                 const int* near, uint32_t low, uint32_t high) {
  const auto times_of = [&](int n) { return *reinterpret_cast<const int2*>(near + 8 * n); };
  BiasEdge edge = part.edge[0];
  int2 held[4];
  CUTE_UNROLL
  for (int n = 0; kAhead && n < 4; ++n) held[n] = times_of(n);
  CUTE_NO_UNROLL
  for (int k = 0; k < edges; ++k) {
    if (!kAhead) edge = part.edge[k];
    const int reach_low = static_cast<int>(low - tile.origin) + edge.reach;
    const int reach_high = static_cast<int>(high - tile.origin) + edge.reach;
    const float step = edge.step;
    if (kAhead) edge = part.edge[smaller(k + 1, kPartEdges - 1)];
    CUTE_UNROLL
    for (int n = 0; n < 4; ++n) {
      if (!kAhead && n % 2 == 0) keep_order();
      const int e = first + 4 * n;
      const int2 times = kAhead ? held[n] : times_of(n);
      if (times.x <= reach_low) scores(e) += step;
      if (times.y <= reach_low) scores(e + 1) += step;
      if (times.x <= reach_high) scores(e + 2) += step;
      if (times.y <= reach_high) scores(e + 3) += step;
    }
  }
}

// The same with every weight looked up, in 32 bits. Loops that are not unrolled keep the code short, so that what runs more
// often stays in the cache of instructions; but scores can't be indexed in them.
template <class Scores, class Tile>
__device__ inline void add_looked_up(Scores& scores, int first, const Tile& tile, const BucketTables& buckets,
                                     const int* near, uint32_t low, uint32_t high) {
  const auto base = static_cast<uint32_t>(tile.base);
  CUTE_NO_UNROLL
  for (int n = 0; n < 16; n += 4) {
    keep_order();
    const int2 times = *reinterpret_cast<const int2*>(near + 2 * n);
    float weights[4];
    CUTE_UNROLL
    for (int e = 0; e < 4; ++e) {
      const auto time = static_cast<uint32_t>(e % 2 ? times.y : times.x);
      const auto apart = static_cast<int>((e < 2 ? low : high) - base - time);
      weights[e] = buckets.weights[near_bucket_of(buckets, apart)];
    }
    CUTE_UNROLL
    for (int e = 0; e < 16; ++e)
      if (e / 4 * 4 == n) scores(first + e) += weights[e % 4];
  }
}

// In 64 bits. `fixed(down)`: f of the row so far below the thread's first; `streamed(column)`: g. Rare.
template <class Scores, class Fixed, class Streamed>
__device__ inline void add_looked_up_wide(Scores& scores, int first, const BucketTables& buckets, int column, Fixed fixed,
                                          Streamed streamed) {
  CUTE_NO_UNROLL
  for (int n = 0; n < 16; n += 2) {
    float weights[2];
    CUTE_UNROLL
    for (int e = 0; e < 2; ++e) {
      keep_order();
      const uint64_t apart = distance_of(fixed(element_row(n)), streamed(column + element_column(n) + e));
      weights[e] = buckets.weights[bucket_of(buckets, apart)];
    }
    CUTE_UNROLL
    for (int e = 0; e < 16; ++e)
      if (e / 2 * 2 == n) scores(first + e) += weights[e % 2];
  }
}

// Turns a thread's scores s of a tile that is cut into parts into h = (alpha s + bias) / 2. `row`, `column`: where its
// accumulators lie in the tile; `low`, `high`: the lowest digits of its two rows' times; `fixed(down)`: the time of the row
// so far below the first of them, `streamed(column)`: a streamed row's.
template <class Scores, class Values, class Tile, class Fixed, class Streamed>
__device__ inline void add_bias_by_parts(Scores& scores, float half_alpha, const Values& values, const Tile& tile,
                                         const BucketTables& buckets, int row, int column, uint32_t low, uint32_t high,
                                         Fixed fixed, Streamed streamed) {
  constexpr int kSize = decltype(cute::size(scores))::value;
  values.add(scores, half_alpha);
  if (values.complete()) return;
  const BiasPart* parts = tile.parts[row / 16];
  low *= static_cast<uint32_t>(tile.sign), high *= static_cast<uint32_t>(tile.sign);
  CUTE_UNROLL
  for (int first = 0; first < kSize; first += 16) {
    const BiasPart& part = parts[first / 16];
    const int kind = values.kinds >> first / 2 & 0xff, from = column + 2 * first;
    keep_order();
    if (kind < kLookUp) {
      if constexpr (!Values::kHasWeights) {
        const float weight = part.weight;
        CUTE_UNROLL
        for (int e = first; e < first + 16; ++e) scores(e) += weight;
      }
      if (kind > kEdges) add_edges<Values::kHasWeights>(scores, first, tile, part, kind - kEdges, tile.near + from, low, high);
    } else if (kind == kLookUp) {
      add_looked_up(scores, first, tile, buckets, tile.near + from, low, high);
    } else {
      add_looked_up_wide(scores, first, buckets, from, fixed, streamed);
    }
  }
}

// The same for a tile that isn't; or, with kFirst, the bias that products will be added to. `low`, `high`: the times of the
// thread's two rows.
template <bool kFirst, class Scores, class Tile, class Streamed>
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
    const float values[4] = {now.x, now.y, before.x, before.y};
    CUTE_UNROLL
    for (int j = 0; j < 4; ++j) scores(e + j) = kFirst ? values[j] : fmaf(scores(e + j), half_alpha, values[j]);
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
      scores(e) += buckets.weights[near_bucket_of(buckets, apart)];
    }
  } else if (kind == TimeKind::kWide) {
    CUTE_UNROLL
    for (int e = 0; e < kSize; ++e) {
      if (e % 2 == 0) keep_order();
      const uint64_t apart = distance_of(element_row(e) ? high : low, streamed(column + element_column(e)));
      scores(e) += buckets.weights[bucket_of(buckets, apart)];
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
