// A warpgroup's product of 64 x 48 x 16, both operands in shared memory, as an atom of CuTe's. CuTe has it, but only
// together with all other shapes, which would take each file 20 s more to compile.
#pragma once

#include "attention/device.h"

namespace genrec::attention {

template <class Element>
struct NarrowProduct {
  using DRegisters = void;
  using ARegisters = uint64_t[1];
  using BRegisters = uint64_t[1];
  using CRegisters = float[24];

  // a, b: descriptors of tiles whose inner dimension, contiguous, is that of the sum.
  CUTE_HOST_DEVICE static void fma(const uint64_t& a, const uint64_t& b, float& c0, float& c1, float& c2, float& c3,
                                   float& c4, float& c5, float& c6, float& c7, float& c8, float& c9, float& c10,
                                   float& c11, float& c12, float& c13, float& c14, float& c15, float& c16, float& c17,
                                   float& c18, float& c19, float& c20, float& c21, float& c22, float& c23,
                                   cute::GMMA::ScaleOut accumulate = cute::GMMA::ScaleOut::One) {
#if defined(__CUDA_ARCH__)
#define GENREC_NARROW_PRODUCT(dtype)                                                                                  \
  asm volatile(                                                                                                       \
      "{\n"                                                                                                           \
      ".reg .pred add;\n"                                                                                             \
      "setp.ne.b32 add, %26, 0;\n"                                                                                    \
      "wgmma.mma_async.sync.aligned.m64n48k16.f32." dtype "." dtype                                                   \
      " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, "   \
      "%23}, %24, %25, add, 1, 1, 0, 0;\n"                                                                            \
      "}"                                                                                                             \
      : "+f"(c0), "+f"(c1), "+f"(c2), "+f"(c3), "+f"(c4), "+f"(c5), "+f"(c6), "+f"(c7), "+f"(c8), "+f"(c9),           \
        "+f"(c10), "+f"(c11), "+f"(c12), "+f"(c13), "+f"(c14), "+f"(c15), "+f"(c16), "+f"(c17), "+f"(c18),            \
        "+f"(c19), "+f"(c20), "+f"(c21), "+f"(c22), "+f"(c23)                                                         \
      : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)))
    if constexpr (cute::is_same_v<Element, cutlass::bfloat16_t>) {
      GENREC_NARROW_PRODUCT("bf16");
    } else {
      GENREC_NARROW_PRODUCT("f16");
    }
#undef GENREC_NARROW_PRODUCT
#endif
  }
};

}  // namespace genrec::attention

template <class Element>
struct cute::MMA_Traits<genrec::attention::NarrowProduct<Element>> {
  using ValTypeD = float;
  using ValTypeA = Element;
  using ValTypeB = Element;
  using ValTypeC = float;
  using FrgTypeA = cute::GMMA::smem_desc<cute::GMMA::Major::K>;
  using FrgTypeB = cute::GMMA::smem_desc<cute::GMMA::Major::K>;
  using Shape_MNK = cute::Shape<cute::_64, cute::Int<48>, cute::_16>;
  using ThrID = cute::Layout<cute::_128>;
  using ALayout = cute::GMMA::ABLayout<64, 16>;
  using BLayout = cute::GMMA::ABLayout<48, 16>;
  using CLayout = cute::GMMA::CLayout_64xN<48>;

  cute::GMMA::ScaleOut accumulate_ = cute::GMMA::ScaleOut::One;
};
