// The activations where the result is rounded to a half type: silu, the usual one, by the fast instructions.
#pragma once

#include "common/activations.h"
#include "cuda/ptx/arithmetic.cuh"

namespace locas::cuda::sm90 {

template <Activation act>
LOCAS_DEVICE ValueAndSlope half_activation(float x) {
  if constexpr (act == Activation::silu) {
    const float s = ptx::sigmoid_of_half(x);
    return {x * s, s + x * s * (1.0f - s)};
  } else {
    return activate<act>(x);
  }
}

}  // namespace locas::cuda::sm90
