// The formula of an RMS norm, for the kernels over rows and for those over heads.
#pragma once

#include <cmath>

#include "cuda/common/elements.cuh"

namespace locas::cuda {

LOCAS_DEVICE float inverse_rms(float sum_of_squares, int64_t count, float eps) {
  return 1.0f / sqrtf(sum_of_squares / static_cast<float>(count) + eps);
}

// weight * round(x * inverse), or (weight_offset + weight) * x * inverse
template <class T>
LOCAS_DEVICE float normalized(float x, float inverse, float weight, float weight_offset) {
  return weight_offset == 0.0f ? weight * rounded<T>(x * inverse) : x * inverse * (weight_offset + weight);
}

}  // namespace locas::cuda
