// Blocks of a cluster: neighbours that run at one time (launch.cuh) and reach each other's shared memory, where what is
// meant lies at the same place as in this block. sync_cluster stands before the first such access, as the others must
// have begun, and behind the last that nobody waits for, as none may have ended.
//
// store_async writes 16 bytes there, which count on an mbarrier there; who waits for it by mbarrier_wait_in_cluster sees
// them.
#pragma once

#include <cstdint>

#include "cuda/ptx/device.cuh"
#include "cuda/ptx/memory.cuh"

namespace locas::ptx {

#ifdef __CUDACC__
LOCAS_DEVICE int cluster_rank() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
}
LOCAS_DEVICE void sync_cluster() {
  asm volatile(
      "barrier.cluster.arrive.release;\n"
      "barrier.cluster.wait.acquire;" ::
          : "memory");
}
LOCAS_DEVICE uint32_t address_in(int block, const void* shared) {
  uint32_t address;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(shared)), "r"(block));
  return address;
}
LOCAS_DEVICE void store_async(int block, void* shared, const float (&value)[4], uint64_t* barrier) {
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(
                   address_in(block, shared)),
               "f"(value[0]), "f"(value[1]), "f"(value[2]), "f"(value[3]), "r"(address_in(block, barrier))
               : "memory");
}
LOCAS_DEVICE void mbarrier_wait_in_cluster(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred complete;\n"
      "again:\n"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 complete, [%0], %1;\n"
      "@complete bra.uni done;\n"
      "bra.uni again;\n"
      "done:\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}
#else
inline int cluster_rank() { return simt::cluster_rank(); }
inline void sync_cluster() { simt::sync_cluster(); }
inline void mbarrier_wait_in_cluster(uint64_t* barrier, uint32_t parity) { simt::mbarrier_wait(barrier, parity); }
inline void store_async(int block, void* shared, const float (&value)[4], uint64_t* barrier) {
  simt::store_async(block, shared, value, barrier);
}
#endif

}  // namespace locas::ptx
