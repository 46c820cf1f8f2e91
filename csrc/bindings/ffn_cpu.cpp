// Bindings of the whole FFN with memory: the fused kernels of the CPU.
#include "bindings/checks.h"
#include "bindings/ffn_tensors.h"
#include "bindings/module.h"
#include "common/ffn_params.h"
#include "cpu/kernels.h"

namespace locas {
namespace {

// A checker of one call that x gives dtype and device.
Checker cpu_checker(const char* op, const TensorRef& x) {
  const cpu::GluFfnKernels* kernels = cpu::glu_ffn_kernels();
  if (!kernels) throw std::runtime_error(std::string(op) + ": needs a processor with AVX-512");
  const Checker check(op, {"x", x});
  check.like_is_on_cpu();
  if (kernels->bf16) check_x(check, x, {DType::f32, DType::bf16});
  else check_x(check, x, {DType::f32});
  return check;
}

FfnWeights cpu_weights_of(const Checker& check, const FfnTensors& t, const TensorRef& x) {
  const FfnSizes s = ffn_sizes(x, t.gate, t.value);
  if (x.dtype == DType::bf16 && (s.d % 2 || s.m % 2)) check.fail_shape({"gate", t.gate}, "[m, d], even in bfloat16");
  FfnWeights w;
  w.gate = check.matrix({"gate", t.gate}, s.m, s.d);
  w.up = check.matrix({"up", t.up}, s.m, s.d);
  w.down = check.matrix({"down", t.down}, s.d, s.m);
  w.gate_bias = check.vector_or_null<const void>("gate_bias", t.gate_bias, s.m);
  w.up_bias = check.vector_or_null<const void>("up_bias", t.up_bias, s.m);
  w.down_bias = check.vector_or_null<const void>("down_bias", t.down_bias, s.d);
  const GateAndKey rows = split(check.matrix({"gate_key", t.gate_key}, 2 * s.r, s.d), x.element_size());
  w.memory_gate = rows.gate;
  w.memory_key = rows.key;
  w.memory_value = check.matrix({"value", t.value}, s.r, s.d);
  return w;
}

// saved [2, tokens rounded up, m + r] or, without the host's part, [2, tokens rounded up, r]; returns how many host
// neurons it holds.
int64_t saved_neurons(const Checker& check, const TensorRef& saved, const FfnSizes& s, const TensorRef& x) {
  const int64_t tokens = (x.shape[0] + kCpuTokenMultiple - 1) / kCpuTokenMultiple * kCpuTokenMultiple;
  const bool memory_only = saved.ndim == 3 && saved.shape[2] == s.r;
  if (!memory_only && (saved.ndim != 3 || saved.shape[2] != s.m + s.r))
    check.fail_shape({"saved", saved}, "[2, " + std::to_string(tokens) + ", " + std::to_string(s.m + s.r) + " or " +
                                           std::to_string(s.r) + "]");
  check.contiguous<void>({"saved", saved}, {2, tokens, saved.shape[2]});
  return saved.shape[2] - s.r;
}

void cpu_glu_ffn_forward(const TensorRef& x, const TensorRef& gate, const TensorRef& up, const TensorRef& down,
                         const MaybeTensor& gate_bias, const MaybeTensor& up_bias, const MaybeTensor& down_bias,
                         const TensorRef& gate_key, const TensorRef& value, const TensorRef& y,
                         const MaybeTensor& saved, int64_t activation, float scale) {
  const Checker check = cpu_checker("cpu_glu_ffn_forward", x);
  CpuGluFfnForwardParams p;
  p.weights = cpu_weights_of(check, {gate, up, down, gate_bias, up_bias, down_bias, gate_key, value}, x);
  const FfnSizes s = p.weights.sizes();
  p.x = check.matrix({"x", x}, x.shape[0], s.d);
  p.y = check.matrix({"y", y}, x.shape[0], s.d);
  p.saved = saved ? saved->data : nullptr;
  p.saved_m = saved ? saved_neurons(check, *saved, s, x) : 0;
  p.scale = scale;
  p.activation = check.activation(activation);
  p.dtype = x.dtype;
  const py::gil_scoped_release released;
  cpu::glu_ffn_kernels()->forward(p);
}

void cpu_glu_ffn_backward(const TensorRef& dy, const TensorRef& x, const TensorRef& saved, const TensorRef& gate,
                          const TensorRef& up, const TensorRef& down, const TensorRef& gate_key, const TensorRef& value,
                          const MaybeTensor& dx, const TensorRef& slots_grad, int64_t activation, float scale) {
  const Checker check = cpu_checker("cpu_glu_ffn_backward", x);
  const MaybeTensor none;
  CpuGluFfnBackwardParams p;
  p.weights = cpu_weights_of(check, {gate, up, down, none, none, none, gate_key, value}, x);
  const FfnSizes s = p.weights.sizes();
  p.dy = check.matrix({"dy", dy}, x.shape[0], s.d);
  p.x = check.matrix({"x", x}, x.shape[0], s.d);
  p.dx = check.matrix_or_null("dx", dx, x.shape[0], s.d);
  p.saved = saved.data;
  p.saved_m = saved_neurons(check, saved, s, x);
  if (dx && p.saved_m != s.m)
    check.fail_shape({"saved", saved}, "the host's " + std::to_string(s.m) + " neurons in it too, as dx is given");
  p.slots_grad = slots_grad_rows(check, slots_grad, s);
  p.scale = scale;
  p.activation = check.activation(activation);
  p.dtype = x.dtype;
  const py::gil_scoped_release released;
  cpu::glu_ffn_kernels()->backward(p);
}

}  // namespace

void bind_ffn_cpu(py::module_& m) {
  m.def("cpu_glu_ffn_forward", &cpu_glu_ffn_forward, py::arg("x"), py::arg("gate"), py::arg("up"), py::arg("down"),
        py::arg("gate_bias"), py::arg("up_bias"), py::arg("down_bias"), py::arg("gate_key"), py::arg("value"),
        py::arg("y"), py::arg("saved"), py::arg("activation"), py::arg("scale"));
  m.def("cpu_glu_ffn_backward", &cpu_glu_ffn_backward, py::arg("dy"), py::arg("x"), py::arg("saved"), py::arg("gate"),
        py::arg("up"), py::arg("down"), py::arg("gate_key"), py::arg("value"), py::arg("dx"), py::arg("slots_grad"),
        py::arg("activation"), py::arg("scale"));
}

}  // namespace locas
