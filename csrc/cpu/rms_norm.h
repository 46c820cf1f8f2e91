// The formula of an RMS norm over a block of floats: of a row's part (norms.cpp) or of a head (rotary.cpp).
#pragma once

#include "cpu/half.h"

namespace locas::cpu::LOCAS_ISA {

// out = weight * round(x * inverse), or (weight_offset + weight) * x * inverse; not rounded behind that.
template <class T>
void normalize_block(const float* x, const float* weight, float inverse, float weight_offset, float* out, int n) {
  if (weight_offset != 0.0f) {
#pragma omp simd
    for (int i = 0; i < n; ++i) out[i] = x[i] * inverse * (weight_offset + weight[i]);
  } else if constexpr (std::is_same_v<T, f16>) {
#pragma omp simd
    for (int i = 0; i < n; ++i) out[i] = x[i] * inverse;
    round_block<T>(out, n);
#pragma omp simd
    for (int i = 0; i < n; ++i) out[i] *= weight[i];
  } else {
#pragma omp simd
    for (int i = 0; i < n; ++i) out[i] = weight[i] * rounded(x[i] * inverse, T{});
  }
}

}  // namespace locas::cpu::LOCAS_ISA
