// The backward kernel with a relative bias for D = 128: dK and dV of sequences whose bias and dS have a place in device
// memory, and that dS.
//
// dQ and the gradients of the tables are sums of dS: another kernel's work (backward_stored.h), that neither holds
// products up nor shares their registers. What tells the bias of pairs would: it was told before, once for all heads
// (bias_store.h). What remains is the kernel without a bias (backward_keys.h), whose threads read what they add to their
// scores straight into registers, half a step ahead: shared memory has no time to spare. The bias lies in the order of the
// forward pass, whose rows are queries; its blocks of 8 x 8 pairs are transposed on their way to the scores.
#pragma once

#include "attention/backward_pipelined.h"
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

// A thread's bias of one step: four words for each 16 queries, each of a block of 8 x 8 pairs.
struct StepBias {
  uint32_t words[16];

  // `place`: of the warpgroup's part. The second block lies 8 queries on, the third 8 keys: in the scores S^T it is the
  // other way round.
  __device__ void read(const BiasStore& store, int place, Lane lane) {
    const uint4* part = static_cast<const uint4*>(store.data) + int64_t{place} * (BiasCell::kElements / 8);
    const uint4* from = part + stored_bias_at(0, lane.warp, lane.lane);
    CUTE_UNROLL
    for (int i = 0; i < 4; ++i) {
      const uint4 four = load_written(from + stored_bias_at(i, 0, 0));
      words[4 * i] = four.x, words[4 * i + 1] = four.z, words[4 * i + 2] = four.y, words[4 * i + 3] = four.w;
    }
  }

  // Rows become keys. Not where words are read: that would wait for them.
  __device__ void transpose() {
    CUTE_UNROLL
    for (uint32_t& word : words) word = transposed_matrix(word);
  }
};

// h = (alpha s + bias) / 2 in the place of a thread's scores s.
template <class Scores>
struct BiasedScores {
  const Scores& scores;
  const StepBias& bias;
  const float half_alpha;

  __device__ static constexpr auto size() { return decltype(cute::size(Scores{})){}; }
  __device__ float operator()(int e) const {
    return fmaf(scores(e), half_alpha, unpack<cutlass::half_t>(bias.words[e / 2])[e % 2]);
  }
};

template <class Shape>
struct BiasedKeysConsumer : PipelinedLoop<Shape, BiasedKeysConsumer<Shape>> {
  using Base = PipelinedLoop<Shape, BiasedKeysConsumer<Shape>>;
  using Base::Base, Base::p, Base::shared, Base::warpgroup, Base::lane, Base::keys, Base::values, Base::q;
  using typename Base::Element;
  using Parts = typename Shape::Parts;
  static constexpr int D = Shape::D, kQueries = Shape::kQueries, kKeys = Shape::kKeys;
  using Stage = Place<Shape::kQueryStages>;

  __device__ void one_tile(int count) {
    using namespace cute;
    typename Shape::ScoreMma score_mma;
    typename Shape::OutMma out_mma;
    const auto score_slice = this->slice(score_mma);
    const auto out_slice = this->slice(out_mma);
    const auto k_tile = operand_a(score_slice, this->staged_keys(shared.k));
    const auto v_tile = operand_a(score_slice, this->staged_keys(shared.v));
    const auto q_tile = operand_b(score_slice, this->staged_queries(shared.q[0]));
    const auto d_out_tile = operand_b(score_slice, this->staged_queries(shared.d_out[0]));
    const auto q_columns = operand_b(out_slice, this->staged_queries_transposed(shared.q[0]));
    const auto d_out_columns = operand_b(out_slice, this->staged_queries_transposed(shared.d_out[0]));

    Tensor dk = partition_fragment_C(out_mma, Extent<kKeys, D>{});
    Tensor dv = partition_fragment_C(out_mma, Extent<kKeys, D>{});
    Tensor scores = partition_fragment_C(score_mma, Extent<kKeys, kQueries>{});
    clear(dk);
    clear(dv);
    bool masked = false;  // what the scores' record says
    StepBias bias;        // the scores'
    const auto read_bias = [&](const Stage& at) {
      shared.q_ring.full[at.stage].wait(at.parity);
      const StepRecord& record = this->record(at);
      masked = record.masked;
      // Where the row has no cell for the second warpgroup, nothing of it is seen: any bias will do.
      const int place = record.bias + (warpgroup < record.cells ? warpgroup * Parts::kCount : 0);
      bias.read(p.bias, place, lane);
    };
    const auto issue_scores = [&](const Stage& at) {
      issue_product<true>(score_mma, k_tile(_, _, _, keys.stage), q_tile(_, _, _, at.stage), scores);
    };
    // One step, whose scores are there; those of the next are issued if there is one.
    const auto step = [&](auto has_next) {
      constexpr bool kNext = decltype(has_next)::value;
      Tensor d_weights = partition_fragment_C(score_mma, Extent<kKeys, kQueries>{});
      shared.d_out_ring.full[q.stage].wait(q.parity);
      issue_product<true>(score_mma, v_tile(_, _, _, values.stage), d_out_tile(_, _, _, q.stage), d_weights);

      auto weights = make_operand<Element, kQueries>();
      OperandPairs<Element, decltype(weights)> rounded{weights};
      ScorePairs<Element, kQueries / 2, false> derivatives;
      bias.transpose();
      const BiasedScores<decltype(scores)> biased{scores, bias, p.common.half_alpha};
      weigh<Shape>(biased, rounded, derivatives, 1.f, masked, this->record(q), shared.sights[warpgroup], lane,
                   lane.column());
      issue_product<false>(out_mma, weights, d_out_columns(_, _, _, q.stage), dv);
      Stage next = q;
      next.next();
      if constexpr (kNext) read_bias(next);
      wait_for<1>(d_weights);
      auto ds = make_operand<Element, kQueries>();
      differentiate<Element>(derivatives, d_weights, ds);
      issue_product<false>(out_mma, ds, q_columns(_, _, _, q.stage), dk);
      if constexpr (kNext) issue_scores(next);
      const StepRecord& record = this->record(q);  // beside products: nothing waits for these stores
      keep_ds<Parts>(ds, p.store, warpgroup < record.cells ? record.place + warpgroup * Parts::kCount : -1, lane);
      wait_for<kNext + 1>(dv);
      release(shared.d_out_ring.empty[q.stage]);
      wait_for<kNext>(dk);
      release(shared.q_ring.empty[q.stage]);
      if constexpr (kNext) wait_for<0>(scores);
      q = next;
    };
    this->write_sights();
    shared.k_ring.full[keys.stage].wait(keys.parity);
    if (count == 0) {
      shared.v_ring.full[values.stage].wait(values.parity);
    } else {
      read_bias(q);
      issue_scores(q);
      shared.v_ring.full[values.stage].wait(values.parity);
      wait_for<0>(scores);
      CUTE_NO_UNROLL
      for (; count > 1; --count) step(true_type{});
      step(false_type{});
    }
    release(shared.k_ring.empty[keys.stage]);
    release(shared.v_ring.empty[values.stage]);
    this->store(dk, 2.f * p.common.half_alpha, p.dk);
    this->store(dv, 1.f, p.dv);
  }
};

}  // namespace genrec::attention
