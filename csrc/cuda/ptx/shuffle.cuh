// The value of another lane of the warp, by lane ^ mask.
#pragma once

#include "cuda/ptx/device.cuh"
#include "cuda/ptx/thread.cuh"

#ifndef __CUDACC__
#include "simt/warp.h"
#endif

namespace locas::ptx {

#ifdef __CUDACC__
LOCAS_DEVICE float shuffle_xor(float value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }
LOCAS_DEVICE double shuffle_xor(double value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }
#else
inline float shuffle_xor(float value, int mask) { return simt::shuffle("shuffle_xor", value, lane_index() ^ mask); }
inline double shuffle_xor(double value, int mask) { return simt::shuffle("shuffle_xor", value, lane_index() ^ mask); }
#endif

}  // namespace locas::ptx
