// The relative bias of whole sequences in device memory, computed once for all heads before the kernels that add it.
//
// Heads share the tables. A kernel that computes the bias beside its products does so once for each head, and what
// tells buckets takes longer than the products; a kernel that loads two bytes a pair, most of them from the L2 cache
// since heads run at the same time, hardly notices. Halved (SiLU(x) = h + h tanh(h), h = x / 2), in fp16, which has
// three digits more than the weights that come of the sum are rounded to; what lies beyond its range, which no table
// in use comes near, becomes its largest number.
//
// The bias lies in the cells of dS for one head (ds_store.h), their parts 64 queries x 64 keys. A part has the order of
// the forward pass's accumulators (S = Q K^T): for each warp of a warpgroup (16 queries), each 16 keys and each lane, what
// is added to 8 of its scores. Backward, S^T = K Q^T, blocks of 8 x 8 are transposed (part_bias.h).
#pragma once

#include "attention/bias_tile.h"

namespace genrec::attention {

using BiasCell = CellParts<64>;
constexpr int kBiasPartBytes = BiasCell::kElements * 2;

// A place in a part, counted in 16 bytes.
__device__ constexpr int stored_bias_at(int warp, int columns16, int lane) { return (warp * 4 + columns16) * 32 + lane; }

// Parts of 64 queries, one behind the other in the order of keys.
struct StoredBiasRow {
  const char* first;
  int last;  // the last part's number: those behind it are masked, and read as it

  StoredBiasRow() = default;
  template <class Mask>
  __device__ StoredBiasRow(const BiasStore& store, const TileRecord& tile, const Mask& mask, int m) {
    const CellPlaces places(store, stored_sequence(tile, mask), tile.sequence, 0, 1);
    const bool any = m * BiasCell::kRows < tile.queries;
    const int row = any ? m / BiasCell::kCount : 0;
    first = static_cast<const char*>(store.data) +
            (places.cell(row, 0) * BiasCell::kCount + m % BiasCell::kCount) * kBiasPartBytes;
    last = any ? places.sequence.width(row) - 1 : 0;
  }
  __device__ const uint4* part(int column) const {
    return reinterpret_cast<const uint4*>(first + int64_t{smaller(column, last)} * (BiasCell::kCount * kBiasPartBytes));
  }
};

// What a consumer thread adds to its scores of a tile of kKeys keys.
template <int kKeys>
struct StoredBias {
  static constexpr int kParts = kKeys / kCellKeys;
  uint4 quads[kParts][4];

  // `tile`: its parts in shared memory, one behind the other.
  __device__ void read(const uint4* tile, Lane lane) {
    CUTE_UNROLL
    for (int n = 0; n < kParts; ++n) {
      CUTE_UNROLL
      for (int c = 0; c < 4; ++c) quads[n][c] = tile[n * (kBiasPartBytes / 16) + stored_bias_at(lane.warp, c, lane.lane)];
    }
  }

  // Of what each load brought.
  __device__ uint32_t some_bits() const {
    uint32_t bits = 0;
    CUTE_UNROLL
    for (int n = 0; n < 4 * kParts; ++n) bits |= quads[n / 4][n % 4].x;
    return bits;
  }

  // h = (alpha s + bias) / 2.
  template <class Scores>
  __device__ void add_to(Scores& scores, float half_alpha) const {
    CUTE_UNROLL
    for (int e = 0; e < cute::size(scores); e += 8) {
      const uint4& quad = quads[e / 32][e / 8 % 4];
      const uint32_t words[4] = {quad.x, quad.y, quad.z, quad.w};
      CUTE_UNROLL
      for (int j = 0; j < 8; ++j) {
        const auto& pair = *reinterpret_cast<const cutlass::Array<cutlass::half_t, 2>*>(&words[j / 2]);
        scores(e + j) = fmaf(scores(e + j), half_alpha, static_cast<float>(pair[j % 2]));
      }
    }
  }
};

template <>
struct StoredBias<0> {};

}  // namespace genrec::attention
