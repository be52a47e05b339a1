// The relative bias of a step of the backward pass, read from memory (bias_store.h) into the registers of the threads
// whose scores it is added to. It lies in the order of S = Q K^T; the scores are S^T, and blocks of 8 x 8 pairs are
// transposed on their way.
#pragma once

#include "attention/backward_pipelined.h"
#include "attention/bias_store.h"

namespace genrec::attention {

// h = (alpha s + bias) / 2 in the place of a thread's scores s.
template <class Scores, class Bias>
struct BiasedScores {
  const Scores& scores;
  const Bias& bias;
  const float half_alpha;

  __device__ static constexpr auto size() { return decltype(cute::size(Scores{})){}; }
  __device__ float operator()(int e) const {
    return fmaf(scores(e), half_alpha, unpack<cutlass::half_t>(bias.words[e / 2])[e % 2]);
  }
};

// What a thread adds to its scores S^T of 64 keys and a part's queries: four words for each 16 queries, each of a block
// of 8 x 8 pairs.
template <class Parts>
struct PartBias {
  static constexpr int kSixteens = Parts::kRows / 16;
  static_assert(16 * kSixteens == Parts::kRows && kCellKeys == 64, "whole rows of blocks");
  uint32_t words[4 * kSixteens];

  // `place`: the part's number. As they lie there, the second word's block is that 8 queries on, the third's 8 keys: in
  // S^T it is the other way round.
  __device__ void read(const BiasStore& store, int place, Lane lane) {
    constexpr int kSixteen = stored_bias_at(1, 0, 0);
    const uint4* part = static_cast<const uint4*>(store.data) + int64_t{place} * (kSixteens * kSixteen);
    const uint4* from = part + stored_bias_at(0, lane.warp, lane.lane);
    CUTE_UNROLL
    for (int i = 0; i < kSixteens; ++i) {
      const uint4 four = load_written(from + i * kSixteen);
      words[4 * i] = four.x, words[4 * i + 1] = four.z, words[4 * i + 2] = four.y, words[4 * i + 3] = four.w;
    }
  }

  // Rows become keys. Not where words are read: that would wait for them.
  __device__ void transpose() { *this = transposed(); }
  __device__ PartBias transposed() const {
    PartBias other;
    CUTE_UNROLL
    for (int i = 0; i < 4 * kSixteens; ++i) other.words[i] = transposed_matrix(words[i]);
    return other;
  }

  template <class Scores>
  __device__ BiasedScores<Scores, PartBias> added_to(const Scores& scores, float half_alpha) const {
    return {scores, *this, half_alpha};
  }
};

// Where the bias of a tile's first step lies, of its first 64 keys or its second.
template <class Shape>
__device__ inline int first_bias(const typename Shape::Params& p, const TileRecord& tile, int second) {
  using Parts = typename Shape::Parts;
  const SequenceMask<Shape::kCausal> mask(tile.keys, tile.contexts, tile.targets, p.common.rule);
  const int m = mask.query_tiles(tile.first, tile.first + Shape::kKeys, Shape::kQueries, tile.queries).tile(0);
  const CellPlaces places(p.bias, stored_sequence(tile, mask), tile.sequence, 0, 1);
  const int column = tile.first / kCellKeys, further = column + second;
  return static_cast<int>(places.part<Parts>(m, further < places.sequence.width(m / Parts::kCount) ? further : column));
}

}  // namespace genrec::attention
