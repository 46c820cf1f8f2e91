// bf16 and f16 as the GPU converts them: to nearest, ties to even, every NaN to 0x7fff.
#pragma once

#include <bit>
#include <cstdint>

namespace locas::simt {

inline float bf16_to_float(uint16_t bits) { return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16); }

inline uint16_t float_to_bf16(float x) {
  if (x != x) return 0x7fff;
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline float f16_to_float(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(bits & 0x7fffu) << 13;
  const bool special = (bits & 0x7c00u) == 0x7c00u;  // infinity or NaN
  // Moving the exponent's bias by a multiplication is exact and covers subnormals.
  const uint32_t value =
      special ? 0x7f800000u | magnitude : std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) * 0x1p112f);
  return std::bit_cast<float>(value | sign);
}

inline uint16_t float_to_f16(float x) {
  if (x != x) return 0x7fff;
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude >= 0x477ff000u) half = 0x7c00u;  // rounds to infinity
  else if (magnitude < 0x38800000u)  // subnormal: adding 0.5 makes the float unit round at the half's last bit
    half = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  else half = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - 0x38000000u) >> 13;
  return static_cast<uint16_t>(half | sign);
}

}  // namespace locas::simt
