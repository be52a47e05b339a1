// The kernel that puts the relative bias of whole sequences into its store (bias_store.h).
//
// Each warp has parts of its own. A part's times are told as bias_tile.h does, for each 16 rows: most lie in one bucket, or
// few edges cut them; near the diagonal weights are looked up.
#pragma once

#include "attention/bias_store.h"

namespace genrec::attention {

struct FillParams {
  RelativeBias bias;  // its store: where to
  WorkList list;      // tiles of queries, rows of cells
  MaskRule rule;
  int* counter;  // zero before the launch
};

constexpr int kFillThreads = 256;
constexpr int kFillResident = 3;  // blocks of a multiprocessor; four would spill
constexpr int kFillUnits = 8;  // units of work that 64 queries are cut into, each parts beside each other
constexpr int kFillParts = 4;  // of a unit, at least
constexpr int kMostFillEdges = 8;  // that cut 16 rows, beyond which looking weights up is quicker

// Times of 64 rows or columns, two of them a lane's, and their span.
struct SixtyFour {
  int64_t times[2];
  TimeSpan span;

  template <class Time>
  __device__ void read(Time time, int lane) {
    CUTE_UNROLL
    for (int n = 0; n < 2; ++n) times[n] = time(32 * n + lane);
    span = {times[0], times[0]};
    span.take({times[1], times[1]});
    span = span.of_warp();
  }
};

// How buckets of 16 rows are told.
struct FillRows {
  int first;  // bucket of the nearest
  int edges;  // that cut the rows; or how weights are looked up
  int before;  // whether streamed times lie before the rows', so that distances fall as they rise
};

// A warp's own: of a unit's queries, and of a part.
struct FillMemory {
  TimeSpan sixteens[4];  // of 16 queries each
  uint32_t digits[64];   // the lowest of each query's time
  // Of the position table, halved: entry column - row + 63, twice as in BiasTile.
  alignas(16) float window[2][144];
  int near[64];  // g - base of streamed times g
  FillRows rows[4];
};

struct FillShared {
  BucketTables buckets;
  FillMemory warps[kFillThreads / 32];
};

struct BiasFiller {
  static constexpr int kLookUp = -1, kLookUpWide = -2;
  const FillParams& p;
  const BucketTables& buckets;
  FillMemory& own;
  const int lane;

  __device__ void run() const {
    const int units = *p.list.length * (BiasCell::kCount * kFillUnits);
    for (;;) {
      const int unit = largest_of_warp(lane == 0 ? add_atomically(p.counter, 1) : 0);
      if (unit >= units) return;
      const TileRecord tile = p.list.tiles[unit / (BiasCell::kCount * kFillUnits)];
      const int m = tile.first / 64 + unit / kFillUnits % BiasCell::kCount;
      if (m * 64 < tile.queries && is_stored(p.bias.store, tile.sequence)) some_parts(tile, m, unit % kFillUnits);
    }
  }

 private:
  // Of the parts of 64 queries that the mask shows.
  __device__ void some_parts(const TileRecord& tile, int m, int unit) const {
    const SequenceMask<false> mask(tile.keys, tile.contexts, tile.targets, p.rule);
    const int i0 = m * 64 + tile.keys - tile.queries;
    const TileRanges ranges = mask.key_tiles(i0, smaller(i0 + 64, tile.keys), kCellKeys);
    const int count = ranges.count(), each = larger(kFillParts, divide_up(count, kFillUnits));
    const int end = smaller(count, (unit + 1) * each);
    if (unit * each >= end) return;
    const CellPlaces places(p.bias.store, stored_sequence(tile, mask), tile.sequence, 0, 1);
    const SequenceTimes times(p.bias, tile);
    SixtyFour queries;
    if (p.bias.time != nullptr) {
      queries.read([&](int i) { return times.query(64 * m + i); }, lane);
      put_queries(queries);
    }
    CUTE_NO_UNROLL
    for (int n = unit * each; n < end; ++n) {
      const int column = ranges.tile(n);
      const int64_t part = places.part<BiasCell>(m, column);
      if (part >= 0) one_part(times, queries.span, m * 64, column * kCellKeys, part);
    }
  }

  // What all parts of the unit need of its queries.
  __device__ void put_queries(const SixtyFour& queries) const {
    sync_warp();  // what the unit before left has been read
    CUTE_UNROLL
    for (int n = 0; n < 2; ++n) {
      const int64_t time = queries.times[n];
      own.digits[32 * n + lane] = static_cast<uint32_t>(time);
      const TimeSpan span = TimeSpan{time, time}.of_half_warp();
      if (lane % 16 == 0) own.sixteens[2 * n + lane / 16] = span;
    }
  }

  // `rows`: of the times of the part's queries.
  __device__ void one_part(const SequenceTimes& times, const TimeSpan& rows, int query, int key,
                           int64_t part) const {
    uint4* to = static_cast<uint4*>(const_cast<void*>(p.bias.store.data)) + part * (kBiasPartBytes / 16) + lane;
    sync_warp();  // what the part before left has been read
    put_window(key - (query + times.keys - times.queries));
    Told told{true, 0, 0};
    if (p.bias.time != nullptr) {
      SixtyFour keys;
      keys.read([&](int j) { return times.key(key + j); }, lane);
      told = put_times(rows, keys);
    }
    sync_warp();
    // The thread's first row and the column before its first; 16 rows down are 16 entries back.
    const int x = lane % 4 * 2 - lane / 4 + 63, odd = x & 1;
    const float* window = own.window[odd] + (x - odd) - 8;
    if (told.one) {
      one_bucket(window, p.bias.time == nullptr ? 0.f : buckets.weights[told.bucket], to);
      return;
    }
    const auto row_time = [&](int row) { return times.query(query + row); };  // of few parts
    const auto column_time = [&](int j) { return times.key(key + j); };
    CUTE_NO_UNROLL
    for (int n = 0; n < 4; ++n, window -= 16, to += stored_bias_at(1, 0, 0))
      sixteen_rows(row_time, column_time, 16 * n + lane / 4, own.rows[n], told.base, window, to);
  }

  // `apart`: of the part's first key from its first query.
  __device__ void put_window(int apart) const {
    const int middle = apart + p.bias.max_positions - 1, last = 2 * p.bias.max_positions - 2;
    CUTE_UNROLL
    for (int x = lane; x < 128; x += 32) {
      float value = 0.f;
      if (p.bias.position != nullptr)  // pairs outside of the sequence are hidden
        value = 0.5f * p.bias.position[larger(0, smaller(middle + x - 63, last))];
      own.window[0][x] = value;
      if (x > 0) own.window[1][x - 1] = value;
    }
  }

  struct Told {
    bool one;  // bucket, of the part
    int bucket;
    uint32_t base;  // the lowest digits of what streamed times are counted from
  };

  // Streamed times, and how buckets are told of each 16 rows.
  __device__ Told put_times(const TimeSpan& rows, const SixtyFour& streamed) const {
    const TimeSpan& columns = streamed.span;
    constexpr int64_t kSafe = int64_t{1} << 61, kShort = int64_t{1} << (kNearBits - 1);
    if (rows.low <= -kSafe || rows.high >= kSafe || columns.low <= -kSafe || columns.high >= kSafe) {
      if (lane < 4) own.rows[lane] = {0, kLookUpWide, 1};
      return {false, 0, 0};
    }
    const TimeDistances apart(rows, columns);
    const Buckets all = buckets_of(apart);
    if (all.first == all.last) return {true, all.first, 0};
    const bool brief = rows.high - rows.low < kShort && columns.high - columns.low < kShort;
    for (int n = 0; n < 2; ++n) own.near[32 * n + lane] = static_cast<int>(streamed.times[n] - columns.low);
    if (lane < 4) put_rows(lane, TimeDistances(own.sixteens[lane], columns), brief);
    return {false, 0, static_cast<uint32_t>(columns.low)};
  }

  __device__ Buckets buckets_of(const TimeDistances& apart) const {
    return {bucket_of(buckets, distance_of(apart.nearest, 0)), bucket_of(buckets, distance_of(apart.farthest, 0))};
  }

  __device__ void put_rows(int n, const TimeDistances& apart, bool brief) const {
    const Buckets found = buckets_of(apart);
    const int edges = found.last - found.first;
    const bool few = edges == 0 || (apart.one_sign() && edges <= kMostFillEdges && brief);
    const int kind = few ? edges : apart.farthest < int64_t{1} << kNearBits ? kLookUp : kLookUpWide;
    own.rows[n] = {found.first, kind, apart.ahead >= 0};
  }

  // Columns 8 to the right of a row are what stands 8 rows below: 15 pairs make up the thread's 64, and 7 stores the
  // 16.
  __device__ void one_bucket(const float* window, float weight, uint4* to) const {
    uint32_t words[15];
    CUTE_UNROLL
    for (int k = 0; k < 15; ++k) words[k] = pack_pair(window + 8 * (k - 6), weight);
    CUTE_UNROLL
    for (int right = -3; right <= 3; ++right) {  // 16 columns less 16 rows
      const int k = 2 * right + 7;
      const uint4 quad = make_uint4(words[k], words[k - 1], words[k + 1], words[k]);
      CUTE_UNROLL
      for (int n = larger(0, -right); n < 4 - larger(0, right); ++n) to[stored_bias_at(n, n + right, 0)] = quad;
    }
  }

  __device__ static uint32_t pack_pair(const float* window, float weight) {
    const float2 pair = *reinterpret_cast<const float2*>(window);
    return pack_finite_halves(pair.x + weight, pair.y + weight);
  }

  // 16 rows of a part, of which the thread's first is `row`.
  template <class RowTime, class ColumnTime>
  __device__ void sixteen_rows(RowTime row_time, ColumnTime column_time, int row, const FillRows& how, uint32_t base,
                               const float* window, uint4* to) const {
    const int edges = how.edges, first = how.first;
    if (edges == kLookUpWide) {
      look_up_wide(row_time(row), row_time(row + 8), column_time, window, to);
      return;
    }
    const uint32_t low = own.digits[row] - base, high = own.digits[row + 8] - base;
    if (edges == kLookUp) {
      look_up(low, high, window, to);
      return;
    }
    const bool before = how.before;
    const float weight = buckets.weights[before ? first : first + edges];
    if (edges == 0) {
      uint32_t words[9];
      CUTE_UNROLL
      for (int k = 0; k < 9; ++k) words[k] = pack_pair(window + 8 * k, weight);
      CUTE_UNROLL
      for (int c = 0; c < 4; ++c)
        to[32 * c] = make_uint4(words[2 * c + 1], words[2 * c], words[2 * c + 2], words[2 * c + 1]);
      return;
    }
    float values[32];
    CUTE_UNROLL
    for (int k = 0; k < 9; ++k) {
      const float2 pair = *reinterpret_cast<const float2*>(window + 8 * k);
      if (k > 0) values[4 * k - 4] = pair.x + weight, values[4 * k - 3] = pair.y + weight;
      if (k < 8) values[4 * k + 2] = pair.x + weight, values[4 * k + 3] = pair.y + weight;
    }
    add_edges(values, first, edges, before, low, high);
    CUTE_UNROLL
    for (int c = 0; c < 4; ++c) put(to + 32 * c, values + 8 * c);
  }

  // An edge is behind the rows' f where near <= f - edge, or, where distances rise with the streamed times, it is
  // before them where near < f + edge. Both sides fit into 32 bits, so that their lowest digits do.
  __device__ void add_edges(float (&values)[32], int first, int edges, bool before, uint32_t low,
                            uint32_t high) const {
    const int* near = own.near + lane % 4 * 2;
    CUTE_NO_UNROLL
    for (int k = 0; k < edges; ++k) {
      const auto edge = static_cast<uint32_t>(buckets.edges[first + 1 + k]);
      const uint32_t reach = before ? 0u - edge : edge - 1;
      const float up = buckets.weights[first + 1 + k] - buckets.weights[first + k], step = before ? up : -up;
      const int reach_low = static_cast<int>(low + reach), reach_high = static_cast<int>(high + reach);
      CUTE_UNROLL
      for (int e = 0; e < 32; e += 4) {
        const int2 streamed = *reinterpret_cast<const int2*>(near + 2 * e);
        if (streamed.x <= reach_low) values[e] += step;
        if (streamed.y <= reach_low) values[e + 1] += step;
        if (streamed.x <= reach_high) values[e + 2] += step;
        if (streamed.y <= reach_high) values[e + 3] += step;
      }
    }
  }

  // Every weight looked up, 16 columns at a time. `low`, `high`: times of the thread's rows, counted as streamed ones are.
  __device__ void look_up(uint32_t low, uint32_t high, const float* window, uint4* to) const {
    const int* near = own.near + lane % 4 * 2;
    CUTE_NO_UNROLL
    for (int c = 0; c < 4; ++c) {
      sixteen_columns(window + 16 * c, to + 32 * c, [&](int e) {
        const auto streamed = static_cast<uint32_t>(near[16 * c + element_column(e)]);
        return near_bucket_of(buckets, static_cast<int>((element_row(e) ? high : low) - streamed));
      });
    }
  }

  // Where distances need more than 32 bits.
  template <class ColumnTime>
  __device__ void look_up_wide(int64_t low, int64_t high, ColumnTime column_time, const float* window, uint4* to) const {
    CUTE_NO_UNROLL
    for (int c = 0; c < 4; ++c) {
      sixteen_columns(window + 16 * c, to + 32 * c, [&](int e) {
        const int64_t streamed = column_time(lane % 4 * 2 + 16 * c + element_column(e));
        return bucket_of(buckets, distance_of(element_row(e) ? high : low, streamed));
      });
    }
  }

  // `bucket_at`: of the thread's e-th of 16 x 16 pairs.
  template <class BucketAt>
  __device__ void sixteen_columns(const float* window, uint4* to, BucketAt bucket_at) const {
    float values[8];
    CUTE_UNROLL
    for (int e = 0; e < 8; e += 2) {
      const float2 pair = *reinterpret_cast<const float2*>(window + element_column(e) + 8 - element_row(e));
      values[e] = pair.x + buckets.weights[bucket_at(e)], values[e + 1] = pair.y + buckets.weights[bucket_at(e + 1)];
    }
    put(to, values);
  }

  __device__ static void put(uint4* to, const float* values) {
    *to = make_uint4(pack_finite_halves(values[0], values[1]), pack_finite_halves(values[2], values[3]),
                     pack_finite_halves(values[4], values[5]), pack_finite_halves(values[6], values[7]));
  }
};

__global__ void __launch_bounds__(kFillThreads, kFillResident) fill_bias_kernel(const __grid_constant__ FillParams p) {
  GENREC_SHARED_MEMORY(memory);
  auto& shared = *reinterpret_cast<FillShared*>(memory);
  let_next_kernel_start();
  fill_buckets<kFillThreads>(shared.buckets, p.bias, 0.5f);
  sync_block(kFillThreads);
  BiasFiller{p, shared.buckets, shared.warps[threadIdx.x / 32], static_cast<int>(threadIdx.x % 32)}.run();
}

}  // namespace genrec::attention
