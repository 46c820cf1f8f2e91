// The formulas of slots, each once, for the CPU and the GPU: the optimizer step of one element, the row clip and what a
// closed-form slot is scaled by. docs/method.md derives them.
#pragma once

#include <cmath>

#include "common/inline.h"
#include "common/slot_params.h"

namespace locas {

// What one AdamW step needs besides the element itself; computed once a launch.
struct AdamwFactors {
  float beta1, one_minus_beta1, beta2, one_minus_beta2, eps;
  float decay;            // 1 - learning_rate * weight_decay
  float step_size;        // learning_rate / (1 - beta1^t)
  float sqrt_correction;  // 1 / sqrt(1 - beta2^t)
};

LOCAS_INLINE AdamwFactors adamw_factors(const AdamwSlotsParams& p, double step, double learning_rate) {
  // 1 - beta^t without the cancellation, so that float is enough: a double pow would hold up every CTA.
  const float correction1 = -expm1f(static_cast<float>(step) * p.log_beta1);
  const float correction2 = -expm1f(static_cast<float>(step) * p.log_beta2);
  return {static_cast<float>(p.beta1),
          static_cast<float>(1.0 - p.beta1),
          static_cast<float>(p.beta2),
          static_cast<float>(1.0 - p.beta2),
          p.eps,
          static_cast<float>(1.0 - learning_rate * p.weight_decay),
          static_cast<float>(learning_rate / correction1),
          1.0f / sqrtf(correction2)};
}

// The new value of one slot element; its two states are updated in place.
LOCAS_INLINE float adamw_element(const AdamwFactors& f, float w, float g, float& exp_avg, float& exp_avg_sq) {
  exp_avg = f.beta1 * exp_avg + f.one_minus_beta1 * g;
  exp_avg_sq = f.beta2 * exp_avg_sq + f.one_minus_beta2 * g * g;
  return w * f.decay - f.step_size * exp_avg / (sqrtf(exp_avg_sq) * f.sqrt_correction + f.eps);
}

// The factor that brings a row of this squared length to length 1 if it is longer.
LOCAS_INLINE float clip_factor(float sum_of_squares) {
  return sum_of_squares > 1.0f ? 1.0f / sqrtf(sum_of_squares) : 1.0f;
}

// The factor that brings a vector of this length to length 1; a zero vector stays zero.
LOCAS_INLINE double inverse_norm(double norm) { return norm > 0.0 ? 1.0 / norm : 0.0; }

// Whether a sum of squares, or a norm, comes from finite numbers only.
LOCAS_INLINE bool is_finite(double sum) { return sum <= 1.7976931348623157e308; }

}  // namespace locas
