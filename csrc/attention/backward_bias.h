// The relative bias in the backward kernel: what is prepared of a step, and what the others know of it.
//
// Consumers with a bias have no registers to spare, and what they spill comes back from the L2 cache: shared memory leaves
// little else. So they keep nothing of their tile of keys but where its record lies; what a step needs comes with its bias.
#pragma once

#include "attention/backward_pipelined.h"
#include "attention/bias_gradient.h"

namespace genrec::attention {

// Where the bias comes first, the sum of it and products is multiplied with alpha / 2, so that it is divided by alpha. An alpha
// next to zero (or zero) is replaced by one that the product of drowns in the bias's rounding.
__device__ inline float score_factor(float half_alpha) {
  constexpr float kLeast = 8.67e-19f;  // 2^-60
  return fabsf(half_alpha) < kLeast ? kLeast : half_alpha;
}

template <class Shape>
__device__ inline float bias_factor(float half_alpha) {
  return Shape::kBiasFirst ? 0.5f / score_factor(half_alpha) : 0.5f;
}

// Whether warps sum the gradients of the tables.
template <class Shape>
__device__ inline bool sums_tables(const typename Shape::Params& p) {
  if constexpr (Shape::kSumsTables) return p.bias.position_sums != nullptr || p.bias.time_sums != nullptr;
  return false;
}

// One of the warps that prepare the bias of query tiles. Steps are dealt out in the order in which they are consumed,
// those of all units of work in one sequence: warp n has every kPreparers-th.
template <class Shape>
struct BiasPreparer {
  const typename Shape::Params& p;
  typename Shape::Shared& shared;
  Place<Shape::kBiasStages> place{1};

  __device__ void run(int warp) {
    for (int n = 0; n < warp; ++n) place.next();
    Place<2> work(0);
    int next = warp;  // of the unit's steps
    for (int unit = 0;; work.next(), ++unit) {
      shared.work_ring.full[work.stage].wait(work.parity);
      const TileRecord tile = shared.work[work.stage].tile;
      release(shared.work_ring.empty[work.stage]);
      if (tile.sequence < 0) return end();
      const SequenceMask<Shape::kCausal> mask(tile.keys, tile.contexts, tile.targets, p.common.rule);
      const TileRanges ranges =
          mask.query_tiles(tile.first, tile.first + Shape::kKeys, Shape::kQueries, tile.queries);
      const int count = ranges.count();
      if (next < count) {
        BiasWriter<false, Shape::kKeys, Shape::kQueries> writer(p.bias, shared.bias.buckets, tile,
                                                                      bias_factor<Shape>(p.common.half_alpha));
        const ColumnBand band = mask.columns(tile.first, tile.first + Shape::kKeys);
        CUTE_NO_UNROLL
        for (; next < count; next += Shape::kPreparers) {
          const int m = ranges.tile(next), i0 = m * Shape::kQueries + tile.keys - tile.queries;
          writer.fetch(m * Shape::kQueries);
          shared.bias.ring.empty[place.stage].wait(place.parity);
          writer.put(shared.bias.tiles[place.stage], m * Shape::kQueries);
          announce({tile, unit, m, !band.all_seen(i0, i0 + Shape::kQueries)});
        }
      }
      next -= count;
    }
  }

 private:
  __device__ void announce(const BiasStep& step) {
    if (threadIdx.x % 32 == 0) shared.steps[place.stage] = step;
    release(shared.bias.ring.full[place.stage]);
    CUTE_UNROLL
    for (int n = 0; n < Shape::kPreparers; ++n) place.next();
  }

  // For each team of warps that sum.
  __device__ void end() {
    if constexpr (Shape::kSumsTables) {
      if (!sums_tables<Shape>(p)) return;
      for (int n = 0; n < Shape::Teams::kTeams; n += Shape::kPreparers) {
        shared.bias.ring.empty[place.stage].wait(place.parity);
        announce({{}, -1, 0, false});
      }
    }
  }
};

// Calls hide(e) for a thread's elements that may not see its two keys. Queries are counted from its first column.
template <bool kCausal, int kSize, class Hide>
__device__ inline void hide_unseen(const ColumnSight& low, const ColumnSight& high, Hide hide) {
  CUTE_UNROLL
  for (int e = 0; e < kSize; ++e) {
    const ColumnSight& sight = element_row(e) ? high : low;
    const int i = element_column(e);
    const bool seen = kCausal ? (i >= sight.show0) & (i < sight.end) : sight.seen_by(i);
    if (!seen) hide(e);
  }
}

// What consumers keep of a step: its query tile, and whether some pairs are hidden.
struct StepWord {
  int word;

  __device__ int m() const { return word >> 1; }
  __device__ bool masked() const { return word & 1; }
};

// KeyTile for consumers with a relative bias: the record of it is in shared memory.
template <class Shape>
struct BiasedKeyTile {
  const TileRecord& tile;
  const MaskRule& rule;
  const float& half_alpha;
  const int warpgroup;
  const Lane lane;

  __device__ SequenceMask<Shape::kCausal> mask() const {
    return SequenceMask<Shape::kCausal>(tile.keys, tile.contexts, tile.targets, rule);
  }

  __device__ int steps() const {
    return mask().query_tiles(tile.first, tile.first + Shape::kKeys, Shape::kQueries, tile.queries).count();
  }

  template <int kSize, class Hide>
  __device__ void apply(StepWord step, int column, Hide hide) const {
    if (!step.masked()) return;
    hide_unseen<Shape::kCausal, kSize>(sight(step.m(), column, 0), sight(step.m(), column, 8), hide);
  }

  // Sums of products and bias to weights and derivatives (backward_pipelined.h).
  template <class Scores, class Weights, class Slopes>
  __device__ void weigh(const Scores& scores, Weights& weights, Slopes& derivatives, StepWord step, int column) const {
    const float factor = score_factor(half_alpha);
    if (!step.masked()) {
      weigh_pairs<Shape, false>(scores, weights, derivatives, factor, {}, {});
    } else {
      weigh_pairs<Shape, true>(scores, weights, derivatives, factor, sight(step.m(), column, 0),
                               sight(step.m(), column, 8));
    }
  }

  __device__ int rank(int m) const {
    const int i0 = first_row(m);
    return mask().key_tiles(i0, smaller(i0 + Shape::kQueries, tile.keys), Shape::kKeys).rank(tile.first / Shape::kKeys);
  }

 private:
  // Who sees the thread's key so far below its first, counted from query `column` of the tile.
  __device__ ColumnSight sight(int m, int column, int down) const {
    const int key = tile.first + 64 * warpgroup + lane.row() + down;
    return moved(mask().column(key), first_row(m) + column);
  }

  __device__ int first_row(int m) const { return m * Shape::kQueries + tile.keys - tile.queries; }
};

}  // namespace genrec::attention
