// GENREC_FORWARD(dtype, dim, mask, bias): one forward kernel and its entry in the table.
#pragma once

#include "attention/forward.h"
#include "attention/instantiate.h"

namespace genrec::attention {

template <class Shape>
ForwardInstance forward_instance(const char* dtype) {
  return {dtype, Shape::D, Shape::kCausal, Shape::kBias, {Shape::kQueries, Shape::kKeys},
          [](const ForwardParams& params, const BiasParams& bias, int blocks, cudaStream_t stream) {
            return launch_kernel(forward_kernel<Shape>, params_of<Shape>(params, bias), blocks, Shape::kThreads,
                                 sizeof(typename Shape::Shared), stream);
          }};
}

}  // namespace genrec::attention

#define GENREC_FORWARD(dtype, dim, mask, bias)                                             \
  namespace genrec::attention {                                                            \
  ForwardInstance forward_##dtype##_##dim##_##mask##_##bias() {                            \
    return forward_instance<ForwardShape<dtype, dim, kMask_##mask, kBias_##bias>>(#dtype); \
  }                                                                                        \
  }
