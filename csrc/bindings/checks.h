// Checks of one argument each: they name the op, the argument, what is wrong with it and what is expected, and throw
// ValueError.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <optional>
#include <string>

#include "bindings/tensor_ref.h"
#include "common/types.h"

namespace locas {

namespace py = pybind11;
using MaybeTensor = std::optional<TensorRef>;

struct Named {
  const char* name;
  const TensorRef& tensor;
};

[[noreturn]] inline void fail(const char* op, const Named& t, const std::string& problem) {
  throw py::value_error(std::string(op) + ": " + t.name + " " + problem);
}

// A [rows, cols] matrix with a contiguous last dimension that matches `like` in shape, dtype and device.
inline Rows matrix(const char* op, const Named& t, const TensorRef& like) {
  if (t.tensor.ndim != 2) fail(op, t, "has shape " + t.tensor.shape_text() + "; expected [rows, cols]");
  if (!t.tensor.same_shape(like)) fail(op, t, "has shape " + t.tensor.shape_text() + "; expected " + like.shape_text());
  if (t.tensor.dtype != like.dtype) fail(op, t, "has another dtype than gate");
  if (t.tensor.device != like.device) fail(op, t, "lies on another device than gate");
  if (t.tensor.dtype == DType::f64 || t.tensor.dtype == DType::i64)
    fail(op, t, "has a dtype that the kernels do not take; expected float32, bfloat16 or float16");
  if (t.tensor.shape[1] > 1 && t.tensor.stride[1] != 1) fail(op, t, "must be contiguous in its last dimension");
  return {t.tensor.data, t.tensor.stride[0]};
}

inline Rows matrix_or_null(const char* op, const char* name, const MaybeTensor& t, const TensorRef& like) {
  return t ? matrix(op, {name, *t}, like) : Rows{nullptr, 0};
}

inline Activation activation_of(const char* op, int index) {
  if (index < 0 || index > static_cast<int>(Activation::relu))
    throw py::value_error(std::string(op) + ": unknown activation index " + std::to_string(index));
  return static_cast<Activation>(index);
}

// A [rows, cols] half-precision matrix that the fused kernels can read in 16-byte pieces, of x's dtype and device.
inline Rows pieces(const char* op, const Named& t, int64_t rows, int64_t cols, const TensorRef& x) {
  if (t.tensor.ndim != 2 || t.tensor.shape[0] != rows || t.tensor.shape[1] != cols)
    fail(op, t,
         "has shape " + t.tensor.shape_text() + "; expected [" + std::to_string(rows) + ", " + std::to_string(cols) +
             "]");
  if (t.tensor.dtype != x.dtype) fail(op, t, "has another dtype than x");
  if (t.tensor.device != x.device) fail(op, t, "lies on another device than x");
  const int64_t stride = rows > 1 ? t.tensor.stride[0] : cols;
  if (t.tensor.stride[1] != 1 || stride % 8 != 0 || reinterpret_cast<uintptr_t>(t.tensor.data) % 16 != 0)
    fail(op, t, "must be contiguous in its last dimension, with rows that begin at multiples of 16 bytes");
  return {t.tensor.data, stride};
}

inline Rows pieces_or_null(const char* op, const char* name, const MaybeTensor& t, int64_t rows, int64_t cols,
                           const TensorRef& x) {
  return t ? pieces(op, {name, *t}, rows, cols, x) : Rows{nullptr, 0};
}

// A contiguous vector of `size` elements on the CPU.
inline void* cpu_vector(const char* op, const Named& t, int64_t size, DType dtype) {
  if (t.tensor.ndim != 1 || t.tensor.shape[0] != size || t.tensor.dtype != dtype || !t.tensor.contiguous() ||
      t.tensor.device >= 0)
    fail(op, t, "must be a contiguous vector of " + std::to_string(size) + " elements on the CPU, of the right dtype");
  return t.tensor.data;
}

}  // namespace locas
