// Copies of a box of a row-major matrix between global and shared memory by one thread, through the asynchronous proxy
// (TMA). The matrix, the box and the swizzle stand in a TensorMap, which a kernel receives as a __grid_constant__
// parameter. Outside the matrix a load yields zeros and a store does nothing. The box begins in shared memory at a
// multiple of 8 spans of its swizzle (1024 bytes for 128).
//
// load: all bytes of the box, also those outside the matrix, count on the mbarrier. store: bulk_wait_read<n> returns when
// at most n of this thread's groups have still to read shared memory; what the store reads, each writing thread must
// have fenced (fence_async_shared) before the barrier that lies between the two.
#pragma once

#include <cstdint>

#include "cuda/ptx/device.cuh"
#include "cuda/ptx/memory.cuh"

#ifdef __CUDACC__
#include <cuda.h>
#endif

namespace locas::ptx {

#ifdef __CUDACC__
using TensorMap = CUtensorMap;

LOCAS_DEVICE void bulk_tensor_load(void* shared, const TensorMap& map, int col, int row, uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::
          "r"(shared_address(shared)),
      "l"(&map), "r"(shared_address(barrier)), "r"(col), "r"(row)
      : "memory");
}
LOCAS_DEVICE void bulk_tensor_store(const TensorMap& map, int col, int row, const void* shared) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%2, %3}], [%1];" ::"l"(&map),
               "r"(shared_address(shared)), "r"(col), "r"(row)
               : "memory");
}
LOCAS_DEVICE void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
template <int pending>
LOCAS_DEVICE void bulk_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(pending) : "memory");
}
LOCAS_DEVICE void fence_async_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
#else
using TensorMap = simt::TensorMap;

inline void bulk_tensor_load(void* shared, const TensorMap& map, int col, int row, uint64_t* barrier) {
  simt::bulk_tensor_load(shared, map, col, row, barrier);
}
inline void bulk_tensor_store(const TensorMap& map, int col, int row, const void* shared) {
  simt::bulk_tensor_store(map, col, row, shared);
}
inline void bulk_commit() { simt::bulk_commit(); }
template <int pending>
void bulk_wait_read() {
  simt::bulk_wait_read(pending);
}
inline void fence_async_shared() { simt::fence_async_shared(); }
#endif

}  // namespace locas::ptx
