// Programmatic dependent launch: a grid launched so may begin before the launch before it has ended. wait: until that
// one has ended and its writes are visible; launch_dependents: as far as this block is concerned, the next may begin.
//
// sync_grid: all threads of a cooperative launch wait for each other, and see what any of them wrote before. It counts in
// a word that the driver gives each such launch, and leaves it as it was for the next replay.
#pragma once

#include "cuda/ptx/device.cuh"

#ifdef __CUDACC__
#include <cooperative_groups.h>
#endif

namespace locas::ptx {

#ifdef __CUDACC__
// GPUs before sm_90 do not know it: there a launch is never programmatic (launch.cuh).
LOCAS_DEVICE void wait_for_launch_before() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
LOCAS_DEVICE void launch_dependents() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
LOCAS_DEVICE void sync_grid() { cooperative_groups::this_grid().sync(); }
#else
inline void wait_for_launch_before() { simt::wait_for_launch_before(); }
inline void launch_dependents() {}
inline void sync_grid() { simt::sync_grid(); }
#endif

}  // namespace locas::ptx
