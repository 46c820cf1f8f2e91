// One optimizer step and the row clip over all slots of all layers in one launch.
//
//      slots [rows, d]    CTA b owns row b. Where d is a multiple of 4 and at most 128 * 4 * 8, a thread holds its part of
//                         the row, kVectors float4 that lie 128 apart, in registers: all loads are under way before the
//                         first is used, and each byte moves once. Other widths go through a strided loop, twice: to
//                         step, then to clip and write the rounded copy.
//
// The norm is added up in a fixed order: the result repeats bit for bit.
#include "common.cuh"

#include <initializer_list>
#include <type_traits>

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

// The two rules: what a row needs besides the slots, and the new value of one element.
struct AdamWRule {
  using Params = AdamWParams;
  AdamWFactors factors;
  const float* __restrict__ grad;
  float* __restrict__ exp_avg;
  float* __restrict__ exp_avg_sq;

  __device__ __forceinline__ AdamWRule(const AdamWParams& p, int64_t first)
      : factors(adamw_factors(p, read(p.step), read(p.learning_rate))),
        grad(p.grad + first), exp_avg(p.exp_avg + first), exp_avg_sq(p.exp_avg_sq + first) {}

  struct Operands {
    float4 grad, exp_avg, exp_avg_sq;
  };
  __device__ __forceinline__ Operands load(int64_t i) const {
    return {*reinterpret_cast<const float4*>(grad + i), *reinterpret_cast<const float4*>(exp_avg + i),
            *reinterpret_cast<const float4*>(exp_avg_sq + i)};
  }
  __device__ __forceinline__ float4 step(int64_t i, float4 w, Operands o) const {
    w = {adamw_element(factors, w.x, o.grad.x, o.exp_avg.x, o.exp_avg_sq.x),
         adamw_element(factors, w.y, o.grad.y, o.exp_avg.y, o.exp_avg_sq.y),
         adamw_element(factors, w.z, o.grad.z, o.exp_avg.z, o.exp_avg_sq.z),
         adamw_element(factors, w.w, o.grad.w, o.exp_avg.w, o.exp_avg_sq.w)};
    *reinterpret_cast<float4*>(exp_avg + i) = o.exp_avg;
    *reinterpret_cast<float4*>(exp_avg_sq + i) = o.exp_avg_sq;
    return w;
  }
  __device__ __forceinline__ float step(int64_t i, float w) const {
    return adamw_element(factors, w, grad[i], exp_avg[i], exp_avg_sq[i]);
  }
};

struct SgdRule {
  using Params = SgdParams;
  float learning_rate, decay, momentum;
  const float* __restrict__ grad;
  float* __restrict__ buffer;  // null without momentum

  __device__ __forceinline__ SgdRule(const SgdParams& p, int64_t first)
      : learning_rate(static_cast<float>(read(p.learning_rate))), decay(1.0f - learning_rate * p.weight_decay),
        momentum(p.momentum), grad(p.grad + first), buffer(p.momentum_buffer ? p.momentum_buffer + first : nullptr) {}

  struct Operands {
    float4 grad, buffer;
  };
  __device__ __forceinline__ Operands load(int64_t i) const {
    return {*reinterpret_cast<const float4*>(grad + i),
            buffer ? *reinterpret_cast<const float4*>(buffer + i) : make_float4(0, 0, 0, 0)};
  }
  __device__ __forceinline__ float4 step(int64_t i, float4 w, Operands o) const {
    float4 direction = {momentum * o.buffer.x + o.grad.x, momentum * o.buffer.y + o.grad.y,
                        momentum * o.buffer.z + o.grad.z, momentum * o.buffer.w + o.grad.w};
    if (buffer) *reinterpret_cast<float4*>(buffer + i) = direction;
    return {w.x * decay - learning_rate * direction.x, w.y * decay - learning_rate * direction.y,
            w.z * decay - learning_rate * direction.z, w.w * decay - learning_rate * direction.w};
  }
  __device__ __forceinline__ float step(int64_t i, float w) const {
    float direction = grad[i];
    if (buffer) direction = buffer[i] = momentum * buffer[i] + direction;
    return w * decay - learning_rate * direction;
  }
};

// Four neighbouring elements of the rounded copy, in one store.
template <class T>
__device__ __forceinline__ void store_copy(float4 w, T* to) {
  alignas(4 * sizeof(T)) T four[4] = {from_float<T>(w.x), from_float<T>(w.y), from_float<T>(w.z), from_float<T>(w.w)};
  using Packed = std::conditional_t<sizeof(T) == 4, uint4, uint2>;
  *reinterpret_cast<Packed*>(to) = *reinterpret_cast<const Packed*>(four);
}

template <class T, class Rule, int kVectors>
__global__ void __launch_bounds__(kThreads) update_in_registers(typename Rule::Params p) {
  if (p.finite.data && read(p.finite) == 0.0) return;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * p.d;
  const Rule rule(p, first);
  float* slots = p.slots + first;
  float4 w[kVectors];
  typename Rule::Operands operands[kVectors];
#pragma unroll
  for (int k = 0; k < kVectors; ++k) {
    const int64_t i = 4 * (threadIdx.x + static_cast<int64_t>(k) * kThreads);
    if (i < p.d) {
      w[k] = *reinterpret_cast<const float4*>(slots + i);
      operands[k] = rule.load(i);
    }
  }
  float sum_of_squares = 0.0f;
#pragma unroll
  for (int k = 0; k < kVectors; ++k) {
    const int64_t i = 4 * (threadIdx.x + static_cast<int64_t>(k) * kThreads);
    if (i < p.d) {
      w[k] = rule.step(i, w[k], operands[k]);
      sum_of_squares += w[k].x * w[k].x + w[k].y * w[k].y + w[k].z * w[k].z + w[k].w * w[k].w;
    }
  }
  const float factor = p.clip ? clip_factor(block_sum(sum_of_squares)) : 1.0f;
  T* copy = p.compute ? static_cast<T*>(p.compute) + first : nullptr;
#pragma unroll
  for (int k = 0; k < kVectors; ++k) {
    const int64_t i = 4 * (threadIdx.x + static_cast<int64_t>(k) * kThreads);
    if (i < p.d) {
      const float4 clipped = {w[k].x * factor, w[k].y * factor, w[k].z * factor, w[k].w * factor};
      *reinterpret_cast<float4*>(slots + i) = clipped;
      if (copy) store_copy(clipped, copy + i);
    }
  }
}

template <class T, class Rule>
__global__ void __launch_bounds__(kThreads) update_any_width(typename Rule::Params p) {
  if (p.finite.data && read(p.finite) == 0.0) return;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * p.d;
  const Rule rule(p, first);
  T* copy = p.compute ? static_cast<T*>(p.compute) + first : nullptr;
  update_row(p.slots + first, copy, p.d, p.clip, [&](int64_t i, float w) { return rule.step(i, w); });
}

template <class Rule>
void update(const typename Rule::Params& p, std::initializer_list<const void*> pointers, Queue queue) {
  const DeviceGuard guard(queue.device);
  const auto stream = static_cast<cudaStream_t>(queue.stream);
  const unsigned rows = static_cast<unsigned>(p.rows);
  bool vectors = p.d % 4 == 0;
  for (const void* pointer : pointers) vectors = vectors && reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
  const int64_t per_thread = (p.d / 4 + kThreads - 1) / kThreads;
  with_type(p.compute_dtype, [&]<class T>() {
    if (vectors && per_thread <= 1) update_in_registers<T, Rule, 1><<<rows, kThreads, 0, stream>>>(p);
    else if (vectors && per_thread <= 2) update_in_registers<T, Rule, 2><<<rows, kThreads, 0, stream>>>(p);
    else if (vectors && per_thread <= 4) update_in_registers<T, Rule, 4><<<rows, kThreads, 0, stream>>>(p);
    else if (vectors && per_thread <= 8) update_in_registers<T, Rule, 8><<<rows, kThreads, 0, stream>>>(p);
    else update_any_width<T, Rule><<<rows, kThreads, 0, stream>>>(p);
  });
}

}  // namespace

void adamw(const AdamWParams& p, Queue queue) {
  if (p.rows == 0) return;
  update<AdamWRule>(p, {p.slots, p.grad, p.exp_avg, p.exp_avg_sq, p.compute}, queue);
  check(cudaGetLastError(), "adamw");
}

void sgd(const SgdParams& p, Queue queue) {
  if (p.rows == 0) return;
  update<SgdRule>(p, {p.slots, p.grad, p.momentum_buffer, p.compute}, queue);
  check(cudaGetLastError(), "sgd");
}

}  // namespace locas::cuda
