// What a loss sees of a logit: scaled, and softly capped, where a host does that.
#pragma once

#include "common/activations.h"
#include "common/elementwise_params.h"
#include "common/inline.h"

namespace locas {

enum class LogitMap { identity, scale, cap };

// tanh(x) without branches or library calls on the CPU, so that loops over it vectorise; error under 2e-7.
LOCAS_INLINE float fast_tanh(float x) {
#ifdef __CUDA_ARCH__
  return tanhf(x);
#else
  const float size = std::fabs(x), square = x * x;
  float p = -5.70498872745e-3f;  // Cephes' polynomial, for |x| < 0.625
  p = p * square + 2.06390887954e-2f;
  p = p * square - 5.37397155531e-2f;
  p = p * square + 1.33314422036e-1f;
  p = p * square - 3.33332819422e-1f;
  const float near = x + x * square * p;
  const float far = std::copysign(1.0f - 2.0f / (fast_exp(2.0f * size) + 1.0f), x);
  return size < 0.625f ? near : far;
#endif
}

// z = scale * x, and with a cap cap * tanh(z / cap); and its derivative by x.
template <LogitMap map>
LOCAS_INLINE ValueAndSlope map_logit(float x, float scale, float cap) {
  if constexpr (map == LogitMap::identity) {
    return {x, 1.0f};
  } else if constexpr (map == LogitMap::scale) {
    return {scale * x, scale};
  } else {
    const float t = fast_tanh(scale * x / cap);
    return {cap * t, scale * (1.0f - t * t)};
  }
}

// Calls f with what these parameters do to a logit as a compile-time constant.
template <class F>
auto with_logit_map(const TokenNllParams& p, F&& f) {
  if (p.soft_cap > 0.0f) return f.template operator()<LogitMap::cap>();
  if (p.logit_scale != 1.0f) return f.template operator()<LogitMap::scale>();
  return f.template operator()<LogitMap::identity>();
}

}  // namespace locas
