// Bindings of the whole FFN with memory: the fused kernels of the CPU.
#include "bindings/checks.h"
#include "bindings/ffn_tensors.h"
#include "bindings/module.h"
#include "common/ffn_params.h"
#include "cpu/kernels.h"

namespace locas {
namespace {

Rows cpu_matrix(const char* op, const Named& t, int64_t rows, int64_t cols, const TensorRef& x) {
  if (t.tensor.ndim != 2 || t.tensor.shape[0] != rows || t.tensor.shape[1] != cols)
    fail(op, t,
         "has shape " + t.tensor.shape_text() + "; expected [" + std::to_string(rows) + ", " + std::to_string(cols) +
             "]");
  if (t.tensor.dtype != x.dtype) fail(op, t, "has another dtype than x");
  if (t.tensor.device >= 0) fail(op, t, "must lie on the CPU");
  if (cols > 1 && t.tensor.stride[1] != 1) fail(op, t, "must be contiguous in its last dimension");
  return {t.tensor.data, t.tensor.stride[0]};
}

FfnWeights cpu_weights_of(const char* op, const FfnTensors& t, const TensorRef& x) {
  const cpu::GluFfnKernels* kernels = cpu::glu_ffn_kernels();
  if (!kernels) throw std::runtime_error(std::string(op) + ": needs a processor with AVX-512");
  if (x.dtype != DType::f32 && !(x.dtype == DType::bf16 && kernels->bf16))
    fail(op, {"x", x},
         "has a dtype that this processor has no products for; expected float32, or bfloat16 with AVX-512 BF16");
  if (x.ndim != 2) fail(op, {"x", x}, "has shape " + x.shape_text() + "; expected [tokens, d]");
  FfnWeights w;
  w.d = x.shape[1];
  w.m = t.gate.ndim == 2 ? t.gate.shape[0] : 0;
  w.r = t.value.ndim == 2 ? t.value.shape[0] : 0;
  if (x.dtype == DType::bf16 && (w.d % 2 || w.m % 2))
    fail(op, {"gate", t.gate}, "has shape " + t.gate.shape_text() + "; expected even sizes in bfloat16");
  w.gate = cpu_matrix(op, {"gate", t.gate}, w.m, w.d, x);
  w.up = cpu_matrix(op, {"up", t.up}, w.m, w.d, x);
  w.down = cpu_matrix(op, {"down", t.down}, w.d, w.m, x);
  const auto bias = [&](const char* name, const MaybeTensor& b, int64_t size) -> const void* {
    return b ? cpu_vector(op, {name, *b}, size, x.dtype) : nullptr;
  };
  w.gate_bias = bias("gate_bias", t.gate_bias, w.m);
  w.up_bias = bias("up_bias", t.up_bias, w.m);
  w.down_bias = bias("down_bias", t.down_bias, w.d);
  w.memory_gate = cpu_matrix(op, {"gate_key", t.gate_key}, 2 * w.r, w.d, x);
  const int64_t bytes = x.dtype == DType::f32 ? 4 : 2;
  w.memory_key = {static_cast<char*>(w.memory_gate.data) + bytes * w.r * w.memory_gate.stride, w.memory_gate.stride};
  w.memory_value = cpu_matrix(op, {"value", t.value}, w.r, w.d, x);
  return w;
}

// saved [2, tokens rounded up to 16, m + r] or, without the host's part, [.., .., r]; returns how many host neurons it
// holds.
int64_t saved_neurons(const char* op, const TensorRef& saved, const FfnWeights& w, const TensorRef& x) {
  const int64_t rows = (x.shape[0] + 15) / 16 * 16;
  if (saved.ndim != 3 || saved.shape[0] != 2 || saved.shape[1] != rows ||
      (saved.shape[2] != w.m + w.r && saved.shape[2] != w.r) || saved.dtype != x.dtype || !saved.contiguous() ||
      saved.device >= 0)
    fail(op, {"saved", saved},
         "has shape " + saved.shape_text() + "; expected contiguous [2, " + std::to_string(rows) + ", " +
             std::to_string(w.m + w.r) + " or " + std::to_string(w.r) + "] of x's dtype on the CPU");
  return saved.shape[2] - w.r;
}

void cpu_glu_ffn_forward(const TensorRef& x, const TensorRef& gate, const TensorRef& up, const TensorRef& down,
                         const MaybeTensor& gate_bias, const MaybeTensor& up_bias, const MaybeTensor& down_bias,
                         const TensorRef& gate_key, const TensorRef& value, const TensorRef& y,
                         const MaybeTensor& saved, int activation, float scale) {
  constexpr const char* op = "cpu_glu_ffn_forward";
  CpuGluFfnForwardParams p;
  p.weights = cpu_weights_of(op, {gate, up, down, gate_bias, up_bias, down_bias, gate_key, value}, x);
  p.tokens = x.shape[0];
  p.x = cpu_matrix(op, {"x", x}, p.tokens, p.weights.d, x);
  p.y = cpu_matrix(op, {"y", y}, p.tokens, p.weights.d, x);
  p.saved = saved ? saved->data : nullptr;
  p.saved_m = saved ? saved_neurons(op, *saved, p.weights, x) : 0;
  p.scale = scale;
  p.activation = activation_of(op, activation);
  p.dtype = x.dtype;
  const py::gil_scoped_release released;
  cpu::glu_ffn_kernels()->forward(p);
}

void cpu_glu_ffn_backward(const TensorRef& dy, const TensorRef& x, const TensorRef& saved, const TensorRef& gate,
                          const TensorRef& up, const TensorRef& down, const TensorRef& gate_key, const TensorRef& value,
                          const MaybeTensor& dx, const TensorRef& slots_grad, int activation, float scale) {
  constexpr const char* op = "cpu_glu_ffn_backward";
  CpuGluFfnBackwardParams p;
  const MaybeTensor none;
  p.weights = cpu_weights_of(op, {gate, up, down, none, none, none, gate_key, value}, x);
  const FfnWeights& w = p.weights;
  p.tokens = x.shape[0];
  p.dy = cpu_matrix(op, {"dy", dy}, p.tokens, w.d, x);
  p.x = cpu_matrix(op, {"x", x}, p.tokens, w.d, x);
  p.dx = dx ? cpu_matrix(op, {"dx", *dx}, p.tokens, w.d, x) : Rows{nullptr, 0};
  p.saved = saved.data;
  p.saved_m = saved_neurons(op, saved, w, x);
  if (dx && p.saved_m != w.m) fail(op, {"saved", saved}, "lacks the host's part, which dx needs");
  if (slots_grad.ndim != 3 || slots_grad.shape[0] != 3 || slots_grad.shape[1] != w.r || slots_grad.shape[2] != w.d ||
      slots_grad.dtype != DType::f32 || slots_grad.device >= 0 || !slots_grad.contiguous())
    fail(op, {"slots_grad", slots_grad}, "must be contiguous float32 [3, r, d] on the CPU");
  p.slots_grad = static_cast<float*>(slots_grad.data);
  p.scale = scale;
  p.activation = activation_of(op, activation);
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
