// cp.async: 16 bytes from global to shared memory, past the registers. Zeros arrive where not valid, and global is not
// touched. A group is what a thread issued since its last commit; wait returns when at most `pending` of the thread's
// own groups are under way. Others see the bytes after a barrier.
#pragma once

#include "cuda/ptx/device.cuh"
#include "cuda/ptx/memory.cuh"

namespace locas::ptx {

#ifdef __CUDACC__
LOCAS_DEVICE void cp_async_16(void* shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
               "l"(__cvta_generic_to_global(global)), "r"(valid ? 16 : 0)
               : "memory");
}
LOCAS_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int pending>
LOCAS_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}
#else
inline void cp_async_16(void* shared, const void* global, bool valid) { simt::copy_async(shared, global, valid); }
inline void cp_async_commit() { simt::commit_copies(); }
template <int pending>
void cp_async_wait() {
  simt::wait_for_copies(pending);
}
#endif

}  // namespace locas::ptx
