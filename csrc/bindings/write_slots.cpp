// Binding of closed-form writing into slots.
#include "bindings/checks.h"
#include "bindings/dispatch.h"
#include "bindings/module.h"
#include "bindings/slot_checks.h"
#include "common/slot_params.h"

namespace locas {
namespace {

// A contiguous tensor of `size` elements on the slots' device.
void* buffer(const char* op, const Named& t, int64_t size, DType dtype, const TensorRef& slots) {
  if (t.tensor.numel() != size || t.tensor.dtype != dtype || !t.tensor.contiguous() || t.tensor.device != slots.device)
    fail(op, t,
         "has shape " + t.tensor.shape_text() + "; expected " + std::to_string(size) +
             " contiguous elements of the right dtype, on slots' device");
  return t.tensor.data;
}

void write_slots(const TensorRef& slots, int64_t start, const TensorRef& inputs, const TensorRef& gradients,
                 double epsilon, const MaybeTensor& compute, const MaybeTensor& gradient_norm, const TensorRef& norms,
                 const TensorRef& workspace, uintptr_t stream) {
  constexpr const char* op = "write_slots";
  WriteSlotsParams p{};
  p.slots = slot_state(op, {"slots", slots}, slots);
  p.compute = compute_copy(op, compute, slots);
  p.compute_dtype = compute ? compute->dtype : DType::f32;
  if (slots.ndim != 4 || slots.shape[1] != 2)
    fail(op, {"slots", slots}, "has shape " + slots.shape_text() + "; expected [L, 2, capacity, d]");
  if (inputs.ndim != 3 || inputs.shape[0] != slots.shape[0] || inputs.shape[2] != slots.shape[3])
    fail(op, {"inputs", inputs}, "has shape " + inputs.shape_text() + "; expected [L, n, d] of the slots' L and d");
  if (inputs.dtype == DType::f64 || inputs.dtype == DType::i64)
    fail(op, {"inputs", inputs}, "must be float32, bfloat16 or float16");
  p.layers = slots.shape[0];
  p.capacity = slots.shape[2];
  p.d = slots.shape[3];
  p.tokens = inputs.shape[1];
  p.start = start;
  if (start < 0 || start > p.capacity - p.tokens)
    throw py::value_error("write_slots: start is " + std::to_string(start) + "; the rows do not fit");
  p.dtype = inputs.dtype;
  p.epsilon = epsilon;
  p.inputs = buffer(op, {"inputs", inputs}, inputs.numel(), p.dtype, slots);
  p.gradients = buffer(op, {"gradients", gradients}, inputs.numel(), p.dtype, slots);
  if (gradient_norm)
    p.gradient_norms =
        static_cast<const float*>(buffer(op, {"gradient_norm", *gradient_norm}, p.tokens, DType::f32, slots));
  p.norms = static_cast<float*>(buffer(op, {"norms", norms}, p.tokens, DType::f32, slots));
  p.workspace = static_cast<double*>(buffer(op, {"workspace", workspace}, p.workspace_size(), DType::f64, slots));
  LOCAS_DISPATCH(write_slots, p, slots.device, stream);
}

}  // namespace

void bind_write_slots(py::module_& m) {
  m.def("write_slots", &write_slots, py::arg("slots"), py::arg("start"), py::arg("inputs"), py::arg("gradients"),
        py::arg("epsilon"), py::arg("compute"), py::arg("gradient_norm"), py::arg("norms"), py::arg("workspace"),
        py::arg("stream"));
}

}  // namespace locas
