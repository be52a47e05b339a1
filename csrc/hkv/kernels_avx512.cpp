#define GENREC_HKV_ISA_NAME "avx512"
#include "hkv/kernels.inl"

namespace genrec {
namespace hkv {

const Kernels* avx512_kernels() { return &kTable; }

}  // namespace hkv
}  // namespace genrec
