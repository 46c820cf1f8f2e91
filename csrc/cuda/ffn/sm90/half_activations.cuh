// The activations where the result is rounded to a half type: those with a sigmoid by the fast instructions.
#pragma once

#include "common/activations.h"
#include "cuda/ptx/arithmetic.cuh"

namespace locas::cuda::sm90 {

struct SigmoidOfHalf {
  static LOCAS_DEVICE float of(float x) { return ptx::sigmoid_of_half(x); }
};

template <Activation act>
LOCAS_DEVICE ValueAndSlope half_activation(float x) {
  return activate<act, SigmoidOfHalf>(x);
}

}  // namespace locas::cuda::sm90
