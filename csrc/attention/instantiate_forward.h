// GENREC_FORWARD(dtype, dim, mask, bias): the forward kernel of a shape, or two, and their entry in the table.
#pragma once

#include "attention/forward.h"
#include "attention/instantiate.h"

namespace genrec::attention {

template <class Shape>
cudaError_t launch_forward(const ForwardParams& params, const BiasParams& bias, int blocks, cudaStream_t stream) {
  constexpr Start kStart = Shape::kBiasStored || Shape::kLeftOver ? Start::kBehind : Start::kAlone;
  return launch_kernel(forward_kernel<Shape>, params_of<Shape>(params, bias), blocks, Shape::kThreads,
                       sizeof(typename Shape::Shared), stream, kStart);
}

template <class Element, int D, bool kCausal, Bias kBias>
ForwardInstance forward_instance(const char* dtype) {
  using Shape = ForwardShape<Element, D, kCausal, kBias>;
  ForwardInstance one{dtype, D, kCausal, kBias, {Shape::kQueries, Shape::kKeys}, nullptr};
  if constexpr (Shape::kLeftOver) {
    using Stored = ForwardShape<Element, D, kCausal, kBias, true>;
    static_assert(Stored::kQueries == Shape::kQueries && Stored::kKeys == Shape::kKeys, "one list, one set of boxes");
    one.blocks.stores_bias = true;
    one.launch = [](const ForwardParams& params, const BiasParams& bias, int pass, int blocks, cudaStream_t stream) {
      return pass == 0 ? launch_forward<Stored>(params, bias, blocks, stream)
                       : launch_forward<Shape>(params, bias, blocks, stream);
    };
  } else {
    one.launch = [](const ForwardParams& params, const BiasParams& bias, int, int blocks, cudaStream_t stream) {
      return launch_forward<Shape>(params, bias, blocks, stream);
    };
  }
  return one;
}

}  // namespace genrec::attention

#define GENREC_FORWARD(dtype, dim, mask, bias)                                             \
  namespace genrec::attention {                                                            \
  ForwardInstance forward_##dtype##_##dim##_##mask##_##bias() {                            \
    return forward_instance<dtype, dim, kMask_##mask, kBias_##bias>(#dtype);               \
  }                                                                                        \
  }
