// Backward kernels beside the default ones, chosen by name (genrec_attention_problem.backward) to be compared on a GPU.
//
// They compile and run in the host emulator; none has run on a GPU yet. Each has the dims it is meant for; for others, and
// for what isn't built of it, the default kernels serve. variants.inc lists the names.
#pragma once

#include "attention/backward_values.h"
#include "attention/backward_wide.h"

namespace genrec::attention {

template <class Shape>
struct ConsumerOfShape {
  using Type = PipelinedConsumer<Shape>;
};

template <class Element, bool kCausal, bool kAhead>
struct ConsumerOfShape<WideShape<Element, kCausal, kAhead>> {
  using Type = WideConsumer<WideShape<Element, kCausal, kAhead>>;
};

// How many passes a shape's kernels make. Of two, the first is the default's; the second, for dV, ValuesConsumer's.
template <class Shape>
constexpr int kPasses = 1;
template <class Element, int D, bool kCausal>
constexpr int kPasses<BackwardShape<Element, D, kCausal, Part::kKeysAndQueries>> = 2;

template <class Shape>
using ValuesShape = BackwardShape<typename Shape::Element, Shape::D, Shape::kCausal, Part::kValues>;

template <class Shape>
using ConsumerOf = typename ConsumerOfShape<Shape>::Type;

// dQ is issued before dK, so that its sums are added to while dK is computed; K and V of the next tile come early.
struct Variant_order {
  template <int D>
  static constexpr bool kHas = D == 64 || D == 128;
  template <class Element, int D, bool kCausal>
  using Shape = PipelinedShape<Element, D, kCausal, 64, false, false>;
};

// As `order`, and the next scores are computed while the step ends.
struct Variant_ahead {
  template <int D>
  static constexpr bool kHas = D == 64 || D == 128;
  template <class Element, int D, bool kCausal>
  using Shape = PipelinedShape<Element, D, kCausal, 64, true, false>;
};

// 128 queries a step: half the shared memory's traffic for each product. SiLU' is kept in 16 bits.
struct Variant_packed {
  template <int D>
  static constexpr bool kHas = D == 64;
  template <class Element, int D, bool kCausal>
  using Shape = PipelinedShape<Element, D, kCausal, 128, false, true>;
};

// As `packed`, and the next scores are computed while the step ends.
struct Variant_packed_ahead {
  template <int D>
  static constexpr bool kHas = D == 64;
  template <class Element, int D, bool kCausal>
  using Shape = PipelinedShape<Element, D, kCausal, 128, true, true>;
};

// D = 256 in two passes as the default, the one for dV without the waits that the compiler put into it.
struct Variant_split {
  template <int D>
  static constexpr bool kHas = D == 256;
  template <class Element, int D, bool kCausal>
  using Shape = BackwardShape<Element, D, kCausal, Part::kKeysAndQueries>;
};

// D = 256 in one pass.
struct Variant_wide {
  template <int D>
  static constexpr bool kHas = D == 256;
  template <class Element, int D, bool kCausal>
  using Shape = WideShape<Element, kCausal, false>;
};

// As `wide`, and the next scores are computed while the step ends.
struct Variant_wide_ahead {
  template <int D>
  static constexpr bool kHas = D == 256;
  template <class Element, int D, bool kCausal>
  using Shape = WideShape<Element, kCausal, true>;
};

}  // namespace genrec::attention
