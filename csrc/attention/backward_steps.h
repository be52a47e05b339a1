// A step of the backward kernels over tiles of keys: what its threads are told of it, where its dS goes, and its weights and
// derivatives, masked and rounded pair by pair as they are computed, not in a second sweep that holds all of them.
#pragma once

#include "attention/backward_tiles.h"
#include "attention/ds_store.h"

namespace genrec::attention {

template <class Element>
__device__ inline uint32_t pack(float low, float high) {
  const cutlass::Array<float, 2> pair{low, high};
  const auto packed = cutlass::NumericArrayConverter<Element, float, 2>{}(pair);
  return *reinterpret_cast<const uint32_t*>(&packed);
}

template <class Element>
__device__ inline cutlass::Array<float, 2> unpack(uint32_t word) {
  const auto& packed = *reinterpret_cast<const cutlass::Array<Element, 2>*>(&word);
  return {static_cast<float>(packed[0]), static_cast<float>(packed[1])};
}

// Where parts of the bias that all heads share lie for a step.
struct BiasPlace {
  int word;  // twice the number of the part of the tile's first 64 keys; 1 more where there is one of the second

  // Where there is none, nothing of it is seen: any part will do.
  template <class Parts>
  __device__ int part(int warpgroup) const {
    return (word >> 1) + (word & warpgroup ? Parts::kCount : 0);
  }
};

// What the producer tells the consumers of a step, and so saves them the registers to find out.
struct StepRecord {
  int64_t place;  // where dQ is gathered: of the query tile among those of dQ, times heads, plus head; else of dS's part
  int row;        // the tile's first row, counted in the key sequence
  int masked;
  union {
    int rank;   // key tiles that add to dQ before this one, where the order is fixed
    int cells;  // of dS, from that of `place` on, which its row still has
  };
  BiasPlace bias;  // the next step's
};

// Where the record of the step lies whose Q is at a place. There are twice as many as stages, since dQ of a step may be
// added to its sum after Q has been given back.
template <int kStages>
__device__ inline int record_place(const Place<kStages>& q, bool producer) {
  return q.stage + kStages * (q.parity ^ producer);
}

struct PipelinedWork {
  TileRecord tile;
  int head, steps;
};

// Of the next units from the one taken on, the first whose sequence has a place in the store of dS, or has none.
template <bool kStored>
__device__ inline int pick_unit(const BackwardParams& p, int w, int units) {
  while (w < units && (p.store.first[p.list.tiles[work_unit(w, p.common.heads).tile].sequence] >= 0) != kStored)
    w = add_atomically(p.common.counter, 1);
  return w;
}

// Where dQ of a query tile is gathered.
struct GatherPlaces {
  int64_t first;
  int head, heads;

  __device__ int64_t part(int m) const { return (first + m) * heads + head; }
};

template <class Shape, class Mask>
__device__ inline auto step_places(const BackwardParams& p, const TileRecord& tile, const Mask& mask, int head) {
  if constexpr (Shape::kStores) {
    return CellPlaces(p.store, stored_sequence(tile, mask), tile.sequence, head, p.common.heads);
  } else {
    return GatherPlaces{first_padded_tile(tile.query_start, tile.sequence, Shape::kQueries), head, p.common.heads};
  }
}

template <class Shape>
__device__ inline int64_t step_place(const GatherPlaces& places, int m, int) {
  return places.part(m);
}

template <class Shape>
__device__ inline int64_t step_place(const CellPlaces& places, int m, int first_key) {
  return places.part<typename Shape::Parts>(m, first_key / kCellKeys);
}

template <class Shape>
__device__ inline int step_cells(const CellPlaces& places, int m, int first_key) {
  return places.sequence.width(m / Shape::Parts::kCount) - first_key / kCellKeys;
}

// Parts between a head's and those of a store with one head.
template <class Shape>
__device__ inline int64_t parts_of_heads(const BackwardParams& p, const CellPlaces& places, const TileRecord& tile) {
  return (places.first - p.store.first[tile.sequence]) * Shape::Parts::kCount;
}

template <class Shape, class Mask, class Places>
__device__ inline StepRecord step_record(const BackwardParams& p, const TileRecord& tile, const Mask& mask,
                                         const ColumnBand& band, const Places& places, int64_t heads_before, int m,
                                         int bias_m) {
  constexpr int kQueries = Shape::kQueries;
  StepRecord step;
  step.place = step_place<Shape>(places, m, tile.first);
  step.row = m * kQueries + tile.keys - tile.queries;
  step.masked = !band.all_seen(step.row, step.row + kQueries);
  if constexpr (Shape::kStores) step.cells = step_cells<Shape>(places, m, tile.first);
  if constexpr (Shape::kReadsBias) {
    const auto part = static_cast<int>(step_place<Shape>(places, bias_m, tile.first) - heads_before);
    step.bias.word = 2 * part + (step_cells<Shape>(places, bias_m, tile.first) > 1);
  }
  if constexpr (Shape::kGathers) step.rank = 0;
  if (Shape::kGathers && p.turns != nullptr) {
    const int end = smaller(step.row + kQueries, tile.keys);
    step.rank = mask.key_tiles(step.row, end, Shape::kKeys).rank(tile.first / Shape::kKeys);
  }
  return step;
}

// Numbers for a thread's N scores, SiLU's values or derivatives: fp32, or rounded in half the registers, where dS gets a
// second rounding. Never in the scores' own registers: those belong to products in flight.
template <class Element, int N, bool kPacked>
struct ScorePairs {
  float values[N];

  __device__ void put(int e, float low, float high) { values[e] = low, values[e + 1] = high; }
  __device__ cutlass::Array<float, 2> get(int e) const { return {values[e], values[e + 1]}; }
};

template <class Element, int N>
struct ScorePairs<Element, N, true> {
  uint32_t values[N / 2];

  __device__ void put(int e, float low, float high) { values[e / 2] = pack<Element>(low, high); }
  __device__ cutlass::Array<float, 2> get(int e) const { return unpack<Element>(values[e / 2]); }
};

// As they, the A operand of a product.
template <class Element, class Operand>
struct OperandPairs {
  Operand& operand;

  __device__ void put(int e, float low, float high) {
    reinterpret_cast<uint32_t*>(&operand(0))[e / 2] = pack<Element>(low, high);
  }
};

// Scores S^T become weights and derivatives. kMasked: the thread's two keys are seen by
// what `low` and `high` say.
template <class Shape, bool kMasked, class Scores, class Weights, class Slopes>
__device__ inline void weigh_pairs(const Scores& scores, Weights& weights, Slopes& derivatives, float half_alpha,
                                   const ColumnSight& low, const ColumnSight& high) {
  CUTE_UNROLL
  for (int e = 0; e < scores.size(); e += 2) {
    SiluAndDerivative pair[2];
    CUTE_UNROLL
    for (int j = 0; j < 2; ++j) {
      pair[j] = silu_and_derivative(scores(e + j), half_alpha);
      if constexpr (kMasked) {
        const ColumnSight& sight = element_row(e) ? high : low;
        const int i = element_column(e + j);
        const bool seen = Shape::kCausal ? (i >= sight.show0) & (i < sight.end) : sight.seen_by(i);
        pair[j].value = seen ? pair[j].value : 0.f;
        pair[j].derivative = seen ? pair[j].derivative : 0.f;
      }
    }
    weights.put(e, pair[0].value, pair[1].value);
    derivatives.put(e, pair[0].derivative, pair[1].derivative);
  }
}

// As above, for 64 of the tile's keys, of which `sights` says who sees them, and a query tile, of whose queries the
// thread's first is `column`. `masked` was read before products were issued: beside those shared memory is slow.
template <class Shape, class Scores, class Weights, class Slopes>
__device__ inline void weigh(const Scores& scores, Weights& weights, Slopes& derivatives, float half_alpha,
                             bool masked, const StepRecord& step, const ColumnSight* sights, Lane lane, int column) {
  if (!masked) {
    weigh_pairs<Shape, false>(scores, weights, derivatives, half_alpha, {}, {});
  } else {
    const int first = step.row + column;
    weigh_pairs<Shape, true>(scores, weights, derivatives, half_alpha, moved(sights[lane.row()], first),
                             moved(sights[lane.row() + 8], first));
  }
}

// dS^T = dP^T times the derivatives, rounded: the A operand of dK.
template <class Element, class Slopes, class Scores, class Operand>
__device__ inline void differentiate(const Slopes& derivatives, const Scores& d_weights, Operand& ds) {
  uint32_t* words = reinterpret_cast<uint32_t*>(&ds(0));
  CUTE_UNROLL
  for (int e = 0; e < cute::size(d_weights); e += 2) {
    const cutlass::Array<float, 2> pair = derivatives.get(e);
    words[e / 2] = pack<Element>(d_weights(e) * pair[0], d_weights(e + 1) * pair[1]);
  }
}

// A warpgroup's dS^T, 64 keys, into its part of a cell: blocks of 8 keys x 8 queries, queries contiguous, each a warp's
// store of 128 bytes.
template <class Parts, class Operand>
__device__ inline void keep_ds(const Operand& ds, const DsStore& store, int64_t place, Lane lane) {
  if (place < 0) return;
  uint32_t* to = static_cast<uint32_t*>(store.data) + place * (Parts::kElements / 2) + lane.warp * 64 + lane.lane;
  const uint32_t* words = reinterpret_cast<const uint32_t*>(&ds(0));
  CUTE_UNROLL
  for (int i = 0; i < Parts::kRows / 4; ++i) store_once(to + i / 2 * (kCellKeys * 4) + i % 2 * 32, words[i]);
}

}  // namespace genrec::attention
