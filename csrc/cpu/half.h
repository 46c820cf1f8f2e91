// Conversions between the storage types and float, in blocks that the compiler vectorises.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>
#include <type_traits>

#ifdef __F16C__
#include <immintrin.h>
#endif

#include "common/types.h"

namespace locas::cpu::LOCAS_ISA {

inline float to_float(bf16 x) { return std::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }

// Round to nearest, ties to even; NaN stays (quiet) NaN.
inline bf16 to_bf16(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t quiet_nan = (bits >> 16) | 0x40u;
  return {static_cast<uint16_t>(x == x ? rounded : quiet_nan)};
}

inline float to_float(f16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fffu) << 13;
  // Moving the exponent bias by a multiplication is exact and covers subnormals; 0x7c00 is inf or NaN.
  float value = std::bit_cast<float>(magnitude) * 0x1p112f;
  const uint32_t special = 0x7f800000u | magnitude;
  const uint32_t bits = (x.bits & 0x7c00u) == 0x7c00u ? special : std::bit_cast<uint32_t>(value);
  return std::bit_cast<float>(bits | sign);
}

inline f16 to_f16(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;  // NaN
  } else if (magnitude >= 0x477ff000u) {
    half = 0x7c00u;  // rounds to infinity
  } else if (magnitude < 0x38800000u) {
    // Subnormal: adding 0.5 aligns the value so that the float unit rounds at the half's last bit.
    half = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - 0x38000000u) >> 13;
  }
  return {static_cast<uint16_t>(half | sign)};
}

inline void load_block(const float* from, float* to, int n) { std::memcpy(to, from, n * sizeof(float)); }
inline void store_block(const float* from, float* to, int n) { std::memcpy(to, from, n * sizeof(float)); }

inline void load_block(const bf16* from, float* to, int n) {
  for (int i = 0; i < n; ++i) to[i] = to_float(from[i]);
}
inline void store_block(const float* from, bf16* to, int n) {
  for (int i = 0; i < n; ++i) to[i] = to_bf16(from[i]);
}

inline void load_block(const f16* from, float* to, int n) {
  int i = 0;
#ifdef __F16C__
  for (; i + 8 <= n; i += 8)
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
#endif
  for (; i < n; ++i) to[i] = to_float(from[i]);
}
inline void store_block(const float* from, f16* to, int n) {
  int i = 0;
#ifdef __F16C__
  for (; i + 8 <= n; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
#endif
  for (; i < n; ++i) to[i] = to_f16(from[i]);
}

// As it comes back from memory.
inline float rounded(float x, bf16) { return to_float(to_bf16(x)); }
inline float rounded(float x, float) { return x; }

// The same of at most 2^9 values; of f16 by the instructions for several of them.
template <class T>
void round_block(float* values, int n) {
  if constexpr (!std::is_same_v<T, float>) {
    T narrow[1 << 9];
    store_block(values, narrow, n);
    load_block(narrow, values, n);
  }
}

}  // namespace locas::cpu::LOCAS_ISA
