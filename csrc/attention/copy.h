// Tiles in shared memory: how they lie there, and the copies that bring them.
//
// A tile of ROWS x D elements lies in chunks of 64 columns (32 for D = 32), each ROWS rows of 128 (64) bytes, swizzled
// over 8 rows: what one box of the copy engine writes and what wgmma's descriptors read. Rows beyond the tensor and
// columns beyond its dim are filled with zeros by the copy engine, so dims that aren't native need no padding in
// memory. Rows beyond a sequence hold its neighbour's: they are masked or not stored.
#pragma once

#include <cute/tensor.hpp>

#include "attention/device.h"

namespace genrec::attention {

template <int D>
constexpr int kChunk = D < 64 ? D : 64;

template <class Element, int D>
using RowAtom = cute::conditional_t<D % 64 == 0, cute::GMMA::Layout_K_SW128_Atom<Element>,
                                    cute::GMMA::Layout_K_SW64_Atom<Element>>;

// (kRows, D, kStages), D contiguous: an operand whose inner dimension is D.
template <class Element, int kRows, int D, int kStages>
using TileLayout = decltype(cute::tile_to_shape(
    RowAtom<Element, D>{}, cute::Shape<cute::Int<kRows>, cute::Int<D>, cute::Int<kStages>>{}));

// The same memory as (D, kRows, kStages): an operand whose inner dimension is the rows.
template <class Element, int kRows, int D, int kStages>
using TransposedLayout = decltype(cute::composition(
    TileLayout<Element, kRows, D, kStages>{},
    cute::Layout<cute::Shape<cute::Int<D>, cute::Int<kRows>, cute::Int<kStages>>,
                 cute::Stride<cute::Int<kRows>, cute::_1, cute::Int<kRows * D>>>{}));

template <class Element, int kRows, int D>
constexpr uint32_t kTileBytes = kRows * D * sizeof(Element);

// Rows [row, row + kRows) of one head into `tile`, by boxes of kBox rows. One thread calls it, having told `full` of
// kTileBytes bytes.
template <class Element, int kRows, int D, int kBox = kRows>
__device__ inline void load_tile(const CUtensorMap& map, FullBarrier& full, Element* tile, int row, int head) {
  CUTE_UNROLL
  for (int c = 0; c < D / kChunk<D>; ++c) {
    CUTE_UNROLL
    for (int r = 0; r < kRows; r += kBox) {
      load_box<kBox, kChunk<D>>(map, full, tile + (c * kRows + r) * kChunk<D>, c * kChunk<D>, head, row + r);
    }
  }
}

// A 128-byte-swizzled (queries, keys) matrix, queries contiguous: chunks of 64 queries, each kKeys rows of 128 bytes.
template <class Element, int kQueries, int kKeys>
using ScoreLayout = decltype(cute::tile_to_shape(cute::GMMA::Layout_MN_SW128_Atom<Element>{},
                                                 cute::Shape<cute::Int<kQueries>, cute::Int<kKeys>>{},
                                                 cute::Step<cute::_2, cute::_1>{}));

// Byte offset of (query, key) there; the same function as ScoreLayout (tests/layout_test.cu).
template <int kKeys>
CUTE_HOST_DEVICE constexpr int score_offset(int query, int key) {
  return (query / 64 * kKeys + key) * 128 + ((query % 64 * 2) ^ (key % 8 * 16));
}

}  // namespace genrec::attention
