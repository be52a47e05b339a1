// The fused optimizers: what they keep in a row and what one update does to it. Elementwise, shared by host and device.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/macros.h"

namespace genrec {
namespace hkv {

enum class OptimizerKind : int32_t { kSgd = 0, kAdam = 1, kAdamW = 2, kAdagrad = 3, kRowWiseAdagrad = 4 };

struct OptimizerParams {
  OptimizerKind kind;
  float learning_rate, beta1, beta2, eps, weight_decay;
  float max_gradient;      // clamp; 0 or less for none
  float step_size;         // learning_rate / (1 - beta1^t), set by the engine
  float bias2_sqrt;        // sqrt(1 - beta2^t), set by the engine
};

GENREC_HOST_DEVICE inline int32_t state_floats(OptimizerKind kind, int32_t dim) {
  switch (kind) {
    case OptimizerKind::kAdam:
    case OptimizerKind::kAdamW:
      return 2 * dim;
    case OptimizerKind::kAdagrad:
      return dim;
    case OptimizerKind::kRowWiseAdagrad:
      return 1;
    default:
      return 0;
  }
}

// Gradient as the optimizer sees it: clamped, then with coupled decay.
GENREC_HOST_DEVICE inline float prepared_gradient(const OptimizerParams& p, float gradient, float weight) {
  if (p.max_gradient > 0.0f) {
    gradient = gradient > p.max_gradient ? p.max_gradient : gradient < -p.max_gradient ? -p.max_gradient : gradient;
  }
  return p.kind == OptimizerKind::kAdamW || p.weight_decay == 0.0f ? gradient : gradient + p.weight_decay * weight;
}

GENREC_HOST_DEVICE inline float adam_element(const OptimizerParams& p, float w, float g, float* m, float* v) {
  if (p.kind == OptimizerKind::kAdamW) w -= p.learning_rate * p.weight_decay * w;
  *m = *m + (1.0f - p.beta1) * (g - *m);
  *v = p.beta2 * *v + (1.0f - p.beta2) * (g * g);
  return w - p.step_size * *m / (sqrtf(*v) / p.bias2_sqrt + p.eps);
}

GENREC_HOST_DEVICE inline float adagrad_element(const OptimizerParams& p, float w, float g, float* sum) {
  *sum += g * g;
  return w - p.learning_rate * g / (sqrtf(*sum) + p.eps);
}

}  // namespace hkv
}  // namespace genrec
