// The backward kernel for D = 256 without a bias, and with a relative one that lies in memory: dK and dV of 64 keys, a
// warpgroup for each.
//
// With 128 keys the accumulators of dK and dV are twice what the registers hold. Here one warpgroup computes S and P
// and adds P^T dO to dV; the other computes dP and dS and adds dS^T Q to dK: 128 registers of accumulators each. Only
// SiLU' passes from the first to the second, in shared memory, in fp16, each thread's for the same thread of the other.
// Each warpgroup has the order of the forward pass: the products that begin a step are issued before those that end the
// step before, and what lies between them is computed beside those.
//
// The second warpgroup leaves dS in device memory, where there is room for it, for the pass that gives dQ.
//
// So Q and dO of a step are in use for about two steps, and the loads need a third stage to arrive in time. 48 queries
// a step make room for it. S and dP cost 28 cycles of shared memory for 24 of products then.
//
// With a relative bias the first warpgroup's threads read what they add to their scores straight into registers, a step
// ahead, before they issue products: reads behind those wait until the tensor cores take them up. Where it lies is in the
// record of the step before, since Q of a step comes just in time.
#pragma once

#include "attention/backward_pipelined.h"
#include "attention/mma_narrow.h"
#include "attention/part_bias.h"

namespace genrec::attention {

template <class Element_, bool kCausal_>
struct RelayShape {
  using Element = Element_;
  static constexpr int D = 256, kQueries = 48, kKeys = 64;
  using Params = BackwardParams;
  static constexpr bool kCausal = kCausal_, kGathers = false, kStores = true, kStoredOnly = false;
  static constexpr bool kReadsBias = false;
  static constexpr int kQueryBox = kQueries, kKeyBox = kBoxRows;
  static constexpr int kConsumers = 2, kKeyReaders = 1, kSlopeStages = 2;
  static constexpr int kQueryStages = 3, kKeyStages = 1, kValueStages = 1;
  static constexpr int kThreads = 128 * (1 + kConsumers);
  static constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
  static constexpr int kSlopeWords = kQueries / 4;  // of a thread: two scores each

  using ScoreMma = decltype(cute::make_tiled_mma(NarrowProduct<Element>{}));
  using OutMma = decltype(cute::make_tiled_mma(
      cute::GMMA::rs_op_selector<Element, Element, float, cute::Shape<cute::_64, cute::Int<D>, cute::Int<kQueries>>,
                                 cute::GMMA::Major::K, cute::GMMA::Major::MN>()));

  struct alignas(1024) Shared {
    alignas(1024) Element k[kKeyStages][kKeys * D];
    alignas(1024) Element v[kValueStages][kKeys * D];
    alignas(1024) Element q[kQueryStages][kQueries * D];
    alignas(1024) Element d_out[kQueryStages][kQueries * D];
    uint4 slopes[kSlopeStages][kSlopeWords / 4][128];
    Ring<kKeyStages> k_ring;
    Ring<kValueStages> v_ring;
    Ring<kQueryStages> q_ring, d_out_ring;
    Ring<kSlopeStages> slope_ring;
    Ring<2> work_ring;
    PipelinedWork work[2];
    StepRecord steps[2 * kQueryStages];
    ColumnSight sights[1][64];

    __device__ void init_more(int) { slope_ring.init_between_warps(kArrivalsPerWarpgroup, kArrivalsPerWarpgroup); }
  };
  static_assert(sizeof(Shared) <= 232448, "more shared memory than a block may have");
  static_assert(fits_registers(kProducerRegisters, kConsumerRegisters), "more registers than the block was given");

  static __device__ int first_key(int) { return 0; }
  using Parts = CellParts<kQueries>;
  static_assert(kKeys == kCellKeys, "a step's dS is a part of a cell");
};

// With a bias: sequences that have a place in the stores.
template <class Element_, bool kCausal_>
struct BiasedRelayShape : RelayShape<Element_, kCausal_> {
  static constexpr bool kStoredOnly = true, kReadsBias = true;
  struct Params : BackwardParams {
    BiasStore bias;
  };
};

struct NoPartBias {};

template <class Shape>
struct RelayConsumer : PipelinedLoop<Shape, RelayConsumer<Shape>> {
  using Base = PipelinedLoop<Shape, RelayConsumer<Shape>>;
  using Base::Base, Base::p, Base::shared, Base::warpgroup, Base::lane, Base::thread, Base::keys, Base::values, Base::q;
  using typename Base::Element;
  static constexpr int D = Shape::D, kQueries = Shape::kQueries, kKeys = Shape::kKeys;
  using Slopes = ScorePairs<cutlass::half_t, kQueries / 2, true>;
  using Stage = Place<Shape::kQueryStages>;
  using Parts = typename Shape::Parts;

  Place<Shape::kSlopeStages> slope{warpgroup == 0 ? 1u : 0u};  // the first warpgroup produces them

  __device__ void one_tile(int count) {
    if (warpgroup == 0) {
      give_values(count);
    } else {
      give_keys(count);
    }
  }

 private:
  __device__ void give_values(int count) {
    using namespace cute;
    typename Shape::ScoreMma score_mma;
    typename Shape::OutMma out_mma;
    const auto score_slice = score_mma.get_slice(0);
    const auto out_slice = out_mma.get_slice(0);
    const auto k_tile = operand_a(score_slice, this->staged_keys(shared.k));
    const auto q_tile = operand_b(score_slice, this->staged_queries(shared.q[0]));
    const auto d_out_columns = operand_b(out_slice, this->staged_queries_transposed(shared.d_out[0]));
    Tensor dv = partition_fragment_C(out_mma, Extent<kKeys, D>{});
    clear(dv);
    auto weights = make_operand<Element, kQueries>();
    using StepBias = conditional_t<Shape::kReadsBias, PartBias<Parts>, NoPartBias>;
    StepBias read;  // the next scores', before blocks are transposed
    Stage at = q;  // of the scores; q: of the products with P
    const auto await_gradients = [&] { shared.d_out_ring.full[q.stage].wait(q.parity); };
    const auto add_values = [&] {
      issue_product<false>(out_mma, weights, d_out_columns(_, _, _, q.stage), dv);
    };
    const auto finish_values = [&] {
      wait_for<0>(dv);
      release(shared.d_out_ring.empty[q.stage]);
      q.next();
    };
    // S and P of the next step; dV of the step before is issued behind S.
    const auto step = [&](auto has_before) {
      constexpr bool kBefore = decltype(has_before)::value;
      Tensor scores = partition_fragment_C(score_mma, Extent<kKeys, kQueries>{});
      // Reads and waits that stand behind products take as long as the tensor cores need to take those up.
      shared.q_ring.full[at.stage].wait(at.parity);
      const StepRecord record = this->record(at);
      if constexpr (kBefore) await_gradients();
      StepBias bias;
      if constexpr (Shape::kReadsBias) {
        bias = read.transposed();
        read.read(p.bias, record.bias.template part<Parts>(0), lane);  // the next step's, if there is one
        keep_order();
      }
      issue_product<true>(score_mma, k_tile(_, _, _, keys.stage), q_tile(_, _, _, at.stage), scores);
      if constexpr (kBefore) add_values();
      wait_for<kBefore>(scores);
      release(shared.q_ring.empty[at.stage]);
      at.next();
      ScorePairs<Element, kQueries / 2, false> exact;
      Slopes slopes;
      if constexpr (Shape::kReadsBias) {
        weigh<Shape>(bias.added_to(scores, p.common.half_alpha), exact, slopes, 1.f, record.masked, record,
                     shared.sights[0], lane, lane.column());
      } else {
        weigh<Shape>(scores, exact, slopes, p.common.half_alpha, record.masked, record, shared.sights[0], lane,
                     lane.column());
      }
      give_slopes(slopes);
      if constexpr (kBefore) finish_values();
      OperandPairs<Element, decltype(weights)> rounded{weights};  // now: sooner the last products would still read them
      CUTE_UNROLL
      for (int e = 0; e < size(scores); e += 2) rounded.put(e, exact.values[e], exact.values[e + 1]);
    };
    if constexpr (Shape::kReadsBias) {
      if (count > 0) read.read(p.bias, first_bias<Shape>(p, shared.work[this->work.stage].tile, 0), lane);
    }
    this->write_sights();
    shared.k_ring.full[keys.stage].wait(keys.parity);
    if (count > 0) {
      step(false_type{});
      CUTE_NO_UNROLL
      for (; count > 1; --count) step(true_type{});
      release(shared.k_ring.empty[keys.stage]);
      await_gradients();
      add_values();
      finish_values();
    } else {
      release(shared.k_ring.empty[keys.stage]);
    }
    this->store(dv, 1.f, p.dv);
  }

  __device__ void give_keys(int count) {
    using namespace cute;
    typename Shape::ScoreMma score_mma;
    typename Shape::OutMma out_mma;
    const auto score_slice = score_mma.get_slice(0);
    const auto out_slice = out_mma.get_slice(0);
    const auto v_tile = operand_a(score_slice, this->staged_keys(shared.v));
    const auto d_out_tile = operand_b(score_slice, this->staged_queries(shared.d_out[0]));
    const auto q_columns = operand_b(out_slice, this->staged_queries_transposed(shared.q[0]));
    Tensor dk = partition_fragment_C(out_mma, Extent<kKeys, D>{});
    clear(dk);
    auto ds = make_operand<Element, kQueries>();
    Stage at = q;  // of dP; q: of the products with dS
    const auto await_queries = [&] { shared.q_ring.full[q.stage].wait(q.parity); };
    const auto add_keys = [&] {
      issue_product<false>(out_mma, ds, q_columns(_, _, _, q.stage), dk);
    };
    const auto finish_keys = [&] {
      wait_for<0>(dk);
      release(shared.q_ring.empty[q.stage]);
      q.next();
    };
    // dP and dS of the next step; dK of the step before is issued behind dP.
    const auto step = [&](auto has_before) {
      constexpr bool kBefore = decltype(has_before)::value;
      Tensor d_weights = partition_fragment_C(score_mma, Extent<kKeys, kQueries>{});
      shared.d_out_ring.full[at.stage].wait(at.parity);
      if constexpr (kBefore) await_queries();
      issue_product<true>(score_mma, v_tile(_, _, _, values.stage), d_out_tile(_, _, _, at.stage), d_weights);
      if constexpr (kBefore) add_keys();
      const Slopes slopes = read_slopes();
      const int64_t place = this->record(at).place;  // written before the slopes were
      wait_for<kBefore>(d_weights);
      release(shared.d_out_ring.empty[at.stage]);
      at.next();
      CUTE_UNROLL
      for (int e = 0; e < size(d_weights); e += 2) {
        const cutlass::Array<float, 2> pair = slopes.get(e);
        d_weights(e) *= pair[0], d_weights(e + 1) *= pair[1];
      }
      release_slopes(slopes);
      if constexpr (kBefore) finish_keys();
      convert<Element>(d_weights, ds);  // now: sooner the last products would still read them
      keep_ds<Parts>(ds, p.store, place, lane);
    };
    shared.v_ring.full[values.stage].wait(values.parity);
    if (count > 0) {
      step(false_type{});
      CUTE_NO_UNROLL
      for (; count > 1; --count) step(true_type{});
      release(shared.v_ring.empty[values.stage]);
      await_queries();
      add_keys();
      finish_keys();
    } else {
      release(shared.v_ring.empty[values.stage]);
    }
    this->store(dk, 2.f * p.common.half_alpha, p.dk);
  }

  __device__ void give_slopes(const Slopes& slopes) {
    shared.slope_ring.empty[slope.stage].wait(slope.parity);
    CUTE_UNROLL
    for (int i = 0; i < Shape::kSlopeWords; i += 4) {
      const uint32_t* words = slopes.values + i;
      shared.slopes[slope.stage][i / 4][thread] = make_uint4(words[0], words[1], words[2], words[3]);
    }
    release(shared.slope_ring.full[slope.stage]);
    slope.next();
  }

  __device__ Slopes read_slopes() const {
    Slopes slopes;
    shared.slope_ring.full[slope.stage].wait(slope.parity);
    keep_accesses();
    CUTE_UNROLL
    for (int i = 0; i < Shape::kSlopeWords; i += 4) {
      const uint4 words = shared.slopes[slope.stage][i / 4][thread];
      slopes.values[i] = words.x, slopes.values[i + 1] = words.y;
      slopes.values[i + 2] = words.z, slopes.values[i + 3] = words.w;
    }
    return slopes;
  }

  __device__ void release_slopes(const Slopes& slopes) {
    uint32_t bits = 0;
    CUTE_UNROLL
    for (int i = 0; i < Shape::kSlopeWords; i += 4) bits |= slopes.values[i];
    release_read(shared.slope_ring.empty[slope.stage], bits);
    slope.next();
  }
};

}  // namespace genrec::attention
