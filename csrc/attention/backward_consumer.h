// The warpgroups that compute in the backward kernel with a bias (backward.h).
#pragma once

#include "attention/backward_bias.h"

namespace genrec::attention {

// What the consumers know of their tile of keys.
template <class Shape>
struct KeyTile {
  using Mask = SequenceMask<Shape::kCausal>;
  TileRecord tile;
  Mask mask;
  TileRanges ranges;
  ColumnBand band;
  ColumnSight low, high;  // who sees the thread's two keys
  int shift;

  __device__ KeyTile(const TileRecord& t, MaskRule rule, int warpgroup, Lane lane)
      : tile(t), mask(t.keys, t.contexts, t.targets, rule) {
    ranges = mask.query_tiles(t.first, t.first + Shape::kKeys, Shape::kQueries, t.queries);
    band = mask.columns(t.first, t.first + Shape::kKeys);
    const int key = t.first + 64 * warpgroup + lane.row();
    low = mask.column(key), high = mask.column(key + 8);
    shift = t.keys - t.queries;
  }

  __device__ int steps() const { return ranges.count(); }

  // Calls hide(e) for each of the thread's elements of the step's query tile that nobody may see.
  template <int kSize, class Hide>
  __device__ void apply(StepWord step, int column, Hide hide) const {
    const int i0 = step.m() * Shape::kQueries + shift;
    if (band.all_seen(i0, i0 + Shape::kQueries)) return;
    const int first = i0 + column;
    hide_unseen<Shape::kCausal, kSize>(moved(low, first), moved(high, first), hide);
  }

  // How many key tiles add to query tile `m` before this one.
  __device__ int rank(int m) const {
    const int i0 = m * Shape::kQueries + shift;
    return mask.key_tiles(i0, smaller(i0 + Shape::kQueries, tile.keys), Shape::kKeys).rank(tile.first / Shape::kKeys);
  }
};

template <class Shape>
struct BackwardConsumer {
  using Element = typename Shape::Element;
  using Shared = typename Shape::Shared;
  using Keys = cute::conditional_t<Shape::kRelative, BiasedKeyTile<Shape>, KeyTile<Shape>>;
  static constexpr int D = Shape::D, kQueries = Shape::kQueries, kKeys = Shape::kKeys;
  static constexpr int kScores = kQueries / 2;  // elements of S^T that a thread holds

  const typename Shape::Params& p;
  Shared& shared;
  const int warpgroup;
  const Lane lane;
  Place<2> work{0};
  Place<1> keys{0};
  Place<Shape::kQueryStages> q{0};
  int buffer = 0;
  Place<Shape::kBiasStages> bias{0};
  Place<Shape::kScoreBuffers == 1 ? 1 : 2> ds_place{1};  // of dS, where tables are summed
  int64_t times[2] = {0, 0};                             // of the thread's two keys

  __device__ BackwardConsumer(const typename Shape::Params& params, Shared& memory, int group)
      : p(params), shared(memory), warpgroup(group) {}

  __device__ void run() {
    for (;; work.next(), keys.next()) {
      shared.work_ring.full[work.stage].wait(work.parity);
      if constexpr (Shape::kRelative) {
        const TileRecord& tile = shared.work[work.stage].tile;
        if (tile.sequence < 0) return;
        const TileTimes<false> all(p.bias, tile);
        for (int half = 0; half < 2 && p.bias.time != nullptr; ++half)
          times[half] = all.fixed(tile.first + 64 * warpgroup + lane.row() + 8 * half);
        go_over(Keys{tile, p.common.rule, p.common.half_alpha, warpgroup, lane}, shared.work[work.stage].head);
        release(shared.work_ring.empty[work.stage]);
      } else {
        const TileRecord tile = shared.work[work.stage].tile;
        const int head = shared.work[work.stage].head;
        release(shared.work_ring.empty[work.stage]);
        if (tile.sequence < 0) return;
        go_over(Keys(tile, p.common.rule, warpgroup, lane), head);
      }
    }
  }

 protected:
  __device__ void go_over(const Keys& key_tile, int head) {
    shared.k_ring.full[0].wait(keys.parity);
    if constexpr (Shape::kGivesKeys) {
      one_pass(key_tile, head);
    } else {
      values_only(key_tile, head);
    }
  }

  static __device__ auto threads() { return cute::make_layout(cute::_2{}, cute::_128{}); }

  template <class Mma>
  __device__ auto slice(Mma const& mma) const {
    return mma.get_slice(threads()(warpgroup));
  }

  __device__ auto staged_queries(Element* data) const {
    return cute::make_tensor(cute::make_smem_ptr(data), TileLayout<Element, kQueries, D, Shape::kQueryStages>{});
  }

  __device__ auto staged_queries_transposed(Element* data) const {
    return cute::make_tensor(cute::make_smem_ptr(data),
                             TransposedLayout<Element, kQueries, D, Shape::kQueryStages>{});
  }

  __device__ auto key_rows(Element* data) const {
    return cute::make_tensor(cute::make_smem_ptr(data), TileLayout<Element, kKeys, D, 1>{});
  }

  __device__ float scale_of(const TileRecord& tile) const {
    return p.common.scales ? p.common.scales[tile.sequence] : p.common.scale;
  }

  template <class Acc>
  __device__ void store(const Acc& acc, float factor, const Output& out, const TileRecord& tile, int head) const {
    const int first = tile.first + 64 * warpgroup;
    store_rows<Element>(acc, factor, out, int64_t{tile.key_start} + first, head, 0, tile.keys - first);
  }

  // Scores of step i to h = (alpha score + bias) / 2, or to bias / alpha, which products will be added to. Returns what is
  // known of the step: with a relative bias it comes with that.
  template <class Scores>
  __device__ StepWord add_bias(Scores& scores, const Keys& key_tile, int i, int head) {
    const TileRecord& tile = key_tile.tile;
    const int row = 64 * warpgroup + lane.row();
    if constexpr (Shape::kRelative) {
      shared.bias.ring.full[bias.stage].wait(bias.parity);
      const StepWord step{2 * shared.steps[bias.stage].m + shared.steps[bias.stage].masked};
      add_relative_bias<Shape::kBiasFirst>(
          scores, p.common.half_alpha, shared.bias.tiles[bias.stage], shared.bias.buckets, row, lane.column(), times[0], times[1],
          [&](int column) { return TileTimes<false>(p.bias, tile).streamed(step.m() * kQueries + column); });
      release(shared.bias.ring.empty[bias.stage]);
      bias.next();
      return step;
    } else {
      const int m = key_tile.ranges.tile(i);
      add_dense_bias<false>(scores, p.common.half_alpha, p.bias, tile.sequence, head, m * kQueries + lane.column(),
                            tile.first + row, tile.queries, tile.keys);
      return {2 * m};
    }
  }

  // The bias of step i, where there is one, to `next`, which products will be added to from the next step on.
  template <class Scores>
  __device__ void prepare(Scores& next, StepWord& step, const Keys& key_tile, int i, int count, int head) {
    if constexpr (Shape::kBiasFirst) {
      if (i < count) {
        step = add_bias(next, key_tile, i, head);
      } else {
        cute::clear(next);  // or the old ones would be kept in registers from their last use on
      }
    }
  }

  template <class Scores>
  __device__ void start_from(Scores& scores, const Scores& next) const {
    if constexpr (Shape::kBiasFirst) {
      CUTE_UNROLL
      for (int e = 0; e < kScores; ++e) scores(e) = copied(next(e));
    }
  }

  // dV alone: as the forward pass, with keys in the place of queries.
  __device__ void values_only(const Keys& key_tile, int head) {
    using namespace cute;
    typename Shape::ScoreMma score_mma;
    typename Shape::OutMma out_mma;
    const auto score_slice = slice(score_mma);
    const auto out_slice = slice(out_mma);
    const auto k_tile = operand_a(score_slice, key_rows(shared.k));
    const auto q_tile = operand_b(score_slice, staged_queries(shared.q[0]));
    const auto d_out_tile = operand_b(out_slice, staged_queries_transposed(shared.d_out[0]));
    Tensor dv = partition_fragment_C(out_mma, Extent<kKeys, D>{});
    clear(dv);
    auto weights = make_operand<Element, kQueries>();
    const auto to_weights = [&](auto& scores, int i) {
      const StepWord step = add_bias(scores, key_tile, i, head);
      CUTE_UNROLL
      for (int e = 0; e < kScores; ++e) scores(e) = silu_of_half(scores(e));
      key_tile.template apply<kScores>(step, lane.column(), [&](int e) { scores(e) = 0.f; });
    };
    const auto start_scores = [&](auto& scores) {
      shared.q_ring.full[q.stage].wait(q.parity);
      issue_product<true>(score_mma, k_tile(_, _, _, 0), q_tile(_, _, _, q.stage), scores);
    };
    const auto release_queries = [&] {
      release(shared.q_ring.empty[q.stage]);
      q.next();
    };
    Place<Shape::kQueryStages> done = q;  // the tile whose dO is still needed
    const auto add_values = [&] {
      shared.d_out_ring.full[done.stage].wait(done.parity);
      issue_product<false>(out_mma, weights, d_out_tile(_, _, _, done.stage), dv);
    };
    const auto finish_values = [&] {
      wait_for<0>(dv);
      release(shared.d_out_ring.empty[done.stage]);
      done.next();
    };
    // The first step stands apart: behind a condition in the loop ptxas could not see that weights are never written
    // while dV reads them, and would put a wait behind every wgmma.
    const int count = key_tile.steps();
    if (count > 0) {
      {
        Tensor scores = partition_fragment_C(score_mma, Extent<kKeys, kQueries>{});
        start_scores(scores);
        wait_for<0>(scores);
        release_queries();
        to_weights(scores, 0);
        convert<Element>(scores, weights);
      }
      CUTE_NO_UNROLL
      for (int i = 1; i < count; ++i) {
        Tensor scores = partition_fragment_C(score_mma, Extent<kKeys, kQueries>{});
        start_scores(scores);
        add_values();
        wait_for<1>(scores);
        release_queries();
        to_weights(scores, i);
        finish_values();
        convert<Element>(scores, weights);
      }
      add_values();
      finish_values();
    }
    release(shared.k_ring.empty[0]);
    store(dv, scale_of(key_tile.tile), p.dv, key_tile.tile, head);
  }

  __device__ void one_pass(const Keys& key_tile, int head) {
    using namespace cute;
    typename Shape::ScoreMma score_mma;
    typename Shape::OutMma out_mma;
    typename Shape::DqMma dq_mma;
    const auto score_slice = slice(score_mma);
    const auto out_slice = slice(out_mma);
    const auto dq_slice = slice(dq_mma);
    const auto k_tile = operand_a(score_slice, key_rows(shared.k));
    const auto v_tile = operand_a(score_slice, key_rows(shared.v));
    const auto q_tile = operand_b(score_slice, staged_queries(shared.q[0]));
    const auto d_out_tile = operand_b(score_slice, staged_queries(shared.d_out[0]));
    const auto q_columns = operand_b(out_slice, staged_queries_transposed(shared.q[0]));
    const auto d_out_columns = operand_b(out_slice, staged_queries_transposed(shared.d_out[0]));
    const auto k_columns = operand_b(dq_slice, 
        make_tensor(make_smem_ptr(shared.k), TransposedLayout<Element, kKeys, D, 1>{}));
    using Ds = ScoreLayout<Element, kQueries, kKeys>;

    Tensor dk = partition_fragment_C(out_mma, Extent<kKeys, D>{});
    Tensor dv = partition_fragment_C(out_mma, Extent<kKeys, D>{});
    clear(dk);
    clear(dv);
    const int count = key_tile.steps();
    Tensor next = partition_fragment_C(score_mma, Extent<kKeys, kQueries>{});
    StepWord step{};
    if (count > 0) prepare(next, step, key_tile, 0, count, head);
    shared.v_ring.full[0].wait(keys.parity);
    CUTE_NO_UNROLL
    for (int i = 0; i < count; ++i, q.next()) {
      Tensor scores = partition_fragment_C(score_mma, Extent<kKeys, kQueries>{});
      start_from(scores, next);
      Tensor d_weights = partition_fragment_C(score_mma, Extent<kKeys, kQueries>{});
      shared.q_ring.full[q.stage].wait(q.parity);
      issue_product<!Shape::kBiasFirst>(score_mma, k_tile(_, _, _, 0), q_tile(_, _, _, q.stage), scores);
      shared.d_out_ring.full[q.stage].wait(q.parity);
      issue_product<true>(score_mma, v_tile(_, _, _, 0), d_out_tile(_, _, _, q.stage), d_weights);
      wait_for<1>(scores);
      if constexpr (!Shape::kBiasFirst) step = add_bias(scores, key_tile, i, head);
      const int m = step.m();

      auto weights = make_operand<Element, kQueries>();
      ScorePairs<Element, kScores, false> derivatives;
      if constexpr (Shape::kBiasFirst) {
        OperandPairs<Element, decltype(weights)> rounded{weights};
        key_tile.weigh(scores, rounded, derivatives, step, lane.column());
        issue_product<false>(out_mma, weights, d_out_columns(_, _, _, q.stage), dv);
        wait_for<1>(d_weights);
      } else if constexpr (Shape::kGivesValues) {
        Tensor values = make_fragment_like(scores);
        CUTE_UNROLL
        for (int e = 0; e < kScores; ++e) {
          const SiluAndDerivative s = silu_and_derivative_of_half(scores(e));
          values(e) = s.value;
          scores(e) = s.derivative;
        }
        key_tile.template apply<kScores>(step, lane.column(), [&](int e) { values(e) = scores(e) = 0.f; });
        convert<Element>(values, weights);
        issue_product<false>(out_mma, weights, d_out_columns(_, _, _, q.stage), dv);
        wait_for<1>(d_weights);
      } else {
        CUTE_UNROLL
        for (int e = 0; e < kScores; ++e) {
          scores(e) = silu_and_derivative_of_half(scores(e)).derivative;
        }
        key_tile.template apply<kScores>(step, lane.column(), [&](int e) { scores(e) = 0.f; });
        wait_for<0>(d_weights);
        release(shared.d_out_ring.empty[q.stage]);
      }
      auto ds = make_operand<Element, kQueries>();
      if constexpr (Shape::kBiasFirst) {
        differentiate<Element>(derivatives, d_weights, ds);
      } else {
        CUTE_UNROLL
        for (int e = 0; e < kScores; ++e) d_weights(e) *= scores(e);
        convert<Element>(d_weights, ds);
      }
      if constexpr (!Shape::kRelative) give_dense_gradient(d_weights, key_tile.tile, m, head);
      // One buffer: the other warpgroup's dQ of the tile before must have read it. Two buffers: its dQ of two tiles
      // ago was complete before it came to the barrier of the last tile, which this one has passed too.
      if (Shape::kScoreBuffers == 1 && buffer > 0) sync_threads(kDsRead, 256);
      if constexpr (Shape::kSumsTables) {
        if (sums_tables<Shape>(p)) shared.gradient.ds_ring.empty[ds_place.stage].wait(ds_place.parity);
      }
      write_scores<kKeys, kQueries>(ds, shared.ds[Shape::kScoreBuffers == 1 ? 0 : buffer & 1], 64 * warpgroup, 0, lane);
      if constexpr (Shape::kSumsTables) {
        if (sums_tables<Shape>(p)) {
          release(shared.gradient.ds_ring.full[ds_place.stage]);
          ds_place.next();
        }
      }
      sync_threads(kDsWritten, 256);

      const auto ds_tile = operand_a(dq_slice, 
          make_tensor(make_smem_ptr(shared.ds[Shape::kScoreBuffers == 1 ? 0 : buffer & 1]), Ds{}));
      buffer = Shape::kScoreBuffers == 1 ? 1 : buffer + 1;
      Tensor dq = partition_fragment_C(dq_mma, Extent<kQueries, D>{});
      if constexpr (Shape::kBiasFirst) {
        issue_product<true>(dq_mma, ds_tile, k_columns(_, _, _, 0), dq);
        issue_product<false>(out_mma, ds, q_columns(_, _, _, q.stage), dk);
        wait_for<2>(dv);
        release(shared.d_out_ring.empty[q.stage]);
        wait_for<1>(dq);
        gather(dq, key_tile, m, head);
        prepare(next, step, key_tile, i + 1, count, head);
        wait_for<0>(dk);
        release(shared.q_ring.empty[q.stage]);
      } else {
        issue_product<false>(out_mma, ds, q_columns(_, _, _, q.stage), dk);
        issue_product<true>(dq_mma, ds_tile, k_columns(_, _, _, 0), dq);
        if constexpr (Shape::kGivesValues) {
          wait_for<2>(dv);
          release(shared.d_out_ring.empty[q.stage]);
        }
        wait_for<1>(dk);
        release(shared.q_ring.empty[q.stage]);
        wait_for<0>(dq);
        gather(dq, key_tile, m, head);
      }
    }
    release(shared.k_ring.empty[0]);
    release(shared.v_ring.empty[0]);
    const float scale = scale_of(key_tile.tile);
    store(dk, 2.f * p.common.half_alpha * scale, p.dk, key_tile.tile, head);
    if constexpr (Shape::kGivesValues) store(dv, scale, p.dv, key_tile.tile, head);
  }

  // dS * scale, each pair once; shared by the heads, they add.
  template <class Ds>
  __device__ void give_dense_gradient(const Ds& ds, const TileRecord& tile, int m, int head) const {
    const DenseBias& b = p.bias;
    if (b.gradient == nullptr) return;
    const float scale = scale_of(tile);
    const int query = m * kQueries + lane.column(), key = tile.first + 64 * warpgroup + lane.row();
    const bool add = b.gradient_head_stride == 0 && p.common.heads > 1;
    float* to = b.gradient + tile.sequence * b.gradient_batch_stride + head * b.gradient_head_stride;
    CUTE_UNROLL
    for (int e = 0; e < kScores; ++e) {
      const int i = query + element_column(e), j = key + element_row(e);
      if (i >= tile.queries || j >= tile.keys) continue;
      float* where = to + i * b.gradient_row_stride + j;
      if (add) {
        add_to_global(where, ds(e) * scale);
      } else {
        *where = ds(e) * scale;
      }
    }
  }

  template <class Dq>
  __device__ void gather(const Dq& dq, const Keys& key_tile, int m, int head) const {
    const TileRecord& tile = key_tile.tile;
    const int64_t padded = first_padded_tile(tile.query_start, tile.sequence, kQueries) + m;
    const int64_t place = (padded * p.common.heads + head) * 2 + warpgroup;
    int rank = 0;
    int* turn = nullptr;
    if (p.turns != nullptr) {
      rank = key_tile.rank(m);
      turn = p.turns + place;
    }
    add_dq(dq, p.dq_sum + place * (kQueries * D / 2), turn, rank, warpgroup);
  }
};

}  // namespace genrec::attention
