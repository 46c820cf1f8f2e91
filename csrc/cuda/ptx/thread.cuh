// Where this thread is. All grids and blocks are one-dimensional.
#pragma once

#include "cuda/ptx/device.cuh"

namespace locas::ptx {

#ifdef __CUDACC__
LOCAS_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
LOCAS_DEVICE int block_index() { return static_cast<int>(blockIdx.x); }
LOCAS_DEVICE int block_count() { return static_cast<int>(gridDim.x); }
#else
inline int thread_index() { return simt::thread_index(); }
inline int block_index() { return simt::block_index(); }
inline int block_count() { return simt::block_count(); }
#endif
LOCAS_DEVICE int lane_index() { return thread_index() % 32; }
LOCAS_DEVICE int warp_index() { return thread_index() / 32; }

}  // namespace locas::ptx
