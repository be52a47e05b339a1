#define GENREC_HKV_ISA_NAME "avx2"
#include "hkv/kernels.inl"

namespace genrec {
namespace hkv {

const Kernels* avx2_kernels() { return &kTable; }

}  // namespace hkv
}  // namespace genrec
