// Sums over the lanes of a warp and over the threads of a block, in a fixed order: they repeat bit for bit.
#pragma once

#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/memory.cuh"
#include "cuda/ptx/shuffle.cuh"
#include "cuda/ptx/thread.cuh"

namespace locas::cuda {

// The sum over each `lanes` neighbouring lanes, a power of two up to 32, in all of them. The whole warp takes part.
template <int lanes, class T>
LOCAS_DEVICE T lane_sum(T value) {
#pragma unroll
  for (int mask = lanes / 2; mask > 0; mask /= 2) value += ptx::shuffle_xor(value, mask);
  return value;
}

// The shared memory that it takes.
template <class T, int warps>
struct WarpSums {
  T at[warps];
};

// The same value in every thread. T is float or double. All threads take part, once a launch with the same
// shared memory.
template <class T, int warps>
LOCAS_DEVICE T block_sum(T value, WarpSums<T, warps>& shared) {
  value = lane_sum<32>(value);
  if (ptx::lane_index() == 0) ptx::store(&shared.at[ptx::warp_index()], value);
  ptx::sync_threads();
  T total = 0;
#pragma unroll
  for (int warp = 0; warp < warps; ++warp) total += ptx::load(&shared.at[warp]);
  return total;
}

}  // namespace locas::cuda
