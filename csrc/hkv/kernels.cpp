#include "hkv/kernels.h"

#include <cstdlib>
#include <cstring>

namespace genrec {
namespace hkv {

#if !defined(GENREC_HKV_X86)
const Kernels* avx2_kernels() { return nullptr; }
const Kernels* avx512_kernels() { return nullptr; }
#endif

namespace {

const Kernels* choose() {
  const char* wanted = std::getenv("GENREC_HKV_ISA");
  const Kernels* widest = generic_kernels();
#if defined(GENREC_HKV_X86)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (wanted != nullptr && std::strcmp(wanted, "generic") == 0) return widest;
  if (avx2) widest = avx2_kernels();
  if (avx512 && (wanted == nullptr || std::strcmp(wanted, "avx2") != 0)) widest = avx512_kernels();
#endif
  (void)wanted;
  return widest;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels* chosen = choose();
  return *chosen;
}

}  // namespace hkv
}  // namespace genrec
