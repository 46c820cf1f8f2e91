// Programmatic dependent launch: a grid launched so may begin before the launch before it has ended. wait: until that
// one has ended and its writes are visible; launch_dependents: as far as this block is concerned, the next may begin.
#pragma once

#include "cuda/ptx/device.cuh"

namespace locas::ptx {

#ifdef __CUDACC__
LOCAS_DEVICE void wait_for_launch_before() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
LOCAS_DEVICE void launch_dependents() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
#else
inline void wait_for_launch_before() { simt::wait_for_launch_before(); }
inline void launch_dependents() {}
#endif

}  // namespace locas::ptx
