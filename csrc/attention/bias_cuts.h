// Sums of what lies on one side of a bucket's edge, of a block of dS whose queries' times rise, by one warp.
//
// Of each key the queries below some number c are on one side of the edge. A search among the times finds c; a comparison of
// halves, numbers of queries with c, makes a mask for two pairs; products with ones add up what it leaves.
#pragma once

#include "attention/bias_diagonals.h"

namespace genrec::attention {

// How many of 64 rising numbers are less than `bound`, for two bounds side by side.
__device__ inline void count_below(const int* rising, int first_bound, int second_bound, int& first, int& second) {
  first = second = 0;
  CUTE_UNROLL
  for (int step = 32; step > 0; step /= 2) {
    if (rising[first + step - 1] < first_bound) first += step;
    if (rising[second + step - 1] < second_bound) second += step;
  }
  first += rising[first] < first_bound, second += rising[second] < second_bound;
}

// Sum of the pairs whose query is below `first` (keys 0 to 31, one a lane) or `second` (the others). A TiledBlock.
template <class Element>
__device__ inline float sum_below(const char* block, int first, int second, int lane) {
  // Whole numbers from 1024 on are the lower ten bits of their halves.
  constexpr uint32_t kTwice = 0x10001, kOf1024 = 0x6400 * kTwice;
  const uint32_t below[2] = {kOf1024 + first * kTwice, kOf1024 + second * kTwice};
  const uint32_t ones = Element(1.f).storage * kTwice;
  constexpr int kAhead = 4;
  uint4 words[kAhead];  // a lane has 8 queries of a key
  const auto fetch = [&](int n) { words[n % kAhead] = *reinterpret_cast<const uint4*>(block + 512 * n + 16 * lane); };
  float sums[2][4] = {};
  const int most = largest_of_warp(larger(first, second));
  CUTE_UNROLL
  for (int n = 0; n < kAhead; ++n) fetch(n);
  CUTE_UNROLL
  for (int n = 0; n < 16; ++n) {
    if (n % 4 == 0 && n / 2 * 8 >= most) break;
    const uint4 own = words[n % kAhead];
    if (n + kAhead < 16) fetch(n + kAhead);
    const uint32_t query = kOf1024 + n / 2 * 8 * kTwice + (1 << 16), to = below[n % 2];
    add_product<Element>(sums[n % 2], own.x & halves_below(query, to), own.y & halves_below(query + 2 * kTwice, to),
                         own.z & halves_below(query + 4 * kTwice, to), own.w & halves_below(query + 6 * kTwice, to), ones,
                         ones);
  }
  float sum = (sums[0][0] + sums[0][2]) + (sums[1][0] + sums[1][2]);  // of two rows of each product, the quad's
  CUTE_UNROLL
  for (int lanes = 16; lanes > 2; lanes /= 2) sum += float_of(exchange(float_bits(sum), lanes));
  return sum;
}

}  // namespace genrec::attention
