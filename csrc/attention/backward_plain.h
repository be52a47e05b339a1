// Which kernels serve the backward pass without a bias.
#pragma once

#include "attention/backward_gather.h"
#include "attention/backward_keys.h"
#include "attention/backward_queries.h"
#include "attention/backward_relay.h"
#include "attention/backward_stored.h"
#include "attention/dq.h"

namespace genrec::attention {

// Keys gives dK and dV and, where it gathers dQ in sums, that too; else Queries gives dQ, or, of sequences whose dS Keys has
// left in memory, Stored. Measured: two passes win at D = 256, and at 128 for sequences of up to some 2,000 rows,
// gathering for longer ones.
template <class Element, int D, bool kCausal, bool kGathers_>
struct PlainBackward {
  static constexpr bool kGathers = kGathers_;
  using Keys = cute::conditional_t<D == 256, RelayShape<Element, kCausal>,
                                   PipelinedShape<Element, D <= 128 ? D : 128, kCausal, kGathers>>;
  using Consumer = cute::conditional_t<
      D == 256, RelayConsumer<Keys>, cute::conditional_t<kGathers, GatherConsumer<Keys>, KeysConsumer<Keys>>>;
  using Queries = QueryShape<Element, D, kCausal>;
  static constexpr bool kStores = Keys::kStores;
  using Stored = StoredShape<Element, 256, kCausal, CellParts<48>>;
  static_assert(kGathers || Keys::kKeyBox == kBoxRows, "the two passes read keys by the same boxes");
};

}  // namespace genrec::attention
