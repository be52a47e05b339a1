#define GENREC_HKV_ISA_NAME "generic"
#include "hkv/kernels.inl"

namespace genrec {
namespace hkv {

const Kernels* generic_kernels() { return &kTable; }

}  // namespace hkv
}  // namespace genrec
