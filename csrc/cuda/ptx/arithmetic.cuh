// multiply: a product that is rounded by itself, never fused with the addition behind it.
// sigmoid_of_half: 1 / (1 + exp(-x)) by the fast instructions, relative error under 1e-5 where |x| < 80: for a result
// that is rounded to a half type.
#pragma once

#include <cmath>

#include "cuda/ptx/device.cuh"

namespace locas::ptx {

#ifdef __CUDACC__
LOCAS_DEVICE float multiply(float a, float b) { return __fmul_rn(a, b); }
LOCAS_DEVICE float sigmoid_of_half(float x) {
  float power, result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x * -1.44269504088896341f));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(1.0f + power));
  return result;
}
#else
inline float multiply(float a, float b) {
  const volatile float product = a * b;
  return product;
}
inline float sigmoid_of_half(float x) { return 1.0f / (1.0f + std::exp(-x)); }
#endif

}  // namespace locas::ptx
