// How a row starts: a function of (seed, table, key, element) alone, so that it depends neither on the world size nor
// on the order of arrival, and host and device agree. Only +, -, *, / and sqrt in double: no library function that
// differs between machines.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "hkv/hash.h"

namespace genrec {
namespace hkv {

enum class InitKind : int32_t { kConstant = 0, kUniform = 1, kNormal = 2, kTruncatedNormal = 3 };

struct Initializer {
  InitKind kind;
  uint32_t reserved;
  uint64_t seed;   // already mixed with the table's name
  double a, b;     // constant: value; uniform: low, high; normal: mean, std
};

// Natural logarithm for 0 < x: x = m * 2^e with m in [sqrt(1/2), sqrt(2)), then the series of atanh.
GENREC_HOST_DEVICE inline double portable_log(double x) {
  uint64_t bits;
  memcpy(&bits, &x, 8);
  int exponent = static_cast<int>(bits >> 52 & 0x7ff) - 1023;
  bits = (bits & 0x000fffffffffffffull) | 0x3ff0000000000000ull;
  double m;
  memcpy(&m, &bits, 8);
  if (m > 1.4142135623730951) {
    m *= 0.5;
    ++exponent;
  }
  const double t = (m - 1.0) / (m + 1.0);
  const double t2 = t * t;
  double sum = 0.0;
  for (int k = 21; k >= 1; k -= 2) sum = sum * t2 + 1.0 / k;
  return 2.0 * t * sum + exponent * 0.6931471805599453;
}

// Quantile of the standard normal distribution: P. J. Acklam's rational approximation (relative error below 1.2e-9).
GENREC_HOST_DEVICE inline double normal_quantile(double p) {
  const double a[6] = {-3.969683028665376e+01, 2.209460984245205e+02,  -2.759285104469687e+02,
                       1.383577518672690e+02,  -3.066479806614716e+01, 2.506628277459239e+00};
  const double b[5] = {-5.447609879822406e+01, 1.615858368580409e+02, -1.556989798598866e+02, 6.680131188771972e+01,
                       -1.328068155288572e+01};
  const double c[6] = {-7.784894002430293e-03, -3.223964580411365e-01, -2.400758277161838e+00,
                       -2.549732539343734e+00, 4.374664141464968e+00,  2.938163982698783e+00};
  const double d[4] = {7.784695709041462e-03, 3.224671290700398e-01, 2.445134137142996e+00, 3.754408661907416e+00};
  const double tail = 0.02425;
  if (p < tail || p > 1.0 - tail) {
    const double q = sqrt(-2.0 * portable_log(p < tail ? p : 1.0 - p));
    const double x = (((((c[0] * q + c[1]) * q + c[2]) * q + c[3]) * q + c[4]) * q + c[5]) /
                     ((((d[0] * q + d[1]) * q + d[2]) * q + d[3]) * q + 1.0);
    return p < tail ? x : -x;
  }
  const double q = p - 0.5;
  const double r = q * q;
  return (((((a[0] * r + a[1]) * r + a[2]) * r + a[3]) * r + a[4]) * r + a[5]) * q /
         (((((b[0] * r + b[1]) * r + b[2]) * r + b[3]) * r + b[4]) * r + 1.0);
}

// Start of a key's stream; `mixed` is mix64(key).
GENREC_HOST_DEVICE inline uint64_t init_stream(const Initializer& init, uint64_t mixed) {
  return mix64(mixed ^ init.seed);
}

GENREC_HOST_DEVICE inline float init_value(const Initializer& init, uint64_t stream, int32_t element) {
  if (init.kind == InitKind::kConstant) return static_cast<float>(init.a);
  const uint64_t bits = mix64(stream + 0x9e3779b97f4a7c15ull * (static_cast<uint64_t>(element) + 1));
  const double u = (static_cast<double>(bits >> 12) + 0.5) * (1.0 / 4503599627370496.0);  // in (0, 1)
  if (init.kind == InitKind::kUniform) return static_cast<float>(init.a + (init.b - init.a) * u);
  if (init.kind == InitKind::kNormal) return static_cast<float>(init.a + init.b * normal_quantile(u));
  const double below = 0.022750131948179195;  // the normal distribution's mass below -2
  return static_cast<float>(init.a + init.b * normal_quantile(below + (1.0 - 2.0 * below) * u));
}

}  // namespace hkv
}  // namespace genrec
