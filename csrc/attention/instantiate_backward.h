// GENREC_BACKWARD(dtype, dim, mask, bias): the backward kernels of a shape and their entry in the table.
#pragma once

#include "attention/dq.h"
#include "attention/instantiate.h"

namespace genrec::attention {

template <class Shape>
cudaError_t launch_backward(const BackwardParams& params, int blocks, cudaStream_t stream) {
  return launch_kernel(backward_kernel<Shape>, params, blocks, Shape::kThreads, sizeof(typename Shape::Shared), stream);
}

template <class Element, int D, bool kCausal>
BackwardInstance backward_instance(const char* dtype) {
  constexpr bool kTwice = D == 256;
  using First = BackwardShape<Element, D, kCausal, kTwice ? Part::kKeysAndQueries : Part::kAll>;
  using Second = BackwardShape<Element, D, kCausal, kTwice ? Part::kValues : Part::kAll>;
  // Both passes use one plan and one set of copy-engine boxes.
  static_assert(First::kKeys == Second::kKeys && First::kQueries == Second::kQueries, "passes differ in their tiles");
  return {dtype, D, kCausal, Bias::kNone, {First::kQueries, First::kKeys, kTwice ? 2 : 1},
          [](const BackwardParams& params, int pass, int blocks, cudaStream_t stream) {
            return pass == 0 ? launch_backward<First>(params, blocks, stream)
                             : launch_backward<Second>(params, blocks, stream);
          },
          [](const ConvertParams& params, int blocks, cudaStream_t stream) {
            convert_dq_kernel<First><<<blocks, 256, 0, stream>>>(params);
            return cudaGetLastError();
          }};
}

}  // namespace genrec::attention

#define GENREC_BACKWARD(dtype, dim, mask, bias)                                           \
  namespace genrec::attention {                                                           \
  BackwardInstance backward_##dtype##_##dim##_##mask##_##bias() {                         \
    return backward_instance<dtype, dim, kMask_##mask>(#dtype);                           \
  }                                                                                       \
  }
