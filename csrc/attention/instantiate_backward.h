// GENREC_BACKWARD(dtype, dim, mask, bias): the backward kernels of a shape and their entry in the table.
#pragma once

#include "attention/backward.h"
#include "attention/backward_biased_keys.h"
#include "attention/backward_plain.h"
#include "attention/backward_sums.h"
#include "attention/backward_table_sums.h"
#include "attention/instantiate.h"

namespace genrec::attention {

template <class Shape>
cudaError_t launch_backward(const BackwardParams& params, const BiasParams& bias, int blocks, cudaStream_t stream,
                            Start start = Start::kAlone) {
  return launch_kernel(backward_kernel<Shape>, params_of<Shape>(params, bias), blocks, Shape::kThreads,
                       sizeof(typename Shape::Shared), stream, start);
}

template <int kThreads>
cudaError_t sum_tables(const SumParams& params, cudaStream_t stream) {
  return launch_kernel(sum_tables_kernel<kThreads>, params, divide_up(params.entries, 32), kThreads,
                       kThreads * sizeof(float), stream, Start::kBehind);
}

template <class Shape, bool kByWarps>
cudaError_t convert_dq(const ConvertParams& params, int blocks, cudaStream_t stream) {
  return launch_kernel(convert_dq_kernel<Shape, kByWarps>, params, blocks, 256, 0, stream, Start::kBehind);
}

// What is left over: sequences without a place in memory. Their sums of dQ start from zero.
template <class Shape>
cudaError_t launch_left_over(const BackwardParams& params, const BiasParams& bias, int blocks, cudaStream_t stream) {
  const cudaError_t error = launch_kernel(clear_dq_kernel<Shape>, params, 4 * blocks, 256, 0, stream, Start::kBehind);
  return error != cudaSuccess ? error : launch_backward<Shape>(params, bias, blocks, stream, Start::kBehind);
}

template <class Shape, class Kernel>
cudaError_t launch_plain(Kernel kernel, const BackwardParams& params, int blocks, cudaStream_t stream,
                         Start start = Start::kAlone) {
  return launch_kernel(kernel, params, blocks, Shape::kThreads, sizeof(typename Shape::Shared), stream, start);
}

constexpr bool kGather_none = false, kGather_gathered = true, kGather_relative = true, kGather_dense = true;

template <class Element, int D, bool kCausal, bool kGathered>
BackwardInstance plain_backward_instance(const char* dtype) {
  using Kernels = PlainBackward<Element, D, kCausal, kGathered || D <= 64>;
  using Keys = typename Kernels::Keys;
  BackwardInstance one{};
  one.dtype = dtype, one.dim = D, one.causal = kCausal, one.bias = Bias::kNone;
  one.lengths = D != 128 ? SequenceLengths::kAll : kGathered ? SequenceLengths::kLong : SequenceLengths::kShort;
  one.blocks = {Keys::kQueries, Keys::kKeys, 1, 0, 0, Keys::kQueryBox, Keys::kKeyBox};
  one.launch = [](const BackwardParams& params, const BiasParams&, int pass, int blocks, cudaStream_t stream) {
    if constexpr (!Kernels::kGathers) {
      using Queries = typename Kernels::Queries;
      if (pass == 1 + Kernels::kStores) return launch_plain<Queries>(queries_kernel<Queries>, params, blocks, stream);
    }
    if constexpr (Kernels::kStores) {
      using Stored = typename Kernels::Stored;
      if (pass == 1) return launch_plain<Stored>(stored_kernel<Stored>, params, blocks, stream);
    }
    return launch_plain<Keys>(pipelined_backward_kernel<Keys, typename Kernels::Consumer>, params, blocks, stream);
  };
  if constexpr (Kernels::kGathers) {
    one.convert = convert_dq<Keys, true>;
  } else {
    one.blocks.passes = 2 + Kernels::kStores, one.blocks.dq_rows = Kernels::Queries::kQueries;
    if constexpr (Kernels::kStores) one.blocks.stored_rows = Kernels::Stored::kQueries, one.blocks.stored_passes = 1;
  }
  return one;
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
  one.blocks = {First::kQueries, First::kKeys, kTwice ? 2 : 1, First::kSumsTables ? First::Teams::kCopies : 0, 0,
                First::kQueries, First::kKeys};
  one.launch = [](const BackwardParams& params, const BiasParams& bias, int pass, int blocks, cudaStream_t stream) {
    return pass == 0 ? launch_backward<First>(params, bias, blocks, stream)
                     : launch_backward<Second>(params, bias, blocks, stream);
  };
  one.convert = convert_dq<First, false>;
  if constexpr (First::kSumsTables) one.sum_tables = sum_tables<kSumThreads>;
  return one;
}

// With a relative bias at D = 128: one pass gives dK, dV and dS of sequences that have a place in memory for it, one goes
// over that dS, a third one computes the sequences that are left over.
template <class Element, int D, bool kCausal>
struct StoringBackward {
  using Keys = BiasedKeysShape<Element, kCausal>;
  using Stored = StoredSumsShape<Element, D, kCausal, typename Keys::Parts>;
  // For any mask: with the causal one's own ptxas serializes its products.
  using LeftOver = BackwardShape<Element, D, false, Part::kAll, Bias::kRelative>;
  static constexpr int kStoredTables = Stored::kCopies;  // of the tables' gradients, in a block of the second pass

  static cudaError_t launch(const BackwardParams& params, const BiasParams& bias, int pass, int blocks,
                            cudaStream_t stream) {
    if (pass == 0)
      return launch_kernel(pipelined_backward_kernel<Keys, BiasedKeysConsumer<Keys>>,
                           typename Keys::Params{params, bias.relative.store}, blocks, Keys::kThreads,
                           sizeof(typename Keys::Shared), stream);
    if (pass == 1)
      return launch_kernel(stored_sums_kernel<Stored>, params_of<Stored>(params, bias), blocks, Stored::kThreads,
                           sizeof(typename Stored::Shared), stream, Start::kBehind);
    return launch_left_over<LeftOver>(params, bias, blocks, stream);
  }
};

template <class Element, int D, bool kCausal>
BackwardInstance storing_backward_instance(const char* dtype) {
  using Kernels = StoringBackward<Element, D, kCausal>;
  using Keys = typename Kernels::Keys;
  using LeftOver = typename Kernels::LeftOver;
  static_assert(LeftOver::kKeys == Keys::kKeys && LeftOver::kQueries == Keys::kQueries, "one list of tiles");
  static_assert(LeftOver::kKeyBox == Keys::kKeyBox && LeftOver::kQueries == Keys::kQueryBox, "one set of boxes");
  BackwardInstance one{};
  one.dtype = dtype, one.dim = D, one.causal = kCausal, one.bias = Bias::kRelative;
  one.blocks = {Keys::kQueries, Keys::kKeys, 3, LeftOver::Teams::kCopies, Kernels::kStoredTables, Keys::kQueryBox, Keys::kKeyBox};
  one.blocks.stored_rows = Kernels::Stored::kQueries, one.blocks.stored_passes = 1;
  one.launch = Kernels::launch;
  one.convert = convert_dq<LeftOver, false>;
  one.sum_tables = sum_tables<kSumThreads>;
  return one;
}

// With a relative bias at D = 256: of sequences that have a place in memory the passes without a bias, and one that sums the
// tables' gradients over dS; the sequences that are left over take two.
template <class Element, bool kCausal>
struct WideStoringBackward {
  using Keys = BiasedRelayShape<Element, kCausal>;
  using Stored = StoredShape<Element, 256, kCausal, typename Keys::Parts>;
  using Sums = TableSumsShape<Stored>;
  using LeftOver = BackwardShape<Element, 256, kCausal, Part::kKeysAndQueries, Bias::kRelative>;
  using LeftOverValues = BackwardShape<Element, 256, kCausal, Part::kValues, Bias::kRelative>;
  enum Pass { kGiveKeys, kGiveQueries, kSumTables, kGiveLeftOver, kGiveLeftOverValues, kPasses };

  static cudaError_t launch(const BackwardParams& params, const BiasParams& bias, int pass, int blocks,
                            cudaStream_t stream) {
    if (pass == kGiveKeys)
      return launch_kernel(pipelined_backward_kernel<Keys, RelayConsumer<Keys>>,
                           typename Keys::Params{params, bias.relative.store}, blocks, Keys::kThreads,
                           sizeof(typename Keys::Shared), stream);
    if (pass == kGiveQueries)
      return launch_plain<Stored>(stored_kernel<Stored>, params, blocks, stream, Start::kBehind);
    if (pass == kSumTables) {
      const auto all = params_of<Sums>(params, bias);
      if (all.bias.position_sums == nullptr && all.bias.time_sums == nullptr) return cudaSuccess;
      return launch_kernel(table_sums_kernel<Sums>, all, blocks, Sums::kThreads, sizeof(typename Sums::Shared), stream,
                           Start::kBehind);
    }
    if (pass == kGiveLeftOverValues) return launch_backward<LeftOverValues>(params, bias, blocks, stream, Start::kBehind);
    return launch_left_over<LeftOver>(params, bias, blocks, stream);
  }
};

template <class Element, bool kCausal>
BackwardInstance wide_storing_backward_instance(const char* dtype) {
  using Kernels = WideStoringBackward<Element, kCausal>;
  using Keys = typename Kernels::Keys;
  using LeftOver = typename Kernels::LeftOver;
  static_assert(LeftOver::kKeys == Kernels::LeftOverValues::kKeys, "one list of tiles for what is left over");
  static_assert(LeftOver::kKeyBox == Keys::kKeyBox && LeftOver::kQueries == kBoxRows, "boxes of what is left over");
  BackwardInstance one{};
  one.dtype = dtype, one.dim = 256, one.causal = kCausal, one.bias = Bias::kRelative;
  one.blocks = {LeftOver::kQueries,   LeftOver::kKeys, Kernels::kPasses, LeftOver::Teams::kCopies,
                Kernels::Sums::kCopies, Keys::kQueryBox, Keys::kKeyBox};
  one.blocks.stored_rows = Kernels::Stored::kQueries, one.blocks.stored_passes = 2, one.blocks.plain_keys = true;
  one.launch = Kernels::launch;
  one.convert = convert_dq<LeftOver, false>;
  one.sum_tables = sum_tables<kSumThreads>;
  return one;
}

template <class Element, int D, bool kCausal, Bias kBias, bool kGathered>
BackwardInstance backward_instance(const char* dtype) {
  if constexpr (kBias == Bias::kNone) {
    return plain_backward_instance<Element, D, kCausal, kGathered>(dtype);
  } else if constexpr (kBias == Bias::kRelative && D == 128) {
    return storing_backward_instance<Element, D, kCausal>(dtype);
  } else if constexpr (kBias == Bias::kRelative && D == 256) {
    return wide_storing_backward_instance<Element, kCausal>(dtype);
  } else {
    return biased_backward_instance<Element, D, kCausal, kBias>(dtype);
  }
}

}  // namespace genrec::attention

#define GENREC_BACKWARD(dtype, dim, mask, bias)                                           \
  namespace genrec::attention {                                                           \
  BackwardInstance backward_##dtype##_##dim##_##mask##_##bias() {                         \
    return backward_instance<dtype, dim, kMask_##mask, kBias_##bias, kGather_##bias>(#dtype); \
  }                                                                                       \
  }
