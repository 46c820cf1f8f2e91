// Storage types, and 16 bytes of them.
#pragma once

#include <cstdint>

#include "common/types.h"

namespace locas {

struct alignas(16) Vec16 {
  uint32_t word[4];
};

}  // namespace locas
