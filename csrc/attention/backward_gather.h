// The backward kernel without a bias that gives dK, dV and dQ in one pass: dQ gathers in sums in device memory.
//
// dQ = dS K needs dS of both warpgroups. Waiting for it within the step would make them go in step: both would compute
// SiLU at the same time, and the tensor cores would have nothing to do. So the dQ that a step computes is that of the
// step before, whose dS the other warpgroup has long written. The copy engine adds it to its sum.
#pragma once

#include "attention/backward_pipelined.h"

namespace genrec::attention {

template <class Shape>
struct GatherConsumer : PipelinedLoop<Shape, GatherConsumer<Shape>> {
  using Base = PipelinedLoop<Shape, GatherConsumer<Shape>>;
  using Base::Base, Base::p, Base::shared, Base::warpgroup, Base::lane, Base::keys, Base::values, Base::q;
  using typename Base::Element;
  static constexpr int D = Shape::D, kQueries = Shape::kQueries, kKeys = Shape::kKeys;

  __device__ void one_tile(int count) {
    using namespace cute;
    typename Shape::ScoreMma score_mma;
    typename Shape::OutMma out_mma;
    typename Shape::DqMma dq_mma;
    const auto score_slice = this->slice(score_mma);
    const auto out_slice = this->slice(out_mma);
    const auto dq_slice = this->slice(dq_mma);
    const auto k_tile = operand_a(score_slice, this->staged_keys(shared.k));
    const auto v_tile = operand_a(score_slice, this->staged_keys(shared.v));
    const auto q_tile = operand_b(score_slice, this->staged_queries(shared.q[0]));
    const auto d_out_tile = operand_b(score_slice, this->staged_queries(shared.d_out[0]));
    const auto q_columns = operand_b(out_slice, this->staged_queries_transposed(shared.q[0]));
    const auto d_out_columns = operand_b(out_slice, this->staged_queries_transposed(shared.d_out[0]));
    const auto k_columns = operand_b(dq_slice, this->staged_keys_transposed(shared.k[0]));
    const auto ds_rows = operand_a(dq_slice, this->staged_scores(shared.gather.ds[0]));

    Tensor dk = partition_fragment_C(out_mma, Extent<kKeys, D>{});
    Tensor dv = partition_fragment_C(out_mma, Extent<kKeys, D>{});
    Tensor scores = partition_fragment_C(score_mma, Extent<kKeys, kQueries>{});
    clear(dk);
    clear(dv);
    bool masked = false;  // what the scores' record says
    const auto issue_scores = [&](const Place<Shape::kQueryStages>& at) {
      shared.q_ring.full[at.stage].wait(at.parity);
      masked = this->record(at).masked;
      issue_product<true>(score_mma, k_tile(_, _, _, keys.stage), q_tile(_, _, _, at.stage), scores);
    };
    bool due = false;  // dQ of the step before; there is none for a tile's first step, whose product is not used
    const auto issue_dq = [&](auto& dq) {
      const auto before = step_before();
      if (due) shared.ds_ring.full[before.stage].wait(before.parity);
      issue_product<true>(dq_mma, ds_rows(_, _, _, before.stage), k_columns(_, _, _, keys.stage), dq);
    };
    const auto finish_dq = [&](const auto& dq) {
      const auto before = step_before();
      release(shared.ds_ring.empty[before.stage]);
      this->gather(dq, this->record(before));
    };
    // One step, whose scores are there; those of the next are issued if there is one.
    const auto step = [&](auto has_next) {
      constexpr bool kNext = decltype(has_next)::value;
      Tensor d_weights = partition_fragment_C(score_mma, Extent<kKeys, kQueries>{});
      shared.d_out_ring.full[q.stage].wait(q.parity);
      issue_product<true>(score_mma, v_tile(_, _, _, values.stage), d_out_tile(_, _, _, q.stage), d_weights);

      auto weights = make_operand<Element, kQueries>();
      OperandPairs<Element, decltype(weights)> rounded{weights};
      ScorePairs<cutlass::half_t, kQueries / 2, Shape::kPacked> derivatives;
      weigh<Shape>(scores, rounded, derivatives, p.common.half_alpha, masked, this->record(q), shared.sights[warpgroup],
                   lane, lane.column());
      issue_product<false>(out_mma, weights, d_out_columns(_, _, _, q.stage), dv);
      wait_for<1>(d_weights);
      auto ds = make_operand<Element, kQueries>();
      differentiate<Element>(derivatives, d_weights, ds);
      shared.ds_ring.empty[q.stage].wait(q.parity ^ 1);  // first of all passes at once
      write_scores<kKeys, kQueries>(ds, shared.gather.ds[q.stage], 64 * warpgroup, 0, lane);
      release(shared.ds_ring.full[q.stage]);

      Tensor dq = partition_fragment_C(dq_mma, Extent<kQueries, D>{});
      issue_dq(dq);
      issue_product<false>(out_mma, ds, q_columns(_, _, _, q.stage), dk);
      wait_for<2>(dv);
      release(shared.d_out_ring.empty[q.stage]);
      wait_for<1>(dq);
      if (due) finish_dq(dq);
      due = true;
      Place<Shape::kQueryStages> next = q;
      next.next();
      if constexpr (kNext) issue_scores(next);  // into dQ's registers; there are no others
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
      issue_scores(q);
      shared.v_ring.full[values.stage].wait(values.parity);
      wait_for<0>(scores);
      CUTE_NO_UNROLL
      for (; count > 1; --count) step(true_type{});
      step(false_type{});
      Tensor dq = partition_fragment_C(dq_mma, Extent<kQueries, D>{});
      issue_dq(dq);
      wait_for<0>(dq);
      finish_dq(dq);
    }
    release(shared.k_ring.empty[keys.stage]);
    release(shared.v_ring.empty[values.stage]);
    this->store(dk, 2.f * p.common.half_alpha, p.dk);
    this->store(dv, 1.f, p.dv);
  }

 private:
  __device__ Place<2> step_before() const {
    static_assert(Shape::kQueryStages == 2);
    Place<2> before = q;
    before.stage ^= 1;
    before.parity ^= before.stage;
    return before;
  }
};

}  // namespace genrec::attention
