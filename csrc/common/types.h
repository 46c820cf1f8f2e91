// What every launch parameter is made of: plain data, no CUDA, no Python.
//
// The bindings fill the parameter structs and check them once; the CPU and the CUDA side read the same ones. A shape
// stands after every pointer.
#pragma once

#include <cstdint>

namespace locas {

enum class DType : int32_t { f32, bf16, f16, f64, i64 };

enum class Activation : int32_t { silu, gelu_tanh, gelu, relu };

// A matrix whose last dimension is contiguous. Its shape and dtype stand in the struct that holds it.
struct Rows {
  void* data;      // [rows, cols]
  int64_t stride;  // elements from one row to the next
};

}  // namespace locas
