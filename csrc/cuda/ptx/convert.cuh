// Between storage types and float: rounded to nearest, ties to even; NaN stays NaN.
#pragma once

#include <type_traits>

#include "cuda/ptx/device.cuh"
#include "cuda/ptx/types.cuh"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#else
#include "simt/numbers.h"
#endif

namespace locas::ptx {

#ifdef __CUDACC__
LOCAS_DEVICE float to_float(bf16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
LOCAS_DEVICE float to_float(f16 x) { return __half2float(__ushort_as_half(x.bits)); }
template <class T>
LOCAS_DEVICE T from_float(float x) {
  if constexpr (std::is_same_v<T, bf16>) return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
  else if constexpr (std::is_same_v<T, f16>) return {__half_as_ushort(__float2half_rn(x))};
  else return x;
}
#else
inline float to_float(bf16 x) { return simt::bf16_to_float(x.bits); }
inline float to_float(f16 x) { return simt::f16_to_float(x.bits); }
template <class T>
T from_float(float x) {
  if constexpr (std::is_same_v<T, bf16>) return {simt::float_to_bf16(x)};
  else if constexpr (std::is_same_v<T, f16>) return {simt::float_to_f16(x)};
  else return x;
}
#endif
LOCAS_DEVICE float to_float(float x) { return x; }

// Two neighbours of a half type, the first in the low half.
#ifdef __CUDACC__
template <class T>
LOCAS_DEVICE uint32_t pack(float first, float second) {
  uint32_t pair;
  if constexpr (std::is_same_v<T, bf16>) asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  else asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  return pair;
}
#else
template <class T>
uint32_t pack(float first, float second) {
  return from_float<T>(first).bits | static_cast<uint32_t>(from_float<T>(second).bits) << 16;
}
#endif
template <class T>
LOCAS_DEVICE float first_of(uint32_t pair) {
  return to_float(T{static_cast<uint16_t>(pair)});
}
template <class T>
LOCAS_DEVICE float second_of(uint32_t pair) {
  return to_float(T{static_cast<uint16_t>(pair >> 16)});
}

}  // namespace locas::ptx
