// The generated files hold one line each: GENREC_FORWARD(bf16, 128, general, relative). "gathered": of the backward
// kernels without a bias the one that gathers dQ in sums, where there is another.
#pragma once

#include <cutlass/bfloat16.h>
#include <cutlass/half.h>

#include "attention/launch.h"

namespace genrec::attention {

using bf16 = cutlass::bfloat16_t;
using fp16 = cutlass::half_t;
constexpr bool kMask_causal = true, kMask_general = false;
constexpr Bias kBias_none = Bias::kNone, kBias_gathered = Bias::kNone, kBias_relative = Bias::kRelative, kBias_dense = Bias::kDense;

// A kernel's parameters of those that all have and those of its bias.
template <class Shape, class Base>
typename Shape::Params params_of(const Base& base, const BiasParams& bias) {
  typename Shape::Params params{};
  static_cast<Base&>(params) = base;
  if constexpr (Shape::kBias == Bias::kRelative) params.bias = bias.relative;
  if constexpr (Shape::kBias == Bias::kDense) params.bias = bias.dense;
  return params;
}

// kBehind: the kernel starts while the one before it in the stream, which is one of ours, ends, and waits for it
// (wait_for_kernel_before) before it reads or writes what others do.
enum class Start { kAlone, kBehind };

template <class Kernel, class Params>
cudaError_t launch_kernel(Kernel kernel, const Params& params, int blocks, int threads, size_t shared,
                          cudaStream_t stream, Start start = Start::kAlone) {
  constexpr size_t kUnasked = 48 << 10;  // what any kernel may have
  if (shared > kUnasked) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
    if (error != cudaSuccess) return error;
  }
  cudaLaunchAttribute behind{};
  behind.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  behind.val.programmaticStreamSerializationAllowed = 1;
  const cudaLaunchConfig_t config{dim3(blocks), dim3(threads), shared, stream, &behind, start == Start::kBehind};
  return cudaLaunchKernelEx(&config, kernel, params);
}

}  // namespace genrec::attention
