// What the row and elementwise kernels share: vector loads of the storage types, launch checks, the device guard.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "../glu_math.h"
#include "launch.h"

namespace locas::cuda {

inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess)
    throw std::runtime_error(std::string("CUDA error in ") + what + ": " + cudaGetErrorString(status));
}

class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&previous_), "cudaGetDevice");
    if (device != previous_) check(cudaSetDevice(device), "cudaSetDevice");
    changed_ = device != previous_;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
  bool changed_ = false;
};

// Eight neighbouring elements, one 16-byte access for the half types and two for float.
constexpr int kVector = 8;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
template <class T>
__device__ __forceinline__ T from_float(float x) {
  if constexpr (sizeof(T) == 4) return x;
  else if constexpr (std::is_same_v<T, __half>) return __float2half_rn(x);
  else return __float2bfloat16_rn(x);
}

// Loads `count` (1..kVector) elements; whole aligned vectors in 16-byte pieces.
template <class T>
__device__ __forceinline__ void load_vector(const T* from, float (&to)[kVector], int count, bool aligned) {
  if (count == kVector && aligned) {
    constexpr int kPieces = kVector * sizeof(T) / 16;
    alignas(16) T elements[kVector];
#pragma unroll
    for (int i = 0; i < kPieces; ++i)
      reinterpret_cast<uint4*>(elements)[i] = reinterpret_cast<const uint4*>(from)[i];
#pragma unroll
    for (int i = 0; i < kVector; ++i) to[i] = to_float(elements[i]);
  } else {
#pragma unroll
    for (int i = 0; i < kVector; ++i) to[i] = i < count ? to_float(from[i]) : 0.0f;
  }
}

template <class T>
__device__ __forceinline__ void store_vector(const float (&from)[kVector], T* to, int count, bool aligned) {
  if (count == kVector && aligned) {
    constexpr int kPieces = kVector * sizeof(T) / 16;
    alignas(16) T elements[kVector];
#pragma unroll
    for (int i = 0; i < kVector; ++i) elements[i] = from_float<T>(from[i]);
#pragma unroll
    for (int i = 0; i < kPieces; ++i)
      reinterpret_cast<uint4*>(to)[i] = reinterpret_cast<const uint4*>(elements)[i];
  } else {
#pragma unroll
    for (int i = 0; i < kVector; ++i)
      if (i < count) to[i] = from_float<T>(from[i]);
  }
}

template <class T>
bool is_aligned(const Rows& m) {
  return m.data == nullptr ||
         (reinterpret_cast<uintptr_t>(m.data) % 16 == 0 && m.stride * sizeof(T) % 16 == 0);
}

// Calls f with the storage type as a template argument.
template <class F>
void with_type(DType dtype, F&& f) {
  switch (dtype) {
    case DType::f32: return f.template operator()<float>();
    case DType::bf16: return f.template operator()<__nv_bfloat16>();
    default: return f.template operator()<__half>();
  }
}

}  // namespace locas::cuda
