// A torch.Tensor as pointer, shape, strides, dtype and device, read through its Python attributes: the core needs no
// torch header and one build serves every torch.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "common/types.h"

namespace locas {

constexpr const char* dtype_name(DType dtype) {
  switch (dtype) {
    case DType::f32: return "float32";
    case DType::bf16: return "bfloat16";
    case DType::f16: return "float16";
    case DType::f64: return "float64";
    default: return "int64";
  }
}

struct TensorRef {
  static constexpr int kMaxDims = 8;
  void* data = nullptr;
  int ndim = 0;
  int64_t shape[kMaxDims] = {};
  int64_t stride[kMaxDims] = {};  // in elements
  DType dtype = DType::f32;
  int device = -1;  // -1: CPU; else the CUDA device index

  int64_t numel() const {
    int64_t n = 1;
    for (int i = 0; i < ndim; ++i) n *= shape[i];
    return n;
  }
  bool contiguous() const {
    if (numel() == 0) return true;
    int64_t expected = 1;
    for (int i = ndim - 1; i >= 0; --i) {
      if (shape[i] != 1 && stride[i] != expected) return false;
      expected *= shape[i];
    }
    return true;
  }
  bool same_shape(const TensorRef& other) const {
    if (ndim != other.ndim) return false;
    for (int i = 0; i < ndim; ++i)
      if (shape[i] != other.shape[i]) return false;
    return true;
  }
  int64_t element_size() const { return dtype == DType::bf16 || dtype == DType::f16 ? 2 : dtype == DType::f32 ? 4 : 8; }
  // A contiguous tensor as the rows of its last dimension.
  Matrix as_rows() const {
    const int64_t cols = ndim > 0 ? shape[ndim - 1] : 0;
    return {data, cols == 0 ? 0 : numel() / cols, cols, cols};
  }

  // For messages.
  std::string shape_text() const { return list_text(shape, ndim); }
  std::string stride_text() const { return list_text(stride, ndim); }
  std::string device_text() const { return device < 0 ? "cpu" : "cuda:" + std::to_string(device); }
  std::string address_text() const {
    return "address 16 n + " + std::to_string(reinterpret_cast<uintptr_t>(data) % 16);
  }
  static std::string list_text(const int64_t* values, int count) {
    std::string text = "[";
    for (int i = 0; i < count; ++i) text += (i ? ", " : "") + std::to_string(values[i]);
    return text + "]";
  }
};

// The torch objects compared against, looked up once.
class TorchTypes {
 public:
  static const TorchTypes& get() {
    static const TorchTypes types;
    return types;
  }
  PyObject *tensor, *data_ptr, *shape, *stride, *dtype, *get_device, *is_cpu, *is_cuda, *is_neg;
  PyObject *f32, *bf16, *f16, *f64, *i64;

 private:
  TorchTypes() {
    // Held for the life of the process, as the interpreter may be gone when statics are destroyed.
    const pybind11::module_ torch = pybind11::module_::import("torch");
    const auto held = [&](const char* name) { return pybind11::object(torch.attr(name)).release().ptr(); };
    tensor = held("Tensor");
    f32 = held("float32");
    bf16 = held("bfloat16");
    f16 = held("float16");
    f64 = held("float64");
    i64 = held("int64");
    data_ptr = PyUnicode_InternFromString("data_ptr");
    shape = PyUnicode_InternFromString("shape");
    stride = PyUnicode_InternFromString("stride");
    dtype = PyUnicode_InternFromString("dtype");
    get_device = PyUnicode_InternFromString("get_device");
    is_cpu = PyUnicode_InternFromString("is_cpu");
    is_cuda = PyUnicode_InternFromString("is_cuda");
    is_neg = PyUnicode_InternFromString("is_neg");
  }
};

}  // namespace locas

namespace pybind11::detail {

template <>
struct type_caster<locas::TensorRef> {
  PYBIND11_TYPE_CASTER(locas::TensorRef, const_name("torch.Tensor"));

  bool load(handle source, bool) {
    const auto& torch = locas::TorchTypes::get();
    const int is_tensor = PyObject_IsInstance(source.ptr(), torch.tensor);
    if (is_tensor < 0) throw error_already_set();
    if (!is_tensor) return false;
    try {
      read_shape(source);
      read_dtype(source);
      read_device(source);
      read_address(source);
    } catch (error_already_set& error) {  // torch's own refusal, of a sparse or a traced tensor for example
      raise_from(error, PyExc_ValueError, (name_of(source) + expected).c_str());
      throw error_already_set();
    }
    return true;
  }

 private:
  static constexpr const char* expected =
      " cannot be read by the kernels; expected a plain tensor with its numbers in memory";

  static std::string name_of(handle source) {
    return std::string("a tensor of type ") + Py_TYPE(source.ptr())->tp_name;
  }
  static object attribute(handle source, PyObject* name) {
    PyObject* result = PyObject_GetAttr(source.ptr(), name);
    if (!result) throw error_already_set();
    return reinterpret_steal<object>(result);
  }
  static object call(handle source, PyObject* name) {
    PyObject* result = PyObject_CallMethodNoArgs(source.ptr(), name);
    if (!result) throw error_already_set();
    return reinterpret_steal<object>(result);
  }

  void read_shape(handle source) {
    const auto& torch = locas::TorchTypes::get();
    const object shape = attribute(source, torch.shape), stride = call(source, torch.stride);
    const Py_ssize_t ndim = PyTuple_GET_SIZE(shape.ptr());
    if (ndim > locas::TensorRef::kMaxDims)
      throw value_error("a tensor of " + std::to_string(ndim) + " dimensions; at most 8 are taken");
    value.ndim = static_cast<int>(ndim);
    for (Py_ssize_t i = 0; i < ndim; ++i) {
      value.shape[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(shape.ptr(), i));
      value.stride[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(stride.ptr(), i));
    }
    if (PyErr_Occurred()) throw error_already_set();
  }

  void read_dtype(handle source) {
    const auto& torch = locas::TorchTypes::get();
    const object dtype = attribute(source, torch.dtype);
    if (dtype.ptr() == torch.f32) value.dtype = locas::DType::f32;
    else if (dtype.ptr() == torch.bf16) value.dtype = locas::DType::bf16;
    else if (dtype.ptr() == torch.f16) value.dtype = locas::DType::f16;
    else if (dtype.ptr() == torch.f64) value.dtype = locas::DType::f64;
    else if (dtype.ptr() == torch.i64) value.dtype = locas::DType::i64;
    else throw value_error("dtype " + str(dtype).cast<std::string>() + " is not taken by the kernels");
  }

  void read_device(handle source) {
    const auto& torch = locas::TorchTypes::get();
    if (attribute(source, torch.is_cpu).ptr() == Py_True) value.device = -1;
    else if (attribute(source, torch.is_cuda).ptr() == Py_True)
      value.device = call(source, torch.get_device).cast<int>();
    else
      throw value_error("a tensor on device " + str(source.attr("device")).cast<std::string>() +
                        "; the kernels take cpu and cuda tensors");
  }

  // A fake, functional or wrapped tensor has elements and no address; a negated view has the numbers of another one.
  void read_address(handle source) {
    const auto& torch = locas::TorchTypes::get();
    const object address = call(source, torch.data_ptr);
    value.data = reinterpret_cast<void*>(static_cast<uintptr_t>(PyLong_AsUnsignedLongLong(address.ptr())));
    if (PyErr_Occurred()) throw error_already_set();
    if (!value.data && value.numel() > 0)
      throw value_error(name_of(source) + ", shape " + value.shape_text() + ", has no data, and so" + expected);
    if (call(source, torch.is_neg).ptr() == Py_True)
      throw value_error(name_of(source) + " is a negated view; expected its resolve_neg()");
  }
};

}  // namespace pybind11::detail
