// What a tensor argument must be, said in one way: a ValueError names the op, the argument, its value and what was
// expected.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <bit>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <iterator>
#include <optional>
#include <string>
#include <type_traits>

#include "bindings/tensor_ref.h"
#include "common/activations.h"
#include "common/types.h"

namespace locas {

namespace py = pybind11;
using MaybeTensor = std::optional<TensorRef>;

struct Argument {
  const char* name;
  const TensorRef& tensor;
};

// The checks of one call of an op, in which one tensor, `like`, gives the others dtype and device.
//
// A pointer's type says which dtype is expected: float, double and int64_t their own, void that of `like`.
class Checker {
 public:
  Checker(const char* op, const Argument& like) : op_(op), like_(like) {}

  // The same op's checks, in which another tensor gives dtype and device.
  Checker with_like(const Argument& like) const { return {op_, like}; }

  [[noreturn]] void fail(const char* argument, const std::string& problem) const {
    throw py::value_error(std::string(op_) + ": " + argument + " " + problem);
  }
  [[noreturn]] void fail_shape(const Argument& a, const std::string& expected) const {
    fail(a.name, "has shape " + a.tensor.shape_text() + "; expected " + expected);
  }

  void like_has_dtype(std::initializer_list<DType> accepted) const { has_dtype(like_, accepted); }
  void like_is_on_cpu() const {
    if (like_.tensor.device >= 0) fail(like_.name, "lies on " + like_.tensor.device_text() + "; expected cpu");
  }

  void has_dtype(const Argument& a, std::initializer_list<DType> accepted) const {
    std::string names;  // "float32, bfloat16 or float16"
    for (const DType& dtype : accepted) {
      if (a.tensor.dtype == dtype) return;
      const bool last = &dtype + 1 == accepted.end();
      names += std::string(names.empty() ? "" : last ? " or " : ", ") + dtype_name(dtype);
    }
    fail(a.name, std::string("has dtype ") + dtype_name(a.tensor.dtype) + "; expected " + names);
  }

  void is_beside_like(const Argument& a) const {
    const TensorRef &t = a.tensor, &like = like_.tensor;
    if (t.device != like.device)
      fail(a.name,
           "lies on " + t.device_text() + "; expected " + like.device_text() + ", where " + like_.name + " lies");
  }

  // [rows, cols] of like's dtype and device, each row contiguous.
  Matrix matrix(const Argument& a, int64_t rows, int64_t cols) const {
    const TensorRef& t = a.tensor;
    has_shape(a, {rows, cols});
    has_type<void>(a);
    is_beside_like(a);
    if (cols > 1 && t.stride[1] != 1)
      fail(a.name, "has strides " + t.stride_text() + "; expected a contiguous last dimension, a stride of 1");
    return {t.data, rows, cols, t.stride[0]};
  }
  // The same, of which every row can be read in pieces of 16 bytes.
  Matrix pieces(const Argument& a, int64_t rows, int64_t cols) const {
    Matrix m = matrix(a, rows, cols);
    if (rows <= 1) m = {m.data, rows, cols, cols};  // the stride of a single row is anything
    const int64_t bytes = m.stride * a.tensor.element_size();
    if (rows * cols > 0 && (bytes % 16 != 0 || !begins_a_piece(a.tensor)))
      fail(a.name, "has rows of " + std::to_string(bytes) + " bytes from " + a.tensor.address_text() +
                       " on; expected rows that begin at multiples of 16 bytes");
    return m;
  }

  // A contiguous tensor of this shape on like's device.
  template <class T>
  T* contiguous(const Argument& a, std::initializer_list<int64_t> shape) const {
    has_shape(a, shape);
    has_type<T>(a);
    is_beside_like(a);
    is_contiguous(a);
    return static_cast<T*>(a.tensor.data);
  }
  template <class T>
  T* vector(const Argument& a, int64_t size) const {
    return contiguous<T>(a, {size});
  }
  // A contiguous tensor of another one's shape on like's device, as the rows of its last dimension.
  Matrix rows_of_any_dtype(const Argument& a, const Argument& shape) const {
    if (!a.tensor.same_shape(shape.tensor)) fail_shape(a, shape.tensor.shape_text() + ", the shape of " + shape.name);
    is_beside_like(a);
    is_contiguous(a);
    return a.tensor.as_rows();
  }
  template <class T>
  Matrix rows(const Argument& a, const Argument& shape) const {
    has_type<T>(a);
    return rows_of_any_dtype(a, shape);
  }

  // What may be None: the same, or null.
  Matrix matrix_or_null(const char* name, const MaybeTensor& t, int64_t rows, int64_t cols) const {
    return t ? matrix({name, *t}, rows, cols) : Matrix{};
  }
  Matrix pieces_or_null(const char* name, const MaybeTensor& t, int64_t rows, int64_t cols) const {
    return t ? pieces({name, *t}, rows, cols) : Matrix{};
  }
  template <class T>
  T* vector_or_null(const char* name, const MaybeTensor& t, int64_t size) const {
    return t ? vector<T>({name, *t}, size) : nullptr;
  }
  void both_or_none(const char* name, const MaybeTensor& t, const char* other_name, const MaybeTensor& other) const {
    if (t.has_value() == other.has_value()) return;
    fail(name, std::string(other ? "is None, but " : "is given, but ") + other_name +
                   (other ? " is given" : " is None") + "; expected both or none");
  }
  // A kernel's scratch memory; None will do where it needs none.
  float* workspace(const MaybeTensor& t, int64_t floats) const {
    if (floats == 0) return nullptr;
    if (!t) fail("workspace", "is None; expected a tensor of " + std::to_string(floats) + " float32");
    return vector<float>({"workspace", *t}, floats);
  }

  void begins_at_a_piece(const Argument& a) const {
    if (!begins_a_piece(a.tensor))
      fail(a.name, "begins at " + a.tensor.address_text() + "; expected a multiple of 16 bytes");
  }

  // A number as locas_ext/ops/activations.py makes them: an index, or bit 62 and the bits of xIELU's two positive numbers.
  Activation activation(int64_t number, ActivationParams& params) const {
    constexpr int64_t kXielu = int64_t{1} << 62;
    if (!(number & kXielu) || number < 0) return activation(number);
    params.positive = std::bit_cast<float>(static_cast<uint32_t>(number >> 31 & 0x7fffffff));
    params.negative = std::bit_cast<float>(static_cast<uint32_t>(number & 0x7fffffff));
    return Activation::xielu;
  }
  Activation activation(int64_t index) const {
    constexpr int count = std::size(kActivationNames);
    if (index < 0 || index >= count)
      fail("activation", "is " + std::to_string(index) + "; expected 0 to " + std::to_string(count - 1));
    return static_cast<Activation>(index);
  }

 private:
  static bool begins_a_piece(const TensorRef& t) { return reinterpret_cast<uintptr_t>(t.data) % 16 == 0; }

  void has_shape(const Argument& a, std::initializer_list<int64_t> shape) const {
    const TensorRef& t = a.tensor;
    if (t.ndim == static_cast<int>(shape.size()) && std::equal(shape.begin(), shape.end(), t.shape)) return;
    fail_shape(a, TensorRef::list_text(shape.begin(), static_cast<int>(shape.size())));
  }
  void is_contiguous(const Argument& a) const {
    if (!a.tensor.contiguous())
      fail(a.name, "has shape " + a.tensor.shape_text() + " and strides " + a.tensor.stride_text() +
                       "; expected a contiguous tensor");
  }
  template <class T>
  void has_type(const Argument& a) const {
    using Value = std::remove_const_t<T>;
    const TensorRef &t = a.tensor, &like = like_.tensor;
    if constexpr (std::is_same_v<Value, float>) has_dtype(a, {DType::f32});
    else if constexpr (std::is_same_v<Value, double>) has_dtype(a, {DType::f64});
    else if constexpr (std::is_same_v<Value, int64_t>) has_dtype(a, {DType::i64});
    else if (t.dtype != like.dtype)
      fail(a.name, std::string("has dtype ") + dtype_name(t.dtype) + "; expected " + dtype_name(like.dtype) +
                       ", the dtype of " + like_.name);
  }

  const char* op_;
  const Argument like_;
};

// A checker of one call over a matrix, which gives the others shape, dtype and device.
inline Checker matrix_checker(const char* op, const Argument& like) {
  const Checker check(op, like);
  if (like.tensor.ndim != 2) check.fail_shape(like, "[rows, cols]");
  check.like_has_dtype({DType::f32, DType::bf16, DType::f16});
  return check;
}

}  // namespace locas
