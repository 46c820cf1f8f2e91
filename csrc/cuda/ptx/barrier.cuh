// All threads of a block wait for each other. sync_threads_or: whether the predicate held in any of them.
#pragma once

#include "cuda/ptx/device.cuh"

namespace locas::ptx {

#ifdef __CUDACC__
LOCAS_DEVICE void sync_threads() { __syncthreads(); }
LOCAS_DEVICE bool sync_threads_or(bool predicate) { return __syncthreads_or(predicate) != 0; }
#else
inline void sync_threads() { simt::sync_threads(); }
inline bool sync_threads_or(bool predicate) { return simt::sync_threads(predicate); }
#endif

}  // namespace locas::ptx
