// Sums of a block of dS by time bucket, of one warp, in whole numbers.
//
// Additions of floating-point numbers to the same place would have to wait for each other. Whole numbers are added by
// shared memory itself, in any order with the same sum: what is added of a block is counted in units of 2^-18 of the
// block's largest power of two, so that 4096 pairs fit 32 bits. A unit is a 1024th of what dS itself, rounded to 16 bits,
// is uncertain by where it is largest. After each block the counts go to sums in fp32.
#pragma once

#include "attention/buckets.h"

namespace genrec::attention {

struct BucketSums {
  static constexpr int kColumns = 8;  // lanes that differ in these three bits never meet
  alignas(16) int counts[kMostBuckets][kColumns];  // zero between blocks
  float sums[kMostBuckets];
};

struct BucketCounter {
  BucketSums& memory;
  const int lane;
  int* const column;
  float unit, units;  // the value of a count, and its inverse

  // `largest`: no value's size is beyond it; finite.
  __device__ BucketCounter(BucketSums& own, int lane_, float largest)
      : memory(own), lane(lane_), column(&own.counts[0][lane_ % BucketSums::kColumns]) {
    constexpr int kLeast = 27;  // exponents below would have an inverse beyond fp32's
    const int exponent = larger(static_cast<int>(float_bits(largest) >> 23), kLeast);
    unit = float_of(static_cast<uint32_t>(exponent - 17) << 23);
    units = float_of(static_cast<uint32_t>(254 + 17 - exponent) << 23);
  }

  __device__ void add(int bucket, float value) const {
    // The sum's last digit is 1: rounded to the nearest whole number, in the lower bits.
    constexpr float kOnes = 12582912.f;  // 1.5 * 2^23
    const int count = static_cast<int>(float_bits(fmaf(value, units, kOnes)) - 0x4b400000u);
    add_to_shared(column + bucket * BucketSums::kColumns, count);
  }

  // All lanes come here, after the block's last addition. Nothing was added to buckets before `first` or behind `last`.
  __device__ void flush(float scale, int first, int last) const {
    sync_warp();
    CUTE_NO_UNROLL
    for (int b = first + lane; b <= last; b += 32) {
      int4* counts = reinterpret_cast<int4*>(memory.counts[b]);
      const int4 low = counts[0], high = counts[1];
      counts[0] = counts[1] = int4{0, 0, 0, 0};
      const int count = low.x + low.y + low.z + low.w + (high.x + high.y + high.z + high.w);
      if (count != 0) memory.sums[b] += unit * static_cast<float>(count) * scale;
    }
    sync_warp();
  }
};

}  // namespace genrec::attention
