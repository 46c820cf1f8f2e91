// What a warp-specialised kernel asks of its warps: named barriers, registers, one thread of a warp.
#pragma once

#include "cuda/ptx/device.cuh"
#include "cuda/ptx/thread.cuh"

#ifndef __CUDACC__
#include "simt/wgmma.h"
#endif

namespace locas::ptx {

LOCAS_DEVICE int warpgroup_index() { return thread_index() / 128; }

// setmaxnreg: the warpgroup takes or returns registers; a multiple of 8 in 24..256 a thread. The kernel needs
// __launch_bounds__(threads, 1), and what all warpgroups have at the end must fit what the block got.
#ifdef __CUDACC__
template <int count>
LOCAS_DEVICE void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(count));
}
template <int count>
LOCAS_DEVICE void return_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(count));
}
// sync_threads of some warps: `threads` of them meet at barrier `id`, 1 to 15.
LOCAS_DEVICE void named_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
LOCAS_DEVICE void sync_warp() { __syncwarp(); }
// True in one thread of the warp, which the compiler then knows to be one.
LOCAS_DEVICE bool elect_one() {
  uint32_t elected;
  asm volatile(
      "{\n"
      ".reg .pred one;\n"
      "elect.sync _|one, 0xffffffff;\n"
      "selp.b32 %0, 1, 0, one;\n"
      "}"
      : "=r"(elected));
  return elected != 0;
}
// The same value as in lane 0: the compiler then knows that it is the same in all lanes.
LOCAS_DEVICE int uniform(int value) { return __shfl_sync(0xffffffffu, value, 0); }
#else
template <int count>
void take_registers() {
  static_assert(count % 8 == 0 && count >= 24 && count <= 256);
  simt::set_registers();
}
template <int count>
void return_registers() {
  static_assert(count % 8 == 0 && count >= 24 && count <= 256);
  simt::set_registers();
}
inline void named_barrier(int id, int threads) { simt::barrier("named_barrier", id, threads); }
inline void sync_warp() { simt::sync_warp(); }
inline bool elect_one() {
  simt::warp_collective("elect_one", nullptr, nullptr);
  return lane_index() == 0;
}
inline int uniform(int value) { return value; }
#endif

}  // namespace locas::ptx
