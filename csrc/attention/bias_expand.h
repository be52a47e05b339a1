// The relative bias of a step as the consumers' threads hold its scores.
//
// In a consumer that adds the bias itself, whatever tells its buckets stands in the chain from scores to products, which
// bounds the kernel, while the multiprocessor has instructions to spare. So four warps beside it have 32 of the
// tile's 128 keys each: a warp prepares those as a tile of its own (bias_tile.h; the fewer keys, the fewer edges cut
// them) and writes what a consumer thread adds to its scores, in order, in fp16: 4 loads of 16 bytes, and one
// multiplication and addition for each score, that it has to do anyway.
//
// fp16 has three digits more than the weights that come of the sum are rounded to. What lies beyond its range, which no
// table in use comes near, becomes its largest number.
#pragma once

#include "attention/backward_pipelined.h"
#include "attention/bias.h"

namespace genrec::attention {

constexpr int kExpanders = 4, kExpandedKeys = 32;  // warps, keys of each

// Of one step of 128 keys and 64 queries: for each warp of the consumers and each of its threads the bias of 32 scores.
using ExpandedBias = uint4[8][4][32];

// A warp's own.
struct ExpanderMemory {
  BiasTile<kExpandedKeys, 64> tile;
  int64_t times[kExpandedKeys];  // of its keys
};

template <class Shape>
struct BiasExpander {
  static constexpr int kQueries = Shape::kQueries;
  static_assert(kQueries == 64 && Shape::kKeys == kExpanders * kExpandedKeys, "the layout of ExpandedBias");

  const typename Shape::Params& p;
  typename Shape::Shared& shared;
  const int warp;
  const Lane lane;
  Place<Shape::kBiasStages> place{1};

  __device__ BiasExpander(const typename Shape::Params& params, typename Shape::Shared& memory, int number)
      : p(params), shared(memory), warp(number) {}

  __device__ void run() {
    for (Place<2> work(0);; work.next()) {
      shared.work_ring.full[work.stage].wait(work.parity);
      TileRecord tile = shared.work[work.stage].tile;
      release(shared.work_ring.empty[work.stage]);
      if (tile.sequence < 0) return;
      const SequenceMask<Shape::kCausal> mask(tile.keys, tile.contexts, tile.targets, p.common.rule);
      const TileRanges ranges = mask.query_tiles(tile.first, tile.first + Shape::kKeys, kQueries, tile.queries);
      tile.first += kExpandedKeys * warp;
      one_tile(tile, ranges);
    }
  }

 private:
  __device__ void one_tile(const TileRecord& tile, const TileRanges& ranges) {
    const int count = ranges.count();
    if (count == 0) return;
    ExpanderMemory& own = shared.expanders[warp];
    BiasWriter<false, kExpandedKeys, kQueries> writer(p.bias, shared.buckets, tile, 0.5f);
    if (p.bias.time != nullptr) own.times[lane.lane] = writer.times.fixed(tile.first + lane.lane);
    int first = ranges.tile(0) * kQueries;
    writer.fetch(first);
    CUTE_NO_UNROLL
    for (int n = 0; n < count; ++n) {
      writer.put(own.tile, first);
      const int now = first;
      if (n + 1 < count) {
        first = ranges.tile(n + 1) * kQueries;
        writer.fetch(first);
      }
      sync_warp();
      shared.bias_ring.empty[place.stage].wait(place.parity);
      expand(own, [&](int column) { return writer.times.streamed(now + column); });
      release(shared.bias_ring.full[place.stage]);
      place.next();
    }
  }

  // A quarter of a thread's values at a time: 16 keys, 32 queries.
  template <class Streamed>
  __device__ void expand(const ExpanderMemory& own, Streamed streamed) const {
    CUTE_NO_UNROLL
    for (int n = 0; n < 4; ++n) {
      const int row = n / 2 * 16 + lane.lane / 4, column = n % 2 * 32 + lane.column();
      auto values = cute::make_tensor<float>(cute::Layout<cute::Int<16>>{});
      add_relative_bias<true>(values, 1.f, own.tile, shared.buckets, row, column, own.times[row], own.times[row + 8],
                              streamed);
      uint4(*to)[32] = &shared.bias[place.stage][2 * warp + n / 2][n % 2 * 2];
      CUTE_UNROLL
      for (int e = 0; e < 16; e += 8) {
        to[e / 8][lane.lane] = make_uint4(
            pack_finite_halves(values(e), values(e + 1)), pack_finite_halves(values(e + 2), values(e + 3)),
            pack_finite_halves(values(e + 4), values(e + 5)), pack_finite_halves(values(e + 6), values(e + 7)));
      }
    }
  }
};

// A consumer thread's bias of one step.
struct StepBias {
  uint32_t words[16];

  __device__ void read(const ExpandedBias& from, int warp, int lane) {
    CUTE_UNROLL
    for (int i = 0; i < 4; ++i) {
      const uint4 four = from[warp][i][lane];
      words[4 * i] = four.x, words[4 * i + 1] = four.y, words[4 * i + 2] = four.z, words[4 * i + 3] = four.w;
    }
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

}  // namespace genrec::attention
