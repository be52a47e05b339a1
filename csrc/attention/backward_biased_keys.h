// The backward kernel with a relative bias for D = 128: dK and dV of sequences whose bias and dS have a place in device
// memory, and that dS.
//
// dQ and the gradients of the tables are sums of dS: another kernel's work (backward_sums.h), that neither holds
// products up nor shares their registers. What tells the bias of pairs would: it was told before, once for all heads
// (bias_store.h). What remains is the kernel without a bias (backward_keys.h), whose threads read what they add to their
// scores straight into registers, a step ahead: shared memory has no time to spare. The bias lies in the order of the
// forward pass, whose rows are queries; its blocks of 8 x 8 pairs are transposed on their way to the scores.
#pragma once

#include "attention/backward_keys.h"
#include "attention/part_bias.h"

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

// A thread's bias of one step.
struct StepBias {
  PartBias<BiasCell> bias;
  int next;  // the part of the step behind it

  // The first step's.
  template <class Shape>
  __device__ void start(const typename Shape::Params& p, const TileRecord& tile, int warpgroup, Lane lane) {
    bias.read(p.bias, first_bias<Shape>(p, tile, warpgroup), lane);
  }

  __device__ void note(const StepRecord& step, int warpgroup) { next = step.bias.part<BiasCell>(warpgroup); }

  // Before products are issued: reads behind those wait until the tensor cores take them up.
  template <class Shape>
  __device__ void read_next(const typename Shape::Params& p, Lane lane) {
    bias.read(p.bias, next, lane);
    keep_order();
  }

  template <class Scores, class Weigh>
  __device__ void add_to(const Scores& scores, float half_alpha, Weigh weigh) {
    bias.transpose();
    weigh(bias.added_to(scores, half_alpha), 1.f);
  }
};

template <class Shape>
using BiasedKeysConsumer = KeysConsumer<Shape, StepBias>;

}  // namespace genrec::attention
