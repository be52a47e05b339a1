// The backward kernel for D = 128 that gives dK and dV; dQ is the next pass's (backward_queries.h), or, with a relative
// bias, that of a pass over dS in memory (backward_biased_keys.h).
//
// A warpgroup has 64 of the tile's 128 keys, and nothing to do with the other one's.
#pragma once

#include "attention/backward_pipelined.h"

namespace genrec::attention {

// A thread's bias of one step: none.
struct NoBias {
  template <class Shape>
  __device__ void start(const typename Shape::Params&, const TileRecord&, int, Lane) {}
  __device__ void note(const StepRecord&, int) {}
  template <class Shape>
  __device__ void read_next(const typename Shape::Params&, Lane) {}
  // `weigh` gets scores, and by what they are multiplied to be half of what SiLU is of.
  template <class Scores, class Weigh>
  __device__ void add_to(const Scores& scores, float half_alpha, Weigh weigh) {
    weigh(scores, half_alpha);
  }
};

template <class Shape, class StepBias = NoBias>
struct KeysConsumer : PipelinedLoop<Shape, KeysConsumer<Shape, StepBias>> {
  using Base = PipelinedLoop<Shape, KeysConsumer<Shape, StepBias>>;
  using Base::Base, Base::p, Base::shared, Base::warpgroup, Base::lane, Base::keys, Base::values, Base::q;
  using typename Base::Element;
  using Stage = Place<Shape::kQueryStages>;
  static constexpr int D = Shape::D, kQueries = Shape::kQueries, kKeys = Shape::kKeys;

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
    const auto await_queries = [&](const Stage& at) {
      shared.q_ring.full[at.stage].wait(at.parity);
      masked = this->record(at).masked;
      bias.note(this->record(at), warpgroup);
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
      bias.add_to(scores, p.common.half_alpha, [&](const auto& biased, float factor) {
        weigh<Shape>(biased, rounded, derivatives, factor, masked, this->record(q), shared.sights[warpgroup], lane,
                     lane.column());
      });
      if constexpr (kNext) bias.template read_next<Shape>(this->p, this->lane);
      issue_product<false>(out_mma, weights, d_out_columns(_, _, _, q.stage), dv);
      Stage next = q;
      next.next();
      wait_for<1>(d_weights);
      auto ds = make_operand<Element, kQueries>();
      differentiate<Element>(derivatives, d_weights, ds);
      issue_product<false>(out_mma, ds, q_columns(_, _, _, q.stage), dk);
      if constexpr (kNext) {
        await_queries(next);
        issue_scores(next);
      }
      if constexpr (Shape::kStores) {  // beside products: nothing waits for these stores
        using Parts = typename Shape::Parts;
        const StepRecord& record = this->record(q);
        keep_ds<Parts>(ds, p.store, warpgroup < record.cells ? record.place + warpgroup * Parts::kCount : -1, lane);
      }
      wait_for<kNext + 1>(dv);
      release(shared.d_out_ring.empty[q.stage]);
      wait_for<kNext>(dk);
      release(shared.q_ring.empty[q.stage]);
      if constexpr (kNext) wait_for<0>(scores);
      q = next;
    };
    if (count > 0) bias.template start<Shape>(p, shared.work[this->work.stage].tile, warpgroup, lane);
    this->write_sights();
    shared.k_ring.full[keys.stage].wait(keys.parity);
    if (count == 0) {
      shared.v_ring.full[values.stage].wait(values.parity);
    } else {
      await_queries(q);
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
