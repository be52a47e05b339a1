// Sums along the diagonals of a 64 x 64 block of dS in shared memory, by one warp.
//
// The block is cut into pieces of 8 x 8. Pieces whose numbers differ by the same s (key piece - query piece) hold the same
// diagonals in the same places: they are added up element by element in fp32, by additions or by products with the
// identity, whichever takes less time (backward.h says which: products stand in line behind the consumers' own).
// The 8 pieces (i, (i + t) mod 8) are those of s = t and, around the corner, of s = t - 8. Row r of what is added up for s
// belongs to key 8 s + r, so that diagonal d gathers entry d - r of every row r, and rows are laid out side by side in
// shared memory for that.
#pragma once

#include <cutlass/numeric_conversion.h>

#include "attention/ds_block.h"

namespace genrec::attention {

// Two neighbouring elements of a word.
template <class Element>
__device__ inline cutlass::Array<float, 2> two_of(uint32_t word) {
  return cutlass::NumericArrayConverter<float, Element, 2>{}(
      *reinterpret_cast<const cutlass::Array<Element, 2>*>(&word));
}

template <class Element, class Block>
struct DiagonalRows {
  static constexpr int kMargin = 8;  // zeros before and behind each row's 120 entries
  static constexpr int kStride = kMargin + 120 + kMargin;  // 8 banks from row to row
  using Memory = float[8][kStride];

  Memory& memory;
  const int lane;
  const uint32_t identity;  // this lane's two entries of an 8 x 8 identity, as a product's left operand

  __device__ DiagonalRows(Memory& own, int lane_)
      : memory(own), lane(lane_), identity(identity_entries(lane_)) {}

  // Before the first block.
  __device__ void clear_margins() const {
    for (int x = lane; x < 16 * 8; x += 32) memory[x / 16][x % 16 < kMargin ? x % 16 : x % 16 + 120] = 0.f;
    sync_warp();
  }

  // add_up, one by one: for blocks with numbers that aren't finite, which products would spread over their columns.
  __device__ void add_up_slowly(const char* block, float (&sums)[4]) const {
    CUTE_UNROLL
    for (int n = 0; n < 4; ++n) {
      const int apart = lane + 32 * n - 63;
      float sum = 0.f;
      CUTE_NO_UNROLL
      for (int k = apart > 0 ? apart : 0; k < 64 && k - apart < 64; ++k) {
        const int query = k - apart;
        sum += static_cast<float>(*reinterpret_cast<const Element*>(block + Block::at(k, query / 8) + query % 8 * 2));
      }
      sums[n] = sum;
    }
  }

 private:
  // Row l / 4, columns 2 (l % 4) and the next; the lower column in the lower half.
  __device__ static uint32_t identity_entries(int lane) {
    const uint32_t one = Element(1.f).storage;
    const int apart = lane / 4 - lane % 4 * 2;
    return apart == 0 ? one : apart == 1 ? one << 16 : 0;
  }
};

template <class Element, bool kProducts>
struct DiagonalSums : DiagonalRows<Element, SwizzledBlock> {
  using Rows = DiagonalRows<Element, SwizzledBlock>;
  using Rows::Rows, Rows::memory, Rows::lane, Rows::identity, Rows::kMargin;
  static constexpr int kAhead = 4;  // loads under way: shared memory is slow beside the consumers' products

  // sums[n]: of the pairs with key - query = lane + 32 n - 63.
  __device__ void add_up(const char* block, float (&sums)[4]) const {
    const int row = lane % 8;  // which this lane names to the load, of a piece of number lane / 8
    const char* own_row[2] = {block + row * 128 + (lane / 8 ^ row) * 16, block + row * 128 + (lane / 8 + 4 ^ row) * 16};
    uint32_t words[kAhead][4];
    // Pieces (i, (i + t) mod 8) for four i's, the lower ones where n is even; t = n / 2.
    const auto fetch = [&](int n) {
      const int down = lane / 8 * 1024 + (n / 2 + n % 2 * 4) * 1024 & 7 * 1024;
      kProducts ? load_matrices_transposed(own_row[n % 2] + down, words[n % kAhead])
                : load_matrices(own_row[n % 2] + down, words[n % kAhead]);
    };
    CUTE_UNROLL
    for (int n = 0; n < kAhead; ++n) fetch(n);
    float* own = &memory[lane / 4][kMargin + 62 - lane % 4 * 2];
    CUTE_UNROLL
    for (int t = 0; t < 8; ++t) {
      float pieces[4] = {0.f, 0.f, 0.f, 0.f};  // two entries of s = t, two of s = t - 8
      CUTE_UNROLL
      for (int n = 2 * t; n < 2 * t + 2; ++n) {
        const int own_pieces = 8 - t - n % 2 * 4;  // of s = t, among these four
        kProducts ? multiply(words[n % kAhead], own_pieces, pieces) : add(words[n % kAhead], own_pieces, pieces);
        if (n + kAhead < 16) fetch(n + kAhead);
      }
      // Entries fall with the query.
      *reinterpret_cast<float2*>(own + 8 * t) = make_float2(pieces[1], pieces[0]);
      if (t > 0) *reinterpret_cast<float2*>(own + 8 * (t - 8)) = make_float2(pieces[3], pieces[2]);
    }
    sync_warp();
    CUTE_UNROLL
    for (int n = 0; n < 4; ++n) {
      sums[n] = 0.f;
      CUTE_UNROLL
      for (int r = 0; r < 8; ++r) sums[n] += memory[r][kMargin + lane + 32 * n - r];
    }
    sync_warp();  // the next block's sums go to the same place
  }

 private:
  // Four pieces to sums of the first `own` of them and of the others.
  __device__ static void add(const uint32_t (&words)[4], int own, float (&sums)[4]) {
    CUTE_UNROLL
    for (int j = 0; j < 4; ++j) {
      const auto two = two_of<Element>(words[j]);
      const int from = j < own ? 0 : 2;
      sums[from] += two[0];
      sums[from + 1] += two[1];
    }
  }

  // The same by products of 16 x 8: the first ones' sum in the upper rows, the others' in the lower ones.
  __device__ void multiply(const uint32_t (&words)[4], int own, float (&sums)[4]) const {
    CUTE_UNROLL
    for (int j = 0; j < 4; j += 2) {
      const bool a = j < own, b = j + 1 < own;
      add_product<Element>(sums, a ? identity : 0, a ? 0 : identity, b ? identity : 0, b ? 0 : identity, words[j],
                           words[j + 1]);
    }
  }
};

// The same for blocks that aren't swizzled, by products alone, each with the same left operand: the upper rows gather pieces
// (i, i + t), the lower ones those across, (i + t, i). Here entries rise with the query.
template <class Element>
struct PairedDiagonalSums : DiagonalRows<Element, TiledBlock> {
  using Rows = DiagonalRows<Element, TiledBlock>;
  using Rows::Rows, Rows::memory, Rows::lane, Rows::identity, Rows::kMargin;

  __device__ void add_up(const char* block, float (&sums)[4]) const {
    // A load brings four pieces, (i, i + t) and across for two of i: i and i + 1 of one t, or the last ones of two t.
    constexpr int kLoads = 16, kAhead = 8;
    constexpr int first_t[kLoads] = {1, 2, 3, 4, 1, 2, 3, 4, 0, 5, 1, 2, 0, 6, 1, 5};
    constexpr int second_t[kLoads] = {1, 2, 3, 4, 1, 2, 3, 4, 0, 5, 1, 2, 0, 6, 3, 7};
    constexpr int first_i[kLoads] = {0, 0, 0, 0, 2, 2, 2, 2, 0, 0, 4, 4, 4, 0, 6, 2};
    constexpr int kAlong = TiledBlock::at(8, 1), kOwn = TiledBlock::at(8, 0), kAcross = TiledBlock::at(0, 1);
    const bool across = lane / 8 % 2, second = lane / 16;
    const char* row = block + lane % 8 * 16 + (second ? kAlong : 0);
    const char* diagonal = row + (second ? kAlong : 0) + (across ? kAlong : 0);  // of t = 0: i to i + 3
    const int down = across ? kAcross : kOwn, further = second ? 2 * down - 3 * kAlong : 0;
    // From other lanes: of words that it knows the assembler would write new ones for each product. Lane 2 holds a zero.
    const auto held_by = [&](int other) { return float_bits(from_lane(float_of(identity), other)); };
    const uint32_t left[4] = {held_by(lane), held_by(2), held_by(3), held_by(lane)};
    uint32_t words[kAhead][4];
    const auto fetch = [&](int n) {
      const int t = first_t[n];
      const char* from = t == 0 ? diagonal : row + t * down;
      load_matrices_transposed(from + (t == second_t[n] ? 0 : further) + first_i[n] * kAlong, words[n % kAhead]);
    };
    float pieces[8][4];
    CUTE_UNROLL
    for (int t = 0; t < 8; ++t) pieces[t][0] = pieces[t][1] = pieces[t][2] = pieces[t][3] = 0.f;
    CUTE_UNROLL
    for (int n = 0; n < kAhead; ++n) fetch(n);
    CUTE_UNROLL
    for (int n = 0; n < kLoads; ++n) {
      const uint32_t(&own)[4] = words[n % kAhead];
      add_product<Element>(pieces[first_t[n]], left[0], left[1], left[2], left[3], own[0], own[1]);
      add_product<Element>(pieces[second_t[n]], left[0], left[1], left[2], left[3], own[2], own[3]);
      if (n + kAhead < kLoads) fetch(n + kAhead);
    }
    float* own = &memory[lane / 4][kMargin + 56 + lane % 4 * 2];
    *reinterpret_cast<float2*>(own) = make_float2(pieces[0][0] + pieces[0][2], pieces[0][1] + pieces[0][3]);
    CUTE_UNROLL
    for (int t = 1; t < 8; ++t) {
      *reinterpret_cast<float2*>(own - 8 * t) = make_float2(pieces[t][0], pieces[t][1]);
      *reinterpret_cast<float2*>(own + 8 * t) = make_float2(pieces[t][2], pieces[t][3]);
    }
    sync_warp();
    CUTE_UNROLL
    for (int n = 0; n < 4; ++n) {
      sums[n] = 0.f;
      CUTE_UNROLL
      for (int r = 0; r < 8; ++r) sums[n] += memory[r][kMargin + 119 - lane - 32 * n + r];
    }
    sync_warp();  // the next block's sums go to the same place
  }
};

}  // namespace genrec::attention
