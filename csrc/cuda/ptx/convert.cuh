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

}  // namespace locas::ptx
