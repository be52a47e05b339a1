// GENREC_BACKWARD(dtype, dim, mask, bias): the backward kernels of a shape and their entry in the table.
#pragma once

#include "attention/backward_plain.h"
#include "attention/instantiate.h"

namespace genrec::attention {

template <class Shape>
cudaError_t launch_backward(const BackwardParams& params, const BiasParams& bias, int blocks, cudaStream_t stream) {
  return launch_kernel(backward_kernel<Shape>, params_of<Shape>(params, bias), blocks, Shape::kThreads,
                       sizeof(typename Shape::Shared), stream);
}

template <int kThreads>
cudaError_t sum_tables(const SumParams& params, cudaStream_t stream) {
  sum_tables_kernel<kThreads><<<divide_up(params.entries, 32), kThreads, kThreads * sizeof(float), stream>>>(params);
  return cudaGetLastError();
}

template <class Shape>
cudaError_t convert_dq(const ConvertParams& params, int blocks, cudaStream_t stream) {
  convert_dq_kernel<Shape><<<blocks, 256, 0, stream>>>(params);
  return cudaGetLastError();
}

template <class Element, int D, bool kCausal>
BackwardInstance plain_backward_instance(const char* dtype) {
  using Shape = typename PlainBackward<Element, D, kCausal>::Shape;
  return {dtype, D, kCausal, Bias::kNone, {Shape::kQueries, Shape::kKeys, 1, 0},
          [](const BackwardParams& params, const BiasParams&, int, int blocks, cudaStream_t stream) {
            const auto kernel = pipelined_backward_kernel<Shape, typename PlainBackward<Element, D, kCausal>::Consumer>;
            return launch_kernel(kernel, params, blocks, Shape::kThreads, sizeof(typename Shape::Shared), stream);
          },
          convert_dq<Shape>, nullptr};
}

template <class Element, int D, bool kCausal, Bias kBias>
BackwardInstance biased_backward_instance(const char* dtype) {
  constexpr bool kTwice = D == 256;
  using First = BackwardShape<Element, D, kCausal, kTwice ? Part::kKeysAndQueries : Part::kAll, kBias>;
  using Second = BackwardShape<Element, D, kCausal, kTwice ? Part::kValues : Part::kAll, kBias>;
  // Both passes use one plan and one set of copy-engine boxes.
  static_assert(First::kKeys == Second::kKeys && First::kQueries == Second::kQueries, "passes differ in their tiles");
  BackwardInstance one{};
  one.dtype = dtype, one.dim = D, one.causal = kCausal, one.bias = kBias;
  one.blocks = {First::kQueries, First::kKeys, kTwice ? 2 : 1, First::kGradientWarps};
  one.launch = [](const BackwardParams& params, const BiasParams& bias, int pass, int blocks, cudaStream_t stream) {
    return pass == 0 ? launch_backward<First>(params, bias, blocks, stream)
                     : launch_backward<Second>(params, bias, blocks, stream);
  };
  one.convert = convert_dq<First>;
  if constexpr (First::kSumsTables) one.sum_tables = sum_tables<kSumThreads>;
  return one;
}

template <class Element, int D, bool kCausal, Bias kBias>
BackwardInstance backward_instance(const char* dtype) {
  if constexpr (kBias == Bias::kNone) {
    return plain_backward_instance<Element, D, kCausal>(dtype);
  } else {
    return biased_backward_instance<Element, D, kCausal, kBias>(dtype);
  }
}

}  // namespace genrec::attention

#define GENREC_BACKWARD(dtype, dim, mask, bias)                                           \
  namespace genrec::attention {                                                           \
  BackwardInstance backward_##dtype##_##dim##_##mask##_##bias() {                         \
    return backward_instance<dtype, dim, kMask_##mask, kBias_##bias>(#dtype);             \
  }                                                                                       \
  }
