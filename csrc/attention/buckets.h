// Time buckets: which of the integer edges a distance has reached, exactly, for every 64-bit distance.
//
// A distance m, converted to fp32 by cutting digits off, names by its exponent and three bits of mantissa one of eight
// intervals an octave. Edges lie at least a factor 1.35 apart (below 16 each interval holds one integer), so that an
// interval holds one edge at most: what comes before it is known, and one comparison of integers decides.
#pragma once

#include "attention/device.h"
#include "attention/params.h"

namespace genrec::attention {

constexpr int kMostBuckets = 146;  // no 64-bit distance reaches a later one
constexpr int64_t kNoDistance = 0x7fffffffffffffff;
constexpr int64_t kFarthest = kNoDistance - 1;
constexpr int kNearBits = 30;  // distances below 2^30 have a table in 32 bits
constexpr int kNearIntervals = 8 * kNearBits, kIntervals = 8 * 63;

// An interval's only edge (the largest number where it holds none that counts) and the bucket before it.
struct NearInterval {
  int edge, bucket;
};

// In shared memory.
struct BucketTables {
  int64_t edges[kMostBuckets + 1];  // first distance of each bucket; kNoDistance beyond the table's last
  NearInterval near[kNearIntervals];
  float weights[kMostBuckets];  // times a factor
  uint8_t before[kIntervals];  // bucket of an interval's first distance
};

// Of distances from 1 on.
template <class Unsigned>
__device__ inline int interval_of(Unsigned distance) {
  return static_cast<int>(float_bits_below(distance) >> 20) - (127 << 3);
}

// The least distance of an interval (of the next one that holds any, where it holds none).
GENREC_HOST_DEVICE constexpr int64_t interval_start(int interval) {
  const int octave = interval / 8;
  const int64_t eighths = 8 + interval % 8;
  return octave < 3 ? ((eighths << octave) + 7) >> 3 : eighths << (octave - 3);
}

// The clamps are those of genrec.attention.time_bucket; 0 lies in the bucket of 1.
__device__ inline uint64_t distance_of(int64_t a, int64_t b) {
  const auto apart = static_cast<int64_t>(static_cast<uint64_t>(a) - static_cast<uint64_t>(b));
  const uint64_t size = apart < 0 ? uint64_t{0} - static_cast<uint64_t>(apart) : static_cast<uint64_t>(apart);
  return size > kFarthest ? kFarthest : size < 1 ? 1 : size;
}

__device__ inline int bucket_of(const BucketTables& tables, uint64_t distance) {
  const int before = tables.before[interval_of(distance)];
  return before + (distance >= static_cast<uint64_t>(tables.edges[before + 1]));
}

// Of a distance below 2^30.
__device__ inline NearInterval near_interval_of(const BucketTables& tables, int size) {
  return tables.near[interval_of(static_cast<uint32_t>(larger(size, 1)))];
}

// A distance below 2^30, given as the difference of two numbers of 32 bits.
__device__ inline int near_bucket_of(const BucketTables& tables, int apart) {
  const int size = apart < 0 ? -apart : apart;
  const NearInterval found = near_interval_of(tables, size);
  return found.bucket + (size >= found.edge);
}

__device__ inline void load_buckets(BucketTables& tables, const RelativeBias& bias, float factor, int thread, int threads) {
  const int buckets = bias.time == nullptr ? 0 : smaller(bias.buckets, kMostBuckets);
  for (int b = thread; b <= kMostBuckets; b += threads) {
    tables.edges[b] = b == 0 ? 0 : b < buckets ? bias.edges[b - 1] : kNoDistance;
    if (b < kMostBuckets) tables.weights[b] = b < buckets ? factor * bias.time[b] : 0.f;
  }
}

__device__ inline void index_buckets(BucketTables& tables, int thread, int threads) {
  for (int interval = thread; interval < kIntervals; interval += threads) {
    const int64_t least = interval_start(interval);
    int low = 0, high = kMostBuckets;  // edges[low] <= least, edges[high] isn't or is kNoDistance
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      (tables.edges[middle] <= least ? low : high) = middle;
    }
    tables.before[interval] = static_cast<uint8_t>(low);
    const int64_t edge = tables.edges[low + 1];
    if (interval < kNearIntervals)
      tables.near[interval] = {edge < 0x7fffffff ? static_cast<int>(edge) : 0x7fffffff, low};
  }
}

// Called by all threads of a block, before a barrier.
template <int kThreads>
__device__ inline void fill_buckets(BucketTables& tables, const RelativeBias& bias, float factor) {
  load_buckets(tables, bias, factor, threadIdx.x, kThreads);
  sync_block(kThreads);
  index_buckets(tables, threadIdx.x, kThreads);
}

}  // namespace genrec::attention
