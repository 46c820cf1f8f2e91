// Binding of closed-form writing into slots.
#include "bindings/checks.h"
#include "bindings/dispatch.h"
#include "bindings/module.h"
#include "bindings/slot_checks.h"
#include "common/slot_params.h"

namespace locas {
namespace {

int64_t write_slots_workspace(int64_t layers, int64_t tokens) {
  return WriteSlotsParams::workspace_size(layers, tokens);
}

void write_slots(const TensorRef& slots, int64_t start, const TensorRef& inputs, const TensorRef& gradients,
                 double epsilon, const MaybeTensor& compute, const MaybeTensor& gradient_norm, const TensorRef& norms,
                 const TensorRef& workspace, uintptr_t stream) {
  constexpr const char* op = "write_slots_";  // the public op, which leaves these checks to its kernels
  const Checker check = slots_checker(op, slots);
  if (slots.ndim != 4 || slots.shape[1] != 2) check.fail_shape({"slots", slots}, "[layers, 2, capacity, d]");
  WriteSlotsParams p{};
  p.layers = slots.shape[0];
  p.capacity = slots.shape[2];
  if (inputs.ndim != 3 || inputs.shape[0] != p.layers || inputs.shape[2] != slots.shape[3])
    check.fail_shape({"inputs", inputs},
                     "[" + std::to_string(p.layers) + ", tokens, " + std::to_string(slots.shape[3]) + "]");
  p.tokens = inputs.shape[1];
  p.start = start;
  if (start < 0 || start > p.capacity - p.tokens)
    check.fail("start", "is " + std::to_string(start) + "; expected at least 0, and room for " +
                            std::to_string(p.tokens) + " tokens in the capacity of " + std::to_string(p.capacity));
  check.has_dtype({"inputs", inputs}, {DType::f32, DType::bf16, DType::f16});
  // Inputs and gradients have a dtype of their own, and lie where the slots lie.
  const Checker of_inputs(op, {"inputs", inputs});
  p.inputs = check.rows_of_any_dtype({"inputs", inputs}, {"inputs", inputs});
  p.gradients = of_inputs.rows<const void>({"gradients", gradients}, {"inputs", inputs});
  p.slots = slots.as_rows();
  p.compute = compute_copy(check, compute, slots);
  p.gradient_norms = check.vector_or_null<const float>("gradient_norm", gradient_norm, p.tokens);
  p.norms = check.vector<float>({"norms", norms}, p.tokens);
  p.workspace = check.vector<double>({"workspace", workspace}, write_slots_workspace(p.layers, p.tokens));
  check_apart(check, {{"slots", &slots}, part("compute", compute)},
              {{"inputs", &inputs}, {"gradients", &gradients}, part("gradient_norm", gradient_norm)});
  p.epsilon = epsilon;
  p.dtype = inputs.dtype;
  p.compute_dtype = dtype_of_copy(compute);
  LOCAS_DISPATCH(write_slots, p, slots.device, stream);
}

}  // namespace

void bind_write_slots(py::module_& m) {
  m.def("write_slots", &write_slots, py::arg("slots"), py::arg("start"), py::arg("inputs"), py::arg("gradients"),
        py::arg("epsilon"), py::arg("compute"), py::arg("gradient_norm"), py::arg("norms"), py::arg("workspace"),
        py::arg("stream"));
  m.def("write_slots_workspace", &write_slots_workspace, py::arg("layers"), py::arg("tokens"));
}

}  // namespace locas
