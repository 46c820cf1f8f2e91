// The activations and their derivatives, each once, for the CPU and the GPU. docs/method.md derives them.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

#include "common/inline.h"
#include "common/types.h"

namespace locas {

// By their transformers names, in the order of Activation, without xIELU. `_C` exports them as ACTIVATIONS.
constexpr const char* kActivationNames[] = {"silu", "gelu_pytorch_tanh", "gelu", "relu", "relu2", "quick_gelu"};

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
struct Sigmoid {
  static LOCAS_INLINE float of(float x) { return sigmoid(x); }
};

struct ValueAndSlope {
  float value, slope;  // act(x), act'(x)
};

// Logistic: the sigmoid that it takes.
#ifdef __CUDACC__
#pragma nv_exec_check_disable
#endif
template <Activation act, class Logistic = Sigmoid>
LOCAS_INLINE ValueAndSlope activate(float x) {
  if constexpr (act == Activation::silu) {
    const float s = Logistic::of(x);
    return {x * s, s + x * s * (1.0f - s)};
  } else if constexpr (act == Activation::gelu_tanh) {
    // 0.5 x (1 + tanh z) is x * sigmoid(2 z).
    constexpr float kTwoSqrt2OverPi = 1.5957691216057308f, kCubic = 0.044715f;
    const float s = Logistic::of(kTwoSqrt2OverPi * (x + kCubic * x * x * x));
    const float dz = kTwoSqrt2OverPi * (1.0f + 3.0f * kCubic * x * x);
    return {x * s, s + x * s * (1.0f - s) * dz};
  } else if constexpr (act == Activation::gelu) {
    const float cdf = 0.5f * (1.0f + erff(x * 0.70710678118654752f));
    const float density = 0.3989422804014327f * fast_exp(-0.5f * x * x);
    return {x * cdf, cdf + x * density};
  } else if constexpr (act == Activation::quick_gelu) {
    constexpr float kSteepness = 1.702f;
    const float s = Logistic::of(kSteepness * x);
    return {x * s, s + kSteepness * x * s * (1.0f - s)};
  } else if constexpr (act == Activation::relu_squared) {
    const float positive = x < 0.0f ? 0.0f : x;  // written so that NaN stays NaN
    return {positive * positive, 2.0f * positive};
  } else {
    static_assert(act == Activation::relu);
    // Written so that NaN stays NaN.
    return {x < 0.0f ? 0.0f : x, x > 0.0f ? 1.0f : 0.0f};
  }
}

// exp(x) - 1 - x for x <= 0, without cancellation near 0.
LOCAS_INLINE float exp_minus_line(float x) {
  // Taylor to x^11 on [-1, 0]: the rest is under 3e-9.
  const float t = x < -1.0f ? -1.0f : x;
  float p = 1.0f / 39916800;
  p = p * t + 1.0f / 3628800;
  p = p * t + 1.0f / 362880;
  p = p * t + 1.0f / 40320;
  p = p * t + 1.0f / 5040;
  p = p * t + 1.0f / 720;
  p = p * t + 1.0f / 120;
  p = p * t + 1.0f / 24;
  p = p * t + 1.0f / 6;
  p = p * t + 0.5f;
  return x < -1.0f ? fast_exp(x) - 1.0f - x : p * x * x;
}

// xIELU (arXiv 2411.13010) with beta = 0.5: positive * x^2 + x / 2 above 0, negative * (exp(x) - 1 - x) + x / 2 below.
LOCAS_INLINE ValueAndSlope xielu(float x, ActivationParams params) {
  constexpr float kBeta = 0.5f;
  const float below = x > 0.0f ? 0.0f : x, curve = exp_minus_line(below);
  const float above = params.positive * x;
  return {x > 0.0f ? above * x + kBeta * x : params.negative * curve + kBeta * x,
          x > 0.0f ? 2.0f * above + kBeta : params.negative * (below + curve) + kBeta};
}

template <Activation act>
LOCAS_INLINE ValueAndSlope activate(float x, ActivationParams params) {
  if constexpr (act == Activation::xielu) {
    return xielu(x, params);
  } else {
    return activate<act>(x);
  }
}

// Calls f with the activation as a compile-time constant: one that takes no parameters.
#ifdef __CUDACC__
#pragma nv_exec_check_disable  // f is for the host or for the device, as its caller is
#endif
template <class F>
LOCAS_INLINE auto with_activation(Activation activation, F&& f) {
  switch (activation) {
    case Activation::silu: return f.template operator()<Activation::silu>();
    case Activation::gelu_tanh: return f.template operator()<Activation::gelu_tanh>();
    case Activation::gelu: return f.template operator()<Activation::gelu>();
    case Activation::relu_squared: return f.template operator()<Activation::relu_squared>();
    case Activation::quick_gelu: return f.template operator()<Activation::quick_gelu>();
    default: return f.template operator()<Activation::relu>();
  }
}

// The same with xIELU too.
#ifdef __CUDACC__
#pragma nv_exec_check_disable
#endif
template <class F>
LOCAS_INLINE auto with_any_activation(Activation activation, F&& f) {
  if (activation == Activation::xielu) return f.template operator()<Activation::xielu>();
  return with_activation(activation, f);
}

}  // namespace locas
