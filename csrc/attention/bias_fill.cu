// The launch that puts the relative bias into memory: of no dtype and no dim, hence once for all kernels.
#include "attention/bias_fill.h"
#include "attention/launch.h"

namespace genrec::attention {

cudaError_t fill_bias(const RelativeBias& bias, const WorkList& list, const MaskRule& rule, int* counter,
                      int multiprocessors, cudaStream_t stream) {
  const FillParams params{bias, list, rule, counter};
  fill_bias_kernel<<<kFillResident * multiprocessors, kFillThreads, sizeof(FillShared), stream>>>(params);
  return cudaGetLastError();
}

}  // namespace genrec::attention
