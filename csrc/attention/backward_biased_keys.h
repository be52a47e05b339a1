// The backward kernel with a relative bias for D = 128: dK and dV of sequences whose bias and dS have a place in device
// memory, and that dS.
//
// dQ and the gradients of the tables are sums of dS: another kernel's work (backward_stored.h), that neither holds
// products up nor shares their registers. What tells the bias of pairs would: it was told before, once for all heads
// (bias_store.h). What remains is the kernel without a bias (backward_keys.h), whose threads read what they add to their
// scores straight into registers, half a step ahead: shared memory has no time to spare. The bias lies in the order of the
// forward pass, whose rows are queries; its blocks of 8 x 8 pairs are transposed on their way to the scores.
#pragma once

#include "attention/backward_keys.h"
#include "attention/bias_store.h"

namespace genrec::attention {

template <class Element_, bool kCausal_>
struct BiasedKeysShape : PipelinedShape<Element_, 128, kCausal_, false> {
  static constexpr bool kStores = true, kStoredOnly = true, kReadsBias = true;
  using Parts = BiasCell;
  static_assert(Parts::kRows == BiasedKeysShape::kQueries, "a step's scores are parts");
  struct Params : BackwardParams {
    BiasStore bias;
  };
};

// h = (alpha s + bias) / 2 in the place of a thread's scores s.
template <class Scores>
struct BiasedScores {
  const Scores& scores;
  const uint32_t (&bias)[16];
  const float half_alpha;

  __device__ static constexpr auto size() { return decltype(cute::size(Scores{})){}; }
  __device__ float operator()(int e) const {
    return fmaf(scores(e), half_alpha, unpack<cutlass::half_t>(bias[e / 2])[e % 2]);
  }
};

// A thread's bias of one step: four words for each 16 queries, each of a block of 8 x 8 pairs.
struct StepBias {
  uint32_t words[16];

  // The second block lies 8 queries on, the third 8 keys: in the scores S^T it is the other way round.
  template <class Shape>
  __device__ void read(const typename Shape::Params& p, const StepRecord& step, int warpgroup, Lane lane) {
    // Where the row has no cell for the second warpgroup, nothing of it is seen: any bias will do.
    const int place = step.bias + (warpgroup < step.cells ? warpgroup * Shape::Parts::kCount : 0);
    const uint4* part = static_cast<const uint4*>(p.bias.data) + int64_t{place} * (kBiasPartBytes / 16);
    const uint4* from = part + stored_bias_at(0, lane.warp, lane.lane);
    CUTE_UNROLL
    for (int i = 0; i < 4; ++i) {
      const uint4 four = load_written(from + stored_bias_at(i, 0, 0));
      words[4 * i] = four.x, words[4 * i + 1] = four.z, words[4 * i + 2] = four.y, words[4 * i + 3] = four.w;
    }
  }

  // Rows become keys. Not where words are read: that would wait for them.
  template <class Scores, class Weigh>
  __device__ void add_to(const Scores& scores, float half_alpha, Weigh weigh) {
    CUTE_UNROLL
    for (uint32_t& word : words) word = transposed_matrix(word);
    weigh(BiasedScores<Scores>{scores, words, half_alpha}, 1.f);
  }
};

template <class Shape>
using BiasedKeysConsumer = KeysConsumer<Shape, StepBias>;

}  // namespace genrec::attention
