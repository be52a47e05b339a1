// dQ from the backward pass's fp32 sums: put in order, scaled, rounded. Of sequences whose dS is stored there are none.
#pragma once

#include "attention/backward_tiles.h"

namespace genrec::attention {

// kByWarps: the sums' order is that of add_dq_in_bulk.
template <class Shape, bool kByWarps = false>
__global__ void __launch_bounds__(256) convert_dq_kernel(const ConvertParams p) {
  follow_kernel_before();
  if (p.store.left != nullptr && *p.store.left == 0) return;
  constexpr int kQueries = Shape::kQueries, kSize = kQueries * Shape::D / 256;
  const int warpgroup = threadIdx.x / 128, thread = threadIdx.x % 128, heads = p.common.heads;
  const int row = Shape::kSplitColumns ? 0 : 64 * warpgroup;
  const int column = Shape::kSplitColumns ? Shape::kDqColumns * warpgroup : 0;
  const int units = *p.list.length * heads;
  for (int w = blockIdx.x; w < units; w += gridDim.x) {
    const WorkUnit unit = work_unit(w, heads);
    const TileRecord tile = p.list.tiles[unit.tile];
    if (is_stored(p.store, tile.sequence)) continue;
    const int64_t padded = first_padded_tile(tile.query_start, tile.sequence, kQueries) + tile.first / kQueries;
    const float4* sum = reinterpret_cast<const float4*>(
        p.dq_sum + ((padded * heads + unit.head) * 2 + warpgroup) * (kQueries * Shape::D / 2));
    auto dq = cute::make_tensor<float>(cute::Layout<cute::Int<kSize>>{});
    CUTE_UNROLL
    for (int e = 0; e < kSize; e += 4) {
      const float4 four = sum[kByWarps ? (thread / 32 * (kSize / 4) + e / 4) * 32 + thread % 32 : e / 4 * 128 + thread];
      dq(e) = four.x, dq(e + 1) = four.y, dq(e + 2) = four.z, dq(e + 3) = four.w;
    }
    const float scale = p.common.scales ? p.common.scales[tile.sequence] : p.common.scale;
    const int first = tile.first + row;
    store_rows<typename Shape::Element>(dq, 2.f * p.common.half_alpha * scale, p.dq, int64_t{tile.query_start} + first,
                                        unit.head, column, tile.queries - first);
  }
}

// Zeroes the sums of those sequences that are not stored, by the tiles of keys that `p.list` has: most often there is
// nothing to do, and no host knows.
template <class Shape>
__global__ void __launch_bounds__(256) clear_dq_kernel(const BackwardParams p) {
  follow_kernel_before();
  if (*p.store.left == 0) return;
  constexpr int kQueries = Shape::kQueries, kEach = Shape::kKeys / kQueries;
  const int heads = p.common.heads, units = *p.list.length * heads;
  for (int w = blockIdx.x; w < units; w += gridDim.x) {
    const WorkUnit unit = work_unit(w, heads);
    const TileRecord tile = p.list.tiles[unit.tile];
    if (is_stored(p.store, tile.sequence)) continue;
    const int first = tile.first / kQueries, end = smaller(first + kEach, divide_up(tile.queries, kQueries));
    for (int m = first; m < end; ++m) {
      const int64_t padded = first_padded_tile(tile.query_start, tile.sequence, kQueries) + m;
      float4* sum = reinterpret_cast<float4*>(p.dq_sum + (padded * heads + unit.head) * (kQueries * Shape::D));
      for (int n = threadIdx.x; n < kQueries * Shape::D / 4; n += 256) sum[n] = make_float4(0.f, 0.f, 0.f, 0.f);
    }
  }
}

}  // namespace genrec::attention
