// GENREC_BACKWARD_VARIANT(name, dtype, dim, mask): a variant's kernels and their entry in the table.
#pragma once

#include "attention/dq.h"
#include "attention/instantiate.h"
#include "attention/variants.h"

namespace genrec::attention {

template <class Shape>
BackwardInstance variant_instance(const char* dtype) {
  return {dtype, Shape::D, Shape::kCausal, Bias::kNone, {Shape::kQueries, Shape::kKeys, kPasses<Shape>, 0},
          [](const BackwardParams& params, const BiasParams&, int pass, int blocks, cudaStream_t stream) {
            if constexpr (kPasses<Shape> == 1) {
              return launch_kernel(pipelined_backward_kernel<Shape, ConsumerOf<Shape>>, params, blocks, Shape::kThreads,
                                   sizeof(typename Shape::Shared), stream);
            } else {
              using Second = ValuesShape<Shape>;
              return pass == 0 ? launch_kernel(backward_kernel<Shape>, params, blocks, Shape::kThreads,
                                               sizeof(typename Shape::Shared), stream)
                               : launch_kernel(backward_kernel<Second, ValuesConsumer<Second>>, params, blocks,
                                               Second::kThreads, sizeof(typename Second::Shared), stream);
            }
          },
          [](const ConvertParams& params, int blocks, cudaStream_t stream) {
            convert_dq_kernel<Shape><<<blocks, 256, 0, stream>>>(params);
            return cudaGetLastError();
          },
          nullptr};
}

}  // namespace genrec::attention

#define GENREC_BACKWARD_VARIANT(name, dtype, dim, mask)                                                \
  namespace genrec::attention {                                                                        \
  VariantInstance variant_##name##_##dtype##_##dim##_##mask() {                                        \
    return {#name, variant_instance<Variant_##name::Shape<dtype, dim, kMask_##mask>>(#dtype)};         \
  }                                                                                                    \
  }
