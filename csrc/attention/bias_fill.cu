// The launch that puts the relative bias into memory: of no dtype and no dim, hence once for all kernels.
#include "attention/bias_store.h"
#include "attention/launch.h"

namespace genrec::attention {

cudaError_t fill_bias(const RelativeBias& bias, const WorkList& list, const MaskRule& rule, int* counter,
                      bool query_rows, int multiprocessors, cudaStream_t stream) {
  const FillParams params{bias, list, rule, counter};
  const auto kernel = query_rows ? fill_bias_kernel<true> : fill_bias_kernel<false>;
  kernel<<<kFillResident * multiprocessors, kFillThreads, sizeof(FillShared), stream>>>(params);
  return cudaGetLastError();
}

}  // namespace genrec::attention
