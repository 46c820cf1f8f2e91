// Storage types: what lies in memory. All arithmetic is in float.
#pragma once

#include <cstdint>

namespace locas {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

struct alignas(16) Vec16 {
  uint32_t word[4];
};

}  // namespace locas
