// What GPUs tell each other through memory that they share. What a thread wrote before fence_system and the barrier behind
// it is seen by whoever loads, by load_acquire, what a thread of its block then stored by store_release.
#pragma once

#include <cstdint>

#include "cuda/ptx/device.cuh"
#include "cuda/ptx/memory.cuh"

#ifndef __CUDACC__
#include <thread>
#endif

namespace locas::ptx {

#ifdef __CUDACC__
LOCAS_DEVICE void fence_system() { __threadfence_system(); }
LOCAS_DEVICE void store_release(uint32_t* to, uint32_t value) {
  asm volatile("st.release.sys.u32 [%0], %1;" ::"l"(to), "r"(value) : "memory");
}
LOCAS_DEVICE uint32_t load_acquire(const uint32_t* from) {
  uint32_t value;
  asm volatile("ld.acquire.sys.u32 %0, [%1];" : "=r"(value) : "l"(from) : "memory");
  return value;
}
#else
inline void fence_system() {}
inline void store_release(uint32_t* to, uint32_t value) { store(to, value); }
inline uint32_t load_acquire(const uint32_t* from) {
  std::this_thread::yield();  // the process that is waited for may need this core
  return load(from);
}
#endif

}  // namespace locas::ptx
