// multiply: a product that is rounded by itself, never fused with the addition behind it.
#pragma once

#include "cuda/ptx/device.cuh"

namespace locas::ptx {

#ifdef __CUDACC__
LOCAS_DEVICE float multiply(float a, float b) { return __fmul_rn(a, b); }
#else
inline float multiply(float a, float b) {
  const volatile float product = a * b;
  return product;
}
#endif

}  // namespace locas::ptx
