// The backward kernel with a relative bias for D = 128: dK and dV of sequences whose dS has a place in device memory, and
// that dS.
//
// dQ and the gradients of the tables are sums of dS: another kernel's work (backward_plain.h says which), that neither holds
// products up nor shares their registers. What remains is the kernel without a bias (backward_keys.h) with a warpgroup
// beside it that expands the bias (bias_expand.h). For its memory K and V have one stage each, and are given back
// within a tile's last step.
#pragma once

#include "attention/bias_expand.h"

namespace genrec::attention {

template <class Element_, bool kCausal_>
struct BiasedKeysShape : PipelinedShape<Element_, 128, kCausal_, false> {
  using Base = PipelinedShape<Element_, 128, kCausal_, false>;
  using typename Base::Element;
  using Base::D, Base::kKeys, Base::kQueries, Base::kConsumers;
  static constexpr Bias kBias = Bias::kRelative;
  static constexpr bool kStores = true, kStoredOnly = true;
  using Params = BiasedParams<BackwardParams, kBias>;
  using Parts = CellParts<kQueries>;
  static constexpr int kKeyStages = 1, kValueStages = 1, kQueryStages = 3;
  static constexpr int kBiasStages = kQueryStages;  // a place in one ring is one in the other
  // The consumers' registers limit the others': 216 make ptxas put a wait behind every wgmma.
  static constexpr int kThreads = 128 * (2 + kConsumers);
  static constexpr int kProducerRegisters = 24, kConsumerRegisters = 224, kExpanderRegisters = 40;
  static_assert(kProducerRegisters + kConsumers * kConsumerRegisters + kExpanderRegisters <= 65536 / 128,
                "more registers than there are");

  struct alignas(1024) Shared {
    alignas(1024) Element k[kKeyStages][kKeys * D];
    alignas(1024) Element v[kValueStages][kKeys * D];
    alignas(1024) Element q[kQueryStages][kQueries * D];
    alignas(1024) Element d_out[kQueryStages][kQueries * D];
    ExpandedBias bias[kBiasStages];
    Ring<kKeyStages> k_ring;
    Ring<kValueStages> v_ring;
    Ring<kQueryStages> q_ring, d_out_ring;
    Ring<kBiasStages> bias_ring;
    Ring<2> work_ring;
    PipelinedWork work[2];
    StepRecord steps[2 * kQueryStages];  // record_place says where
    ColumnSight sights[kConsumers][64];
    ExpanderMemory expanders[kExpanders];
    BucketTables buckets;
  };
  static_assert(sizeof(Shared) <= 232448, "more shared memory than a block may have");
};

template <class Shape>
struct BiasedKeysConsumer : PipelinedLoop<Shape, BiasedKeysConsumer<Shape>> {
  using Base = PipelinedLoop<Shape, BiasedKeysConsumer<Shape>>;
  using Base::Base, Base::p, Base::shared, Base::warpgroup, Base::lane, Base::keys, Base::values, Base::q;
  using typename Base::Element;
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
    const auto issue_scores = [&](const Stage& at) {
      shared.q_ring.full[at.stage].wait(at.parity);
      masked = this->record(at).masked;
      issue_product<true>(score_mma, settled_operand(k_tile(_, _, _, 0)), q_tile(_, _, _, at.stage), scores);
      shared.bias_ring.full[at.stage].wait(at.parity);
      bias.read(shared.bias[at.stage], 4 * warpgroup + lane.warp, lane.lane);
      release(shared.bias_ring.empty[at.stage]);
    };
    // One step, whose scores and bias are there; those of the next are asked for if there is one.
    const auto step = [&](auto has_next) {
      constexpr bool kNext = decltype(has_next)::value;
      Tensor d_weights = partition_fragment_C(score_mma, Extent<kKeys, kQueries>{});
      shared.d_out_ring.full[q.stage].wait(q.parity);
      issue_product<true>(score_mma, settled_operand(v_tile(_, _, _, 0)), d_out_tile(_, _, _, q.stage), d_weights);

      auto weights = make_operand<Element, kQueries>();
      OperandPairs<Element, decltype(weights)> rounded{weights};
      ScorePairs<Element, kQueries / 2, false> derivatives;
      const BiasedScores<decltype(scores)> biased{scores, bias, p.common.half_alpha};
      weigh<Shape>(biased, rounded, derivatives, 1.f, masked, this->record(q), shared.sights[warpgroup], lane,
                   lane.column());
      issue_product<false>(out_mma, weights, d_out_columns(_, _, _, q.stage), dv);
      wait_for<1>(d_weights);
      if constexpr (!kNext) release(this->shared.v_ring.empty[0]);
      auto ds = make_operand<Element, kQueries>();
      differentiate<Element>(derivatives, d_weights, ds);
      issue_product<false>(out_mma, ds, q_columns(_, _, _, q.stage), dk);
      const StepRecord& record = this->record(q);  // beside products: nothing waits for these stores
      keep_ds<typename Shape::Parts>(
          ds, p.store, warpgroup < record.cells ? record.place + warpgroup * Shape::Parts::kCount : -1, lane);
      wait_for<1>(dv);  // before the next scores: P's registers are theirs
      release(shared.d_out_ring.empty[q.stage]);
      Stage next = q;
      next.next();
      if constexpr (kNext) issue_scores(next);
      wait_for<kNext>(dk);
      release(shared.q_ring.empty[q.stage]);
      if constexpr (kNext) wait_for<0>(scores);
      q = next;
    };
    this->write_sights();
    shared.k_ring.full[0].wait(keys.parity);
    if (count == 0) {
      shared.v_ring.full[0].wait(values.parity);
      release(shared.k_ring.empty[0]);
      release(shared.v_ring.empty[0]);
    } else {
      issue_scores(q);
      shared.v_ring.full[0].wait(values.parity);
      wait_for<0>(scores);
      CUTE_NO_UNROLL
      for (; count > 1; --count) step(true_type{});
      release(shared.k_ring.empty[0]);
      step(false_type{});
    }
    this->store(dk, 2.f * p.common.half_alpha, p.dk);
    this->store(dv, 1.f, p.dv);
  }
};

template <class Shape>
__global__ void __launch_bounds__(Shape::kThreads, 1)
    biased_keys_kernel(const __grid_constant__ typename Shape::Params p) {
  GENREC_SHARED_MEMORY(memory);
  auto& shared = *reinterpret_cast<typename Shape::Shared*>(memory);
  if (threadIdx.x == 0) {
    constexpr int kArrivals = Shape::kConsumers * kArrivalsPerWarpgroup;
    shared.k_ring.init(kArrivals);
    shared.v_ring.init(kArrivals);
    shared.q_ring.init(kArrivals, 2);  // Q and the step's record
    shared.d_out_ring.init(kArrivals);
    shared.bias_ring.init_between_warps(kArrivals, kExpanders);
    shared.work_ring.init(kArrivals + kStreamLoaders<Shape> + kExpanders);
    fence_new_barriers();
    for (const CUtensorMap* map : {&p.q, &p.k, &p.v, &p.d_out}) prefetch_map(*map);
  }
  fill_buckets<Shape::kThreads>(shared.buckets, p.bias, 0.5f);
  sync_block(Shape::kThreads);
  const int warpgroup = uniform(threadIdx.x / 128);
  if (warpgroup == 0) {
    give_registers<Shape::kProducerRegisters>();
    pipelined_produce<Shape>(p, shared);
  } else if (warpgroup > Shape::kConsumers) {
    give_registers<Shape::kExpanderRegisters>();
    BiasExpander<Shape>(p, shared, uniform(threadIdx.x / 32) % 4).run();
  } else {
    take_registers<Shape::kConsumerRegisters>();
    BiasedKeysConsumer<Shape>(p, shared, warpgroup - 1).run();
  }
}

}  // namespace genrec::attention
