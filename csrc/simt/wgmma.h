// What the four warps of a warpgroup multiply together. csrc/cuda/ptx/wgmma.cuh says what each argument means.
#pragma once

#include <cstddef>
#include <cstdint>

#include "simt/warp.h"

namespace locas::simt {

// sums [64, n] += A [64, 16] B [16, n]; registers: this thread's n / 2 of the sums.
struct WgmmaArguments {
  Half type;
  int n;
  uint64_t a, b;  // descriptors of 128-byte-swizzled operands in shared memory
  bool a_mn, b_mn;
  bool accumulate;
  float* registers;
};
void wgmma(const WgmmaArguments& arguments);
void wgmma_fence();
void wgmma_commit();
void wgmma_wait(size_t pending_groups);

// setmaxnreg: the whole warpgroup executes it.
void set_registers();

}  // namespace locas::simt
