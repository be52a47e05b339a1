// Which kernels serve the backward pass without a bias.
#pragma once

#include "attention/backward_queries.h"
#include "attention/backward_wide.h"
#include "attention/dq.h"

namespace genrec::attention {

// Keys gives dK and dV and, where it gathers dQ in sums, that too; else Queries gives dQ. Measured: two passes win at
// D = 256, and at 128 for sequences of up to some 2,000 rows, gathering for longer ones.
template <class Element, int D, bool kCausal, bool kGathers_>
struct PlainBackward {
  static constexpr bool kGathers = kGathers_;
  using Keys = cute::conditional_t<D == 256, WideShape<Element, kCausal, kGathers>,
                                   PipelinedShape<Element, D <= 128 ? D : 128, kCausal, kGathers>>;
  using Consumer = cute::conditional_t<D == 256, WideConsumer<Keys>, PipelinedConsumer<Keys>>;
  using Queries = QueryShape<Element, D, kCausal>;
};

}  // namespace genrec::attention
