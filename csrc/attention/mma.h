// Accumulators and register operands of matrix products by warpgroups, SiLU, and rows written to global memory.
#pragma once

#include <cute/tensor.hpp>
#include <cutlass/numeric_conversion.h>

#include "attention/copy.h"
#include "attention/params.h"

namespace genrec::attention {

// Accumulators of an (M = 64) x N product: thread t of a warpgroup holds rows row() and row() + 8, and of each 8
// columns two neighbours. Element e belongs to row() + 8 * (e / 2 % 2) and column column() + 8 * (e / 4) + e % 2.
struct Lane {
  int warp, lane;

  __device__ Lane() : warp(threadIdx.x / 32 % 4), lane(threadIdx.x % 32) {}
  __device__ int row() const { return warp * 16 + lane / 4; }
  __device__ int column() const { return lane % 4 * 2; }
};

CUTE_HOST_DEVICE constexpr int element_row(int e) { return e / 2 % 2 * 8; }
CUTE_HOST_DEVICE constexpr int element_column(int e) { return e / 4 * 8 + e % 2; }

template <int M, int N>
using Extent = cute::Shape<cute::Int<M>, cute::Int<N>>;

// Registers that hold accumulators of N columns as the A operand of a product over those columns. Both fragments list
// a thread's elements in the same order.
template <class Element, int N>
__device__ inline auto make_operand() {
  using namespace cute;
  return make_tensor<Element>(Layout<Shape<Shape<_2, _2, _2>, _1, Int<N / 16>>>{});
}

template <class Element, class From, class To>
__device__ inline void convert(From const& from, To& to) {
  constexpr int kSize = decltype(cute::size(from))::value;
  cutlass::NumericArrayConverter<Element, float, kSize> converter;
  const auto& source = *reinterpret_cast<const cutlass::Array<float, kSize>*>(from.data());
  *reinterpret_cast<cutlass::Array<Element, kSize>*>(&to(0)) = converter(source);
}

// SiLU(x) = x sigmoid(x) = h + h tanh(h), h = x / 2. One special-function operation.
__device__ inline float silu_of_half(float h) { return fmaf(h, fast_tanh(h), h); }

struct SiluAndDerivative {
  float value, derivative;
};

// sigma = (1 + tanh h) / 2, SiLU = x sigma, SiLU' = sigma + SiLU (1 - sigma).
__device__ inline SiluAndDerivative silu_and_derivative_of_half(float h) {
  const float t = fast_tanh(h);
  const float value = fmaf(h, t, h), sigma = fmaf(0.5f, t, 0.5f);
  return {value, fmaf(-value, sigma, sigma + value)};
}

__device__ inline SiluAndDerivative silu_and_derivative(float score, float half_alpha) {
  return silu_and_derivative_of_half(score * half_alpha);
}

// 4 x 4 words transposed over the 4 lanes of a quad: lane q's word j becomes lane j's word q.
__device__ inline void transpose_quad(uint32_t (&w)[4]) {
  const bool odd = threadIdx.x & 1, high = threadIdx.x & 2;
  // Off-diagonal words of each 2 x 2 block change places, first of single words, then of pairs.
  CUTE_UNROLL
  for (int j = 0; j < 4; j += 2) {
    const uint32_t got = exchange(odd ? w[j] : w[j + 1], 1);
    w[j] = odd ? got : w[j];
    w[j + 1] = odd ? w[j + 1] : got;
  }
  CUTE_UNROLL
  for (int j = 0; j < 2; ++j) {
    const uint32_t got = exchange(high ? w[j] : w[j + 2], 2);
    w[j] = high ? got : w[j];
    w[j + 2] = high ? w[j + 2] : got;
  }
}

// Writes a warpgroup's 64 x N accumulators, times `factor`, to rows [row0, row0 + 64) of one head of `out`, of which
// `rows` exist. Four lanes share a row: after the exchange each has 8 neighbouring columns, one 16-byte store.
template <class Element, class C>
__device__ inline void store_rows(C const& c, float factor, const Output& out, int64_t row0, int head, int column0,
                                  int rows) {
  constexpr int kSize = decltype(cute::size(c))::value;
  const Lane lane;
  CUTE_UNROLL
  for (int half = 0; half < 2; ++half) {
    const int row = lane.row() + 8 * half;
    Element* to = static_cast<Element*>(out.data) + (row0 + row) * out.row_stride + head * out.head_stride;
    CUTE_UNROLL
    for (int first = 0; first < kSize; first += 16) {  // 4 blocks of 8 columns
      uint32_t words[4];
      CUTE_UNROLL
      for (int b = 0; b < 4; ++b) {
        const int e = first + 4 * b + 2 * half;
        cutlass::Array<float, 2> pair{c(e) * factor, c(e + 1) * factor};
        const auto low = cutlass::NumericArrayConverter<Element, float, 2>{}(pair);
        words[b] = *reinterpret_cast<const uint32_t*>(&low);
      }
      transpose_quad(words);
      const int column = column0 + first / 16 * 32 + lane.lane % 4 * 8;
      if (row < rows && column < out.dim) {
        *reinterpret_cast<uint4*>(to + column) = make_uint4(words[0], words[1], words[2], words[3]);
      }
    }
  }
}

// Zero where a thread's two rows don't see a column. `column`: the thread's first.
template <bool kCausal, class Scores>
__device__ inline void hide_unseen_columns(Scores& scores, RowSight low, RowSight high, int column) {
  for (RowSight* sight : {&low, &high}) sight->head -= column, sight->begin -= column, sight->end -= column;
  CUTE_UNROLL
  for (int e = 0; e < cute::size(scores); ++e) {
    const RowSight& sight = element_row(e) ? high : low;
    const int j = element_column(e);
    const bool seen = kCausal ? j < sight.head : sight.sees(j);
    scores(e) = seen ? scores(e) : 0.f;
  }
}

}  // namespace genrec::attention
