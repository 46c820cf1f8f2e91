// An mbarrier in shared memory counts the arrivals of a phase, and the bytes of bulk copies that arrivals announced.
// The wait returns when the phase of that parity is complete; phases begin at parity 0, so waiting for parity 1 on a
// fresh mbarrier returns at once. One thread initialises and fences, and sync_threads tells the others.
#pragma once

#include <cstdint>

#include "cuda/ptx/device.cuh"
#include "cuda/ptx/memory.cuh"

namespace locas::ptx {

#ifdef __CUDACC__
LOCAS_DEVICE void mbarrier_init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
// What this thread initialised may be used by bulk copies.
LOCAS_DEVICE void mbarrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
LOCAS_DEVICE void mbarrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
LOCAS_DEVICE void mbarrier_arrive_expect(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}
LOCAS_DEVICE void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred complete;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 complete, [%0], %1;\n"
      "@complete bra.uni done;\n"
      "bra.uni again;\n"
      "done:\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}
#else
inline void mbarrier_init(uint64_t* barrier, int arrivals) { simt::mbarrier_init(barrier, arrivals); }
inline void mbarrier_init_fence() { simt::mbarrier_init_fence(); }
inline void mbarrier_arrive(uint64_t* barrier) { simt::mbarrier_arrive(barrier, 0); }
inline void mbarrier_arrive_expect(uint64_t* barrier, uint32_t bytes) { simt::mbarrier_arrive(barrier, bytes); }
inline void mbarrier_wait(uint64_t* barrier, uint32_t parity) { simt::mbarrier_wait(barrier, parity); }
#endif

}  // namespace locas::ptx
