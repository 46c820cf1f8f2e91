// The summed terms of a language-model loss and their gradient, one pass of each kind over the logits.
//
//      logits [rows, cols]    CTA b owns row b: its threads stride over the row, once for a running maximum and sum of
//                             exponentials, once for the gradient. Partial results are combined in a fixed order.
#include "common.cuh"

namespace locas::cuda {
namespace {

constexpr int kThreads = 512, kWarps = kThreads / 32;

// sum of exp(x - maximum) over what has been seen
struct Softmax {
  float maximum, sum;
};

__device__ __forceinline__ Softmax combine(Softmax a, Softmax b) {
  const float maximum = fmaxf(a.maximum, b.maximum);
  // An empty part has maximum -inf; exp(-inf - maximum) is 0, but -inf - -inf would be NaN.
  const float from_a = a.maximum == -INFINITY ? 0.0f : a.sum * expf(a.maximum - maximum);
  const float from_b = b.maximum == -INFINITY ? 0.0f : b.sum * expf(b.maximum - maximum);
  return {maximum, from_a + from_b};
}

template <class T>
__global__ void __launch_bounds__(kThreads) cross_entropy_kernel(CrossEntropyParams p) {
  __shared__ Softmax warp_parts[kWarps];
  const int64_t row = blockIdx.x, target = p.targets[row];
  const T* logits = static_cast<const T*>(p.logits.data) + row * p.logits.stride;

  Softmax part{-INFINITY, 0.0f};
  bool nan = false;
  for (int64_t col = threadIdx.x; col < p.cols; col += kThreads) {
    const float x = to_float(logits[col]);
    nan |= isnan(x);
    part = combine(part, {x, 1.0f});
  }
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2)
    part = combine(part, {__shfl_xor_sync(0xffffffffu, part.maximum, offset),
                          __shfl_xor_sync(0xffffffffu, part.sum, offset)});
  if (threadIdx.x % 32 == 0) warp_parts[threadIdx.x / 32] = part;
  nan = __syncthreads_or(nan);  // fmaxf drops NaN, so it is carried apart
  Softmax all{-INFINITY, 0.0f};
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) all = combine(all, warp_parts[warp]);
  if (nan) all.sum = NAN;

  if (threadIdx.x == 0) p.nll[row] = logf(all.sum) + all.maximum - to_float(logits[target]);
  if (!p.d_logits.data) return;
  T* out = static_cast<T*>(p.d_logits.data) + row * p.d_logits.stride;
  const float inverse = 1.0f / all.sum;
  for (int64_t col = threadIdx.x; col < p.cols; col += kThreads)
    out[col] = from_float<T>(expf(to_float(logits[col]) - all.maximum) * inverse - (col == target ? 1.0f : 0.0f));
}

}  // namespace

void cross_entropy(const CrossEntropyParams& p, Queue queue) {
  if (p.rows == 0) return;
  const DeviceGuard guard(queue.device);
  with_type(p.dtype, [&]<class T>() {
    cross_entropy_kernel<T><<<static_cast<unsigned>(p.rows), kThreads, 0, static_cast<cudaStream_t>(queue.stream)>>>(p);
  });
  check(cudaGetLastError(), "cross_entropy");
}

}  // namespace locas::cuda
