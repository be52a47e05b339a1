// Which kernel serves the backward pass without a bias.
#pragma once

#include "attention/backward_wide.h"
#include "attention/dq.h"

namespace genrec::attention {

template <class Element, int D, bool kCausal>
struct PlainBackward {
  using Shape = PipelinedShape<Element, D, kCausal>;
  using Consumer = PipelinedConsumer<Shape>;
};

template <class Element, bool kCausal>
struct PlainBackward<Element, 256, kCausal> {
  using Shape = WideShape<Element, kCausal>;
  using Consumer = WideConsumer<Shape>;
};

}  // namespace genrec::attention
