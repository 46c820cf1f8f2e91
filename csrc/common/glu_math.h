// The formulas of the memory, each once, for the CPU and the GPU: activations, their derivatives, the optimizer
// step of one element, the row clip and what a closed-form slot is scaled by. docs/method.md derives them.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

#include "common/params.h"

#ifdef __CUDACC__
#define LOCAS_INLINE __host__ __device__ __forceinline__
#else
#define LOCAS_INLINE inline __attribute__((always_inline))
#endif

namespace locas {

// exp(x) without branches or library calls, so that loops over it vectorise. Relative error under 2e-7;
// x is held in [-87.3, 88.3], where the result is a normal float; NaN stays NaN.
LOCAS_INLINE float fast_exp(float x) {
#ifdef __CUDA_ARCH__
  return expf(x);
#else
  x = x > 88.3f ? 88.3f : x;
  x = x < -87.3f ? -87.3f : x;
  // Adding 1.5 * 2^23 rounds to an integer n and leaves n in the low mantissa bits.
  constexpr float kRound = 12582912.0f;
  const float shifted = x * 1.44269504088896341f + kRound;
  const float n = shifted - kRound;
  // r = x - n * ln 2, with ln 2 in two parts so that n * kLn2High is exact.
  constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440054690583e-4f;
  const float r = (x - n * kLn2High) - n * kLn2Low;
  // Taylor to r^7: |r| <= ln(2) / 2, so the rest is under 6e-9.
  float p = 1.0f / 5040;
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const uint32_t exponent = std::bit_cast<uint32_t>(shifted) << 23;
  return std::bit_cast<float>(std::bit_cast<uint32_t>(p) + exponent);
#endif
}

LOCAS_INLINE float sigmoid(float x) { return 1.0f / (1.0f + fast_exp(-x)); }

struct ValueAndSlope {
  float value, slope;  // act(x), act'(x)
};

template <Activation act>
LOCAS_INLINE ValueAndSlope activate(float x) {
  if constexpr (act == Activation::silu) {
    const float s = sigmoid(x);
    return {x * s, s + x * s * (1.0f - s)};
  } else if constexpr (act == Activation::gelu_tanh) {
    // 0.5 x (1 + tanh z) is x * sigmoid(2 z).
    constexpr float kTwoSqrt2OverPi = 1.5957691216057308f, kCubic = 0.044715f;
    const float s = sigmoid(kTwoSqrt2OverPi * (x + kCubic * x * x * x));
    const float dz = kTwoSqrt2OverPi * (1.0f + 3.0f * kCubic * x * x);
    return {x * s, s + x * s * (1.0f - s) * dz};
  } else if constexpr (act == Activation::gelu) {
    const float cdf = 0.5f * (1.0f + erff(x * 0.70710678118654752f));
    const float density = 0.3989422804014327f * fast_exp(-0.5f * x * x);
    return {x * cdf, cdf + x * density};
  } else {
    static_assert(act == Activation::relu);
    // Written so that NaN stays NaN.
    return {x < 0.0f ? 0.0f : x, x > 0.0f ? 1.0f : 0.0f};
  }
}

// Calls f with the activation as a compile-time constant.
#ifdef __CUDACC__
#pragma nv_exec_check_disable  // f is for the host or for the device, as its caller is
#endif
template <class F>
LOCAS_INLINE auto with_activation(Activation activation, F&& f) {
  switch (activation) {
    case Activation::silu: return f.template operator()<Activation::silu>();
    case Activation::gelu_tanh: return f.template operator()<Activation::gelu_tanh>();
    case Activation::gelu: return f.template operator()<Activation::gelu>();
    default: return f.template operator()<Activation::relu>();
  }
}

// What one AdamW step needs besides the element itself; computed once a launch.
struct AdamWFactors {
  float beta1, one_minus_beta1, beta2, one_minus_beta2, eps;
  float decay;        // 1 - learning_rate * weight_decay
  float step_size;    // learning_rate / (1 - beta1^t)
  float sqrt_correction;  // 1 / sqrt(1 - beta2^t)
};

LOCAS_INLINE AdamWFactors adamw_factors(const AdamWParams& p, double step, double learning_rate) {
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
LOCAS_INLINE float adamw_element(const AdamWFactors& f, float w, float g, float& exp_avg, float& exp_avg_sq) {
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
