// The backward kernel for D = 256 without a bias: one pass, 64 keys, dK and dV split by columns.
//
// With 128 keys the accumulators of dK and dV are twice what the registers hold (backward.h makes two passes). Here
// both warpgroups work on the same 64 keys, each with 128 of the 256 columns of dK, dV and dQ: 64 registers each. K and V
// take 64 KiB, so that two stages of Q and dO, 64 KiB each, fit beside them and loads run ahead.
//
// Who computes S and dP, of which both warpgroups need all 64 x 64? Each warpgroup computes them for 32 of the queries
// (K = 256 in full). To halve the reduction over D instead would read a third less for these products and pass
// as much again in fp32 sums through shared memory; to give S to one warpgroup and dP to the other would let one wait
// while the other works. So P and dS change hands in shared memory as 16-bit numbers, 8 KiB each. Of its own 32 queries
// a warpgroup has them in registers: half of dV starts before the other half has arrived, and only half of P and dS
// is read back.
#pragma once

#include "attention/backward_pipelined.h"

namespace genrec::attention {

template <class Element_, bool kCausal_, bool kGathers_>
struct WideShape {
  using Element = Element_;
  static constexpr int D = 256, kQueries = 64, kKeys = 64;
  static constexpr bool kCausal = kCausal_, kGathers = kGathers_;
  static constexpr int kQueryBox = 64, kKeyBox = 64;
  static constexpr int kConsumers = 2, kQueryStages = 2, kKeyStages = 1;
  static constexpr int kThreads = 128 * (1 + kConsumers);
  static constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;
  static constexpr bool kSplitColumns = true;
  static constexpr int kDqColumns = D / 2, kOwnQueries = kQueries / 2;

  using Split = cute::Layout<cute::Shape<cute::_1, cute::_2, cute::_1>>;  // warpgroups lie along N
  template <cute::GMMA::Major kA, cute::GMMA::Major kB, int N, int K>
  using Product = decltype(cute::make_tiled_mma(
      cute::GMMA::ss_op_selector<Element, Element, float, cute::Shape<cute::_64, cute::Int<N>, cute::Int<K>>, kA, kB>(),
      Split{}));
  using ScoreMma = Product<cute::GMMA::Major::K, cute::GMMA::Major::K, kOwnQueries, D>;
  using OutMma = decltype(cute::make_tiled_mma(
      cute::GMMA::rs_op_selector<Element, Element, float,
                                 cute::Shape<cute::_64, cute::Int<D / 2>, cute::Int<kOwnQueries>>,
                                 cute::GMMA::Major::K, cute::GMMA::Major::MN>(),
      Split{}));
  using SharedOutMma = Product<cute::GMMA::Major::K, cute::GMMA::Major::MN, D / 2, kOwnQueries>;
  using DqMma = Product<cute::GMMA::Major::MN, cute::GMMA::Major::MN, kDqColumns, kKeys>;

  struct Shared : PipelinedShared<Element, D, kKeys, kQueries, kKeyStages, kQueryStages> {
    alignas(1024) Element weights[kQueryStages][kQueries * kKeys];
  };
  static_assert(sizeof(Shared) <= 232448, "more shared memory than a block may have");
  static_assert(fits_registers(kProducerRegisters, kConsumerRegisters), "more registers than the block was given");
};

template <class Shape>
struct WideConsumer : PipelinedLoop<Shape, WideConsumer<Shape>> {
  using Base = PipelinedLoop<Shape, WideConsumer<Shape>>;
  using Base::Base, Base::p, Base::shared, Base::warpgroup, Base::lane, Base::keys, Base::q;
  using typename Base::Element;
  static constexpr int D = Shape::D, kQueries = Shape::kQueries, kKeys = Shape::kKeys, kOwn = Shape::kOwnQueries;

  __device__ void one_tile(int count) {
    using namespace cute;
    typename Shape::ScoreMma score_mma;
    typename Shape::OutMma out_mma;
    typename Shape::SharedOutMma shared_out_mma;
    typename Shape::DqMma dq_mma;
    const auto score_slice = this->slice(score_mma);
    const auto out_slice = this->slice(out_mma);
    const auto shared_out_slice = this->slice(shared_out_mma);
    const auto dq_slice = this->slice(dq_mma);
    const auto k_tile = operand_a(score_slice, this->staged_keys(shared.k[0]));
    const auto v_tile = operand_a(score_slice, this->staged_keys(shared.v[0]));
    const auto q_tile = operand_b(score_slice, this->staged_queries(shared.q[0]));
    const auto d_out_tile = operand_b(score_slice, this->staged_queries(shared.d_out[0]));
    const auto q_columns = halves(operand_b(out_slice, this->staged_queries_transposed(shared.q[0])));
    const auto d_out_columns = halves(operand_b(out_slice, this->staged_queries_transposed(shared.d_out[0])));
    const auto k_columns = operand_b(dq_slice, this->staged_keys_transposed(shared.k[0]));
    // (keys, queries) of P^T and dS^T for dV and dK; the same memory as (queries, keys) for dQ.
    using Matrices = TileLayout<Element, kKeys, kQueries, Shape::kQueryStages>;
    const auto weights_matrix = halves(operand_a(shared_out_slice,
                                                 make_tensor(make_smem_ptr(shared.weights[0]), Matrices{})));
    const auto ds_matrix = halves(operand_a(shared_out_slice, make_tensor(make_smem_ptr(shared.ds[0]), Matrices{})));
    const auto ds_rows = operand_a(dq_slice, this->staged_scores(shared.ds[0]));
    const int mine = warpgroup, other = 1 - warpgroup;

    Tensor dk = partition_fragment_C(out_mma, Extent<kKeys, D>{});
    Tensor dv = partition_fragment_C(out_mma, Extent<kKeys, D>{});
    clear(dk);
    clear(dv);
    shared.v_ring.full[0].wait(keys.parity);
    CUTE_NO_UNROLL
    for (; count > 0; --count, q.next()) {
      const StepRecord& record = shared.steps[q.stage];
      Tensor scores = partition_fragment_C(score_mma, Extent<kKeys, kQueries>{});
      Tensor d_weights = partition_fragment_C(score_mma, Extent<kKeys, kQueries>{});
      shared.q_ring.full[q.stage].wait(q.parity);
      const bool masked = record.masked;
      issue_product<true>(score_mma, k_tile(_, _, _, 0), q_tile(_, _, _, q.stage), scores);
      shared.d_out_ring.full[q.stage].wait(q.parity);
      issue_product<true>(score_mma, v_tile(_, _, _, 0), d_out_tile(_, _, _, q.stage), d_weights);
      wait_for<1>(scores);

      auto weights = make_operand<Element, kOwn>();
      Derivatives<Element, kQueries / 4, false> derivatives;
      weigh<Shape>(scores, weights, derivatives, p.common.half_alpha, masked, record, shared.sights[warpgroup], lane,
                   kOwn * mine + lane.column());
      issue_product<false>(out_mma, weights, d_out_columns(_, _, make_coord(_, mine), q.stage), dv);
      // One buffer for each stage of Q: the other warpgroup's products of two tiles ago were complete before it came to
      // the barrier of the last tile, which this one has passed too.
      write_scores<kKeys, kOwn>(weights, shared.weights[q.stage], 0, kOwn * mine, lane);
      wait_for<1>(d_weights);
      auto ds = make_operand<Element, kOwn>();
      differentiate<Element>(derivatives, d_weights, ds);
      write_scores<kKeys, kOwn>(ds, shared.ds[q.stage], 0, kOwn * mine, lane);
      sync_threads(kDsWritten, 256);

      Tensor dq = partition_fragment_C(dq_mma, Extent<kQueries, D>{});
      if constexpr (Shape::kGathers)
        issue_product<true>(dq_mma, ds_rows(_, _, _, q.stage), k_columns(_, _, _, 0), dq);
      issue_product<false>(shared_out_mma, weights_matrix(_, _, make_coord(_, other), q.stage),
                           d_out_columns(_, _, make_coord(_, other), q.stage), dv);
      issue_product<false>(out_mma, ds, q_columns(_, _, make_coord(_, mine), q.stage), dk);
      issue_product<false>(shared_out_mma, ds_matrix(_, _, make_coord(_, other), q.stage),
                           q_columns(_, _, make_coord(_, other), q.stage), dk);
      if constexpr (Shape::kGathers) {
        wait_for<3>(dq);
        this->gather(dq, record);
      }
      wait_for<2>(dv);
      release(shared.d_out_ring.empty[q.stage]);
      wait_for<0>(dk);
      release(shared.q_ring.empty[q.stage]);
    }
    release(shared.k_ring.empty[0]);
    release(shared.v_ring.empty[0]);
    this->store(dk, dv, D / 2 * warpgroup);
  }

 private:
  // An operand over 64 queries, its third mode split: (step, half of the queries).
  template <class Operand>
  static __device__ auto halves(Operand const& operand) {
    using Steps = cute::Int<kOwn / 16>;
    return cute::logical_divide(operand, cute::make_tile(cute::_, cute::_, Steps{}, cute::_));
  }
};

}  // namespace genrec::attention
