// Bindings of the whole FFN with memory: the fused kernels of CUDA.
#include "bindings/checks.h"
#include "bindings/dispatch.h"
#include "bindings/ffn_tensors.h"
#include "bindings/module.h"
#include "common/ffn_params.h"

namespace locas {
namespace {

const void* bias_of(const char* op, const char* name, const MaybeTensor& t, int64_t size, const TensorRef& x) {
  if (!t) return nullptr;
  if (t->ndim != 1 || t->shape[0] != size || t->dtype != x.dtype || t->device != x.device || !t->contiguous() ||
      reinterpret_cast<uintptr_t>(t->data) % 16 != 0)
    fail(op, {name, *t},
         "must be a contiguous vector of " + std::to_string(size) + " elements, of x's dtype and device");
  return t->data;
}

float* workspace_of(const char* op, const MaybeTensor& t, int64_t floats, const TensorRef& x) {
  if (floats == 0) return nullptr;
  if (!t || t->dtype != DType::f32 || t->device != x.device || !t->contiguous() || t->numel() < floats)
    throw py::value_error(std::string(op) + ": workspace must hold " + std::to_string(floats) +
                          " float32 on x's device");
  return static_cast<float*>(t->data);
}

FfnWeights weights_of(const char* op, const FfnTensors& t, const TensorRef& x) {
  if (x.dtype != DType::bf16 && x.dtype != DType::f16) fail(op, {"x", x}, "must be bfloat16 or float16");
  if (x.ndim != 2) fail(op, {"x", x}, "has shape " + x.shape_text() + "; expected [tokens, d]");
  FfnWeights w;
  w.d = x.shape[1];
  w.m = t.gate.ndim == 2 ? t.gate.shape[0] : 0;
  w.r = t.value.ndim == 2 ? t.value.shape[0] : 0;
  if (w.d % 8 != 0 || w.m % 8 != 0 || w.m == 0 || w.d == 0)
    fail(op, {"gate", t.gate}, "has shape " + t.gate.shape_text() + "; expected [m, d], multiples of 8");
  w.gate = pieces(op, {"gate", t.gate}, w.m, w.d, x);
  w.up = pieces(op, {"up", t.up}, w.m, w.d, x);
  w.down = pieces(op, {"down", t.down}, w.d, w.m, x);
  w.gate_bias = bias_of(op, "gate_bias", t.gate_bias, w.m, x);
  w.up_bias = bias_of(op, "up_bias", t.up_bias, w.m, x);
  w.down_bias = bias_of(op, "down_bias", t.down_bias, w.d, x);
  const Rows gate_key = pieces(op, {"gate_key", t.gate_key}, 2 * w.r, w.d, x);
  w.memory_gate = gate_key;
  w.memory_key = {static_cast<char*>(gate_key.data) + 2 * w.r * gate_key.stride, gate_key.stride};
  w.memory_value = pieces(op, {"value", t.value}, w.r, w.d, x);
  return w;
}

// Floats of workspace that the CUDA kernels need; a build without them needs none.
#ifdef LOCAS_WITH_CUDA
FfnWeights sizes(int64_t d, int64_t m, int64_t r) {
  FfnWeights w{};
  w.d = d, w.m = m, w.r = r;
  return w;
}
int64_t glu_ffn_forward_workspace(int64_t tokens, int64_t d, int64_t m, int64_t r) {
  return cuda::glu_ffn_forward_workspace(tokens, sizes(d, m, r));
}
int64_t glu_ffn_backward_workspace(int64_t tokens, int64_t d, int64_t m, int64_t r) {
  return cuda::glu_ffn_backward_workspace(tokens, sizes(d, m, r));
}
int64_t neuron_importance_workspace(int64_t tokens, int64_t m) { return cuda::neuron_importance_workspace(tokens, m); }
#else
int64_t glu_ffn_forward_workspace(int64_t, int64_t, int64_t, int64_t) { return 0; }
int64_t glu_ffn_backward_workspace(int64_t, int64_t, int64_t, int64_t) { return 0; }
int64_t neuron_importance_workspace(int64_t, int64_t) { return 0; }
#endif

void glu_ffn_forward(const TensorRef& x, const TensorRef& gate, const TensorRef& up, const TensorRef& down,
                     const MaybeTensor& gate_bias, const MaybeTensor& up_bias, const MaybeTensor& down_bias,
                     const TensorRef& gate_key, const TensorRef& value, const TensorRef& hidden,
                     const MaybeTensor& gate_out, const MaybeTensor& up_out, const TensorRef& y,
                     const MaybeTensor& workspace, int activation, float scale, uintptr_t stream) {
  constexpr const char* op = "glu_ffn_forward";
  GluFfnForwardParams p;
  p.weights = weights_of(op, {gate, up, down, gate_bias, up_bias, down_bias, gate_key, value}, x);
  p.tokens = x.shape[0];
  const int64_t width = p.weights.m + p.weights.padded_r();
  p.x = pieces(op, {"x", x}, p.tokens, p.weights.d, x);
  p.hidden = pieces(op, {"hidden", hidden}, p.tokens, width, x);
  p.gate = pieces_or_null(op, "gate_out", gate_out, p.tokens, width, x);
  p.up = pieces_or_null(op, "up_out", up_out, p.tokens, width, x);
  p.y = pieces(op, {"y", y}, p.tokens, p.weights.d, x);
  p.workspace =
      workspace_of(op, workspace, glu_ffn_forward_workspace(p.tokens, p.weights.d, p.weights.m, p.weights.r), x);
  p.scale = scale;
  p.activation = activation_of(op, activation);
  p.dtype = x.dtype;
  if (p.tokens == 0) return;
  LOCAS_LAUNCH_CUDA(glu_ffn_forward, x, stream, p);
}

void glu_ffn_backward(const TensorRef& dy, const TensorRef& x, const TensorRef& gate, const TensorRef& up,
                      const TensorRef& down, const MaybeTensor& gate_bias, const MaybeTensor& up_bias,
                      const MaybeTensor& down_bias, const TensorRef& gate_key, const TensorRef& value,
                      const TensorRef& gate_saved, const TensorRef& up_saved, const TensorRef& d_gate,
                      const TensorRef& d_up, const TensorRef& memory_hidden, const MaybeTensor& dx,
                      const MaybeTensor& slots_grad, const MaybeTensor& workspace, int activation, float scale,
                      uintptr_t stream) {
  constexpr const char* op = "glu_ffn_backward";
  GluFfnBackwardParams p;
  p.weights = weights_of(op, {gate, up, down, gate_bias, up_bias, down_bias, gate_key, value}, x);
  const FfnWeights& w = p.weights;
  p.tokens = x.shape[0];
  const int64_t width = w.m + w.padded_r();
  p.x = pieces(op, {"x", x}, p.tokens, w.d, x);
  p.dy = pieces(op, {"dy", dy}, p.tokens, w.d, x);
  p.gate = pieces(op, {"gate_saved", gate_saved}, p.tokens, width, x);
  p.up = pieces(op, {"up_saved", up_saved}, p.tokens, width, x);
  p.d_gate = pieces(op, {"d_gate", d_gate}, p.tokens, width, x);
  p.d_up = pieces(op, {"d_up", d_up}, p.tokens, width, x);
  p.memory_hidden = pieces(op, {"memory_hidden", memory_hidden}, p.tokens, w.padded_r(), x);
  p.dx = pieces_or_null(op, "dx", dx, p.tokens, w.d, x);
  p.slots_grad = nullptr;
  if (slots_grad) {
    if (slots_grad->ndim != 3 || slots_grad->shape[0] != 3 || slots_grad->shape[1] != w.r ||
        slots_grad->shape[2] != w.d || slots_grad->dtype != DType::f32 || slots_grad->device != x.device ||
        !slots_grad->contiguous() || reinterpret_cast<uintptr_t>(slots_grad->data) % 16 != 0)
      fail(op, {"slots_grad", *slots_grad}, "must be contiguous float32 [3, r, d] on x's device");
    p.slots_grad = static_cast<float*>(slots_grad->data);
  }
  p.workspace = workspace_of(op, workspace, dx ? glu_ffn_backward_workspace(p.tokens, w.d, w.m, w.r) : 0, x);
  p.scale = scale;
  p.activation = activation_of(op, activation);
  p.dtype = x.dtype;
  if (p.tokens == 0) return;
  LOCAS_LAUNCH_CUDA(glu_ffn_backward, x, stream, p);
}

void neuron_importance(const TensorRef& x, const TensorRef& gate, const TensorRef& up, const MaybeTensor& gate_bias,
                       const MaybeTensor& up_bias, const TensorRef& out, const MaybeTensor& workspace, int activation,
                       uintptr_t stream) {
  constexpr const char* op = "neuron_importance";
  if (x.dtype != DType::bf16 && x.dtype != DType::f16) fail(op, {"x", x}, "must be bfloat16 or float16");
  if (x.ndim != 2 || x.shape[0] == 0) fail(op, {"x", x}, "has shape " + x.shape_text() + "; expected [tokens, d]");
  NeuronImportanceParams p{};
  FfnWeights& w = p.weights;
  p.tokens = x.shape[0];
  w.d = x.shape[1];
  w.m = gate.ndim == 2 ? gate.shape[0] : 0;
  if (w.d % 8 != 0 || w.m % 8 != 0) fail(op, {"gate", gate}, "must have sizes that are multiples of 8");
  p.x = pieces(op, {"x", x}, p.tokens, w.d, x);
  w.gate = pieces(op, {"gate", gate}, w.m, w.d, x);
  w.up = pieces(op, {"up", up}, w.m, w.d, x);
  w.gate_bias = bias_of(op, "gate_bias", gate_bias, w.m, x);
  w.up_bias = bias_of(op, "up_bias", up_bias, w.m, x);
  if (out.ndim != 1 || out.shape[0] != w.m || out.dtype != DType::f32 || !out.contiguous() || out.device != x.device)
    fail(op, {"out", out}, "must be a contiguous float32 vector of one element per neuron, on x's device");
  p.importance = static_cast<float*>(out.data);
  p.workspace = workspace_of(op, workspace, neuron_importance_workspace(p.tokens, w.m), x);
  p.activation = activation_of(op, activation);
  p.dtype = x.dtype;
  LOCAS_LAUNCH_CUDA(neuron_importance, x, stream, p);
}

}  // namespace

void bind_ffn_cuda(py::module_& m) {
  m.def("glu_ffn_forward", &glu_ffn_forward, py::arg("x"), py::arg("gate"), py::arg("up"), py::arg("down"),
        py::arg("gate_bias"), py::arg("up_bias"), py::arg("down_bias"), py::arg("gate_key"), py::arg("value"),
        py::arg("hidden"), py::arg("gate_out"), py::arg("up_out"), py::arg("y"), py::arg("workspace"),
        py::arg("activation"), py::arg("scale"), py::arg("stream"));
  m.def("glu_ffn_backward", &glu_ffn_backward, py::arg("dy"), py::arg("x"), py::arg("gate"), py::arg("up"),
        py::arg("down"), py::arg("gate_bias"), py::arg("up_bias"), py::arg("down_bias"), py::arg("gate_key"),
        py::arg("value"), py::arg("gate_saved"), py::arg("up_saved"), py::arg("d_gate"), py::arg("d_up"),
        py::arg("memory_hidden"), py::arg("dx"), py::arg("slots_grad"), py::arg("workspace"), py::arg("activation"),
        py::arg("scale"), py::arg("stream"));
  m.def("neuron_importance", &neuron_importance, py::arg("x"), py::arg("gate"), py::arg("up"), py::arg("gate_bias"),
        py::arg("up_bias"), py::arg("out"), py::arg("workspace"), py::arg("activation"), py::arg("stream"));
  m.def("glu_ffn_forward_workspace", &glu_ffn_forward_workspace, py::arg("tokens"), py::arg("d"), py::arg("m"),
        py::arg("r"));
  m.def("glu_ffn_backward_workspace", &glu_ffn_backward_workspace, py::arg("tokens"), py::arg("d"), py::arg("m"),
        py::arg("r"));
  m.def("neuron_importance_workspace", &neuron_importance_workspace, py::arg("tokens"), py::arg("m"));
}

}  // namespace locas
