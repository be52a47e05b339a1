// The pass for dV of backward.h, with its first step apart. Not yet run on a GPU: part of a variant (variants.h).
//
// With a condition on the first step in the loop, ptxas cannot see that weights are never written while dV reads them,
// and puts a wait behind every wgmma of the default's pass.
#pragma once

#include "attention/backward.h"

namespace genrec::attention {

template <class Shape>
struct ValuesConsumer : BackwardConsumer<Shape> {
  using Base = BackwardConsumer<Shape>;
  using Base::Base, Base::p, Base::shared, Base::warpgroup, Base::lane, Base::q;
  using typename Base::Element;
  static constexpr int D = Shape::D, kQueries = Shape::kQueries, kKeys = Shape::kKeys;

  __device__ void run() {
    for (;; this->work.next(), this->keys.next()) {
      shared.work_ring.full[this->work.stage].wait(this->work.parity);
      const TileRecord tile = shared.work[this->work.stage].tile;
      const int head = shared.work[this->work.stage].head;
      release(shared.work_ring.empty[this->work.stage]);
      if (tile.sequence < 0) return;
      const KeyTile<Shape> key_tile(tile, p.common.rule, warpgroup, lane);
      shared.k_ring.full[0].wait(this->keys.parity);
      values(key_tile, head);
    }
  }

 private:
  __device__ void values(const KeyTile<Shape>& key_tile, int head) {
    using namespace cute;
    typename Shape::ScoreMma score_mma;
    typename Shape::OutMma out_mma;
    const auto score_slice = this->slice(score_mma);
    const auto out_slice = this->slice(out_mma);
    const auto k_tile = operand_a(score_slice, this->key_rows(shared.k));
    const auto q_tile = operand_b(score_slice, this->staged_queries(shared.q[0]));
    const auto d_out_tile = operand_b(out_slice, this->staged_queries_transposed(shared.d_out[0]));
    Tensor dv = partition_fragment_C(out_mma, Extent<kKeys, D>{});
    clear(dv);
    auto weights = make_operand<Element, kQueries>();
    const auto to_weights = [&](auto& scores, int i) {
      CUTE_UNROLL
      for (int e = 0; e < size(scores); ++e) scores(e) = silu(scores(e), p.common.half_alpha);
      key_tile.template apply<Base::kScores>(key_tile.ranges.tile(i), lane.column(), [&](int e) { scores(e) = 0.f; });
    };
    Place<Shape::kQueryStages> done = q;  // the tile whose dO is still needed
    const int count = key_tile.ranges.count();
    if (count > 0) {
      {
        Tensor scores = partition_fragment_C(score_mma, Extent<kKeys, kQueries>{});
        shared.q_ring.full[q.stage].wait(q.parity);
        issue_product<true>(score_mma, k_tile(_, _, _, 0), q_tile(_, _, _, q.stage), scores);
        wait_for<0>(scores);
        release(shared.q_ring.empty[q.stage]);
        q.next();
        to_weights(scores, 0);
        convert<Element>(scores, weights);
      }
      CUTE_NO_UNROLL
      for (int i = 1; i < count; ++i) {
        Tensor scores = partition_fragment_C(score_mma, Extent<kKeys, kQueries>{});
        shared.q_ring.full[q.stage].wait(q.parity);
        issue_product<true>(score_mma, k_tile(_, _, _, 0), q_tile(_, _, _, q.stage), scores);
        shared.d_out_ring.full[done.stage].wait(done.parity);
        issue_product<false>(out_mma, weights, d_out_tile(_, _, _, done.stage), dv);
        wait_for<1>(scores);
        release(shared.q_ring.empty[q.stage]);
        q.next();
        to_weights(scores, i);
        wait_for<0>(dv);
        release(shared.d_out_ring.empty[done.stage]);
        done.next();
        convert<Element>(scores, weights);
      }
      shared.d_out_ring.full[done.stage].wait(done.parity);
      issue_product<false>(out_mma, weights, d_out_tile(_, _, _, done.stage), dv);
      wait_for<0>(dv);
      release(shared.d_out_ring.empty[done.stage]);
    }
    release(shared.k_ring.empty[0]);
    this->store(dv, this->scale_of(key_tile.tile), p.dv, key_tile.tile, head);
  }
};

}  // namespace genrec::attention
