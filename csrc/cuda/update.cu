// One optimizer step and the row clip over all slots of all layers in one launch.
//
//      slots [rows, d]    CTA b owns row b: its threads stride over the row twice, once to step, once to clip and
//                         write the rounded copy. A thread meets the same elements both times, so the second pass
//                         finds them in its own cache and needs no barrier beyond the one of the norm.
//
// The norm is added up in a fixed order: the result repeats bit for bit.
#include "common.cuh"

namespace locas::cuda {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / 32;

__device__ __forceinline__ double read(const DeviceScalar& scalar) {
  switch (scalar.dtype) {
    case DType::i64: return static_cast<double>(*static_cast<const int64_t*>(scalar.data));
    case DType::f64: return *static_cast<const double*>(scalar.data);
    default: return *static_cast<const float*>(scalar.data);
  }
}

// The sum over the CTA, the same value in every thread.
__device__ __forceinline__ float block_sum(float value) {
  __shared__ float warp_sums[kWarps];
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
  if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32] = value;
  __syncthreads();
  float total = 0.0f;
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) total += warp_sums[warp];
  return total;
}

// step(i, w) returns the new element i of the row.
template <class T, class Step>
__device__ __forceinline__ void update_row(float* w, T* copy, int64_t d, bool clip, Step&& step) {
  float sum_of_squares = 0.0f;
  for (int64_t i = threadIdx.x; i < d; i += kThreads) {
    const float value = step(i, w[i]);
    w[i] = value;
    sum_of_squares += value * value;
  }
  const float factor = clip ? clip_factor(block_sum(sum_of_squares)) : 1.0f;
  if (factor == 1.0f && copy == nullptr) return;
  for (int64_t i = threadIdx.x; i < d; i += kThreads) {
    const float value = w[i] * factor;
    if (factor != 1.0f) w[i] = value;
    if (copy) copy[i] = from_float<T>(value);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) adamw_kernel(AdamWParams p) {
  // The double-precision powers are the same for every row: one thread does them.
  __shared__ AdamWFactors factors;
  if (threadIdx.x == 0) factors = adamw_factors(p, read(p.step), read(p.learning_rate));
  __syncthreads();
  const AdamWFactors f = factors;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * p.d;
  const float* grad = p.grad + first;
  float* exp_avg = p.exp_avg + first;
  float* exp_avg_sq = p.exp_avg_sq + first;
  T* copy = p.compute ? static_cast<T*>(p.compute) + first : nullptr;
  update_row(p.slots + first, copy, p.d, p.clip, [&](int64_t i, float w) {
    return adamw_element(f, w, grad[i], exp_avg[i], exp_avg_sq[i]);
  });
}

template <class T>
__global__ void __launch_bounds__(kThreads) sgd_kernel(SgdParams p) {
  const float learning_rate = static_cast<float>(read(p.learning_rate));
  const float decay = 1.0f - learning_rate * p.weight_decay;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * p.d;
  const float* grad = p.grad + first;
  float* buffer = p.momentum_buffer ? p.momentum_buffer + first : nullptr;
  T* copy = p.compute ? static_cast<T*>(p.compute) + first : nullptr;
  update_row(p.slots + first, copy, p.d, p.clip, [&](int64_t i, float w) {
    float direction = grad[i];
    if (buffer) direction = buffer[i] = p.momentum * buffer[i] + direction;
    return w * decay - learning_rate * direction;
  });
}

}  // namespace

void adamw(const AdamWParams& p, Queue queue) {
  if (p.rows == 0) return;
  const DeviceGuard guard(queue.device);
  with_type(p.compute_dtype, [&]<class T>() {
    adamw_kernel<T><<<static_cast<unsigned>(p.rows), kThreads, 0, static_cast<cudaStream_t>(queue.stream)>>>(p);
  });
  check(cudaGetLastError(), "adamw");
}

void sgd(const SgdParams& p, Queue queue) {
  if (p.rows == 0) return;
  const DeviceGuard guard(queue.device);
  with_type(p.compute_dtype, [&]<class T>() {
    sgd_kernel<T><<<static_cast<unsigned>(p.rows), kThreads, 0, static_cast<cudaStream_t>(queue.stream)>>>(p);
  });
  check(cudaGetLastError(), "sgd");
}

}  // namespace locas::cuda
