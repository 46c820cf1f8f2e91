// What every launch parameter is made of: plain data, no CUDA, no Python.
//
// The bindings fill the parameter structs and check them once; the CPU and the CUDA side read the same ones. A shape
// stands after every pointer and every matrix.
#pragma once

#include <cstdint>

#include "common/inline.h"

namespace locas {

enum class DType : int32_t { f32, bf16, f16, f64, i64 };

// Storage types: what lies in memory. All arithmetic is in float.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

enum class Activation : int32_t { silu, gelu_tanh, gelu, relu, relu_squared, quick_gelu, xielu };

// What an activation is made with, besides its kind: xIELU's two learned numbers.
struct ActivationParams {
  float positive = 0.0f, negative = 0.0f;
};

// A matrix whose last dimension is contiguous. Its dtype stands in the struct that holds it.
struct Matrix {
  void* data = nullptr;  // [rows, cols]; null: there is no such matrix
  int64_t rows = 0, cols = 0;
  int64_t stride = 0;                    // elements from one row to the next
  int64_t batch_stride = rows * stride;  // and from one memory's matrix to the next; there is one memory today

  template <class T>
  LOCAS_INLINE T* at(int64_t row, int64_t col) const {
    return static_cast<T*>(data) + row * stride + col;
  }
};

// Calls f with a storage type of the kernels between products as a template argument.
template <class F>
void with_type(DType dtype, F&& f) {
  switch (dtype) {
    case DType::f32: return f.template operator()<float>();
    case DType::bf16: return f.template operator()<bf16>();
    default: return f.template operator()<f16>();
  }
}

}  // namespace locas
