// Bindings of the whole FFN with memory: the fused kernels of CUDA.
#include "bindings/checks.h"
#include "bindings/dispatch.h"
#include "bindings/ffn_tensors.h"
#include "bindings/module.h"
#include "common/ffn_params.h"

namespace locas {
namespace {

// Contiguous, beginning at a multiple of 16 bytes; null for None.
const void* bias_of(const Checker& check, const char* name, const MaybeTensor& t, int64_t size) {
  const void* data = check.vector_or_null<const void>(name, t, size);
  if (t) check.begins_at_a_piece({name, *t});
  return data;
}

FfnWeights weights_of(const Checker& check, const FfnTensors& t, const TensorRef& x) {
  check_x(check, x, {DType::bf16, DType::f16});
  const FfnSizes s = ffn_sizes(x, t.gate, t.value);
  if (s.d % kPieceElements != 0 || s.m % kPieceElements != 0 || s.m == 0 || s.d == 0)
    check.fail_shape({"gate", t.gate}, "[m, d], multiples of " + std::to_string(kPieceElements));
  FfnWeights w;
  w.gate = check.pieces({"gate", t.gate}, s.m, s.d);
  w.up = check.pieces({"up", t.up}, s.m, s.d);
  w.down = check.pieces({"down", t.down}, s.d, s.m);
  w.gate_bias = bias_of(check, "gate_bias", t.gate_bias, s.m);
  w.up_bias = bias_of(check, "up_bias", t.up_bias, s.m);
  w.down_bias = bias_of(check, "down_bias", t.down_bias, s.d);
  const GateAndKey rows = split(check.pieces({"gate_key", t.gate_key}, 2 * s.r, s.d), x.element_size());
  w.memory_gate = rows.gate;
  w.memory_key = rows.key;
  w.memory_value = check.pieces({"value", t.value}, s.r, s.d);
  return w;
}

// What a build without CUDA kernels answers too: floats of workspace that they need on a device, none for tensors on the
// CPU, and the family of kernels that each device takes.
#ifdef LOCAS_WITH_CUDA
int64_t glu_ffn_forward_workspace(int64_t tokens, int64_t d, int64_t m, int64_t r, int64_t device) {
  return device < 0 ? 0 : cuda::glu_ffn_forward_workspace(tokens, {d, m, r}, static_cast<int>(device));
}
int64_t glu_ffn_backward_workspace(int64_t tokens, int64_t d, int64_t m, int64_t r, int64_t device) {
  return device < 0 ? 0 : cuda::glu_ffn_backward_workspace(tokens, {d, m, r}, static_cast<int>(device));
}
int64_t neuron_importance_workspace(int64_t tokens, int64_t m, int64_t device) {
  return device < 0 ? 0 : cuda::neuron_importance_workspace(tokens, m, static_cast<int>(device));
}
std::vector<std::string> cuda_families() { return cuda::families(); }
void use_cuda_family(int64_t family) { cuda::use_family(static_cast<int>(family)); }
#else
int64_t glu_ffn_forward_workspace(int64_t, int64_t, int64_t, int64_t, int64_t) { return 0; }
int64_t glu_ffn_backward_workspace(int64_t, int64_t, int64_t, int64_t, int64_t) { return 0; }
int64_t neuron_importance_workspace(int64_t, int64_t, int64_t) { return 0; }
std::vector<std::string> cuda_families() { return {}; }
void use_cuda_family(int64_t) {}
#endif

void glu_ffn_forward(const TensorRef& x, const TensorRef& gate, const TensorRef& up, const TensorRef& down,
                     const MaybeTensor& gate_bias, const MaybeTensor& up_bias, const MaybeTensor& down_bias,
                     const TensorRef& gate_key, const TensorRef& value, const TensorRef& hidden,
                     const MaybeTensor& gate_out, const MaybeTensor& up_out, const TensorRef& y,
                     const MaybeTensor& workspace, int64_t activation, float scale, uintptr_t stream) {
  const Checker check("glu_ffn_forward", {"x", x});
  GluFfnForwardParams p;
  p.weights = weights_of(check, {gate, up, down, gate_bias, up_bias, down_bias, gate_key, value}, x);
  const FfnSizes s = p.weights.sizes();
  const int64_t tokens = x.shape[0], width = s.m + s.padded_r();
  p.x = check.pieces({"x", x}, tokens, s.d);
  p.hidden = check.pieces({"hidden", hidden}, tokens, width);
  p.gate = check.pieces_or_null("gate_out", gate_out, tokens, width);
  p.up = check.pieces_or_null("up_out", up_out, tokens, width);
  p.y = check.pieces({"y", y}, tokens, s.d);
  p.workspace = check.workspace(workspace, glu_ffn_forward_workspace(tokens, s.d, s.m, s.r, x.device));
  p.scale = scale;
  p.activation = check.activation(activation);
  p.dtype = x.dtype;
  if (tokens == 0) return;
  LOCAS_LAUNCH_CUDA(glu_ffn_forward, x, stream, p);
}

void glu_ffn_backward(const TensorRef& dy, const TensorRef& x, const TensorRef& gate, const TensorRef& up,
                      const TensorRef& down, const MaybeTensor& gate_bias, const MaybeTensor& up_bias,
                      const MaybeTensor& down_bias, const TensorRef& gate_key, const TensorRef& value,
                      const TensorRef& gate_saved, const TensorRef& up_saved, const TensorRef& d_gate,
                      const TensorRef& d_up, const TensorRef& memory_hidden, const MaybeTensor& dx,
                      const MaybeTensor& slots_grad, const MaybeTensor& workspace, int64_t activation, float scale,
                      uintptr_t stream) {
  const Checker check("glu_ffn_backward", {"x", x});
  GluFfnBackwardParams p;
  p.weights = weights_of(check, {gate, up, down, gate_bias, up_bias, down_bias, gate_key, value}, x);
  const FfnSizes s = p.weights.sizes();
  const int64_t tokens = x.shape[0], width = s.m + s.padded_r();
  p.x = check.pieces({"x", x}, tokens, s.d);
  p.dy = check.pieces({"dy", dy}, tokens, s.d);
  p.gate = check.pieces({"gate_saved", gate_saved}, tokens, width);
  p.up = check.pieces({"up_saved", up_saved}, tokens, width);
  p.d_gate = check.pieces({"d_gate", d_gate}, tokens, width);
  p.d_up = check.pieces({"d_up", d_up}, tokens, width);
  p.memory_hidden = check.pieces({"memory_hidden", memory_hidden}, tokens, s.padded_r());
  p.dx = check.pieces_or_null("dx", dx, tokens, s.d);
  if (slots_grad) {
    p.slots_grad = slots_grad_rows(check, *slots_grad, s);
    check.begins_at_a_piece({"slots_grad", *slots_grad});
  }
  p.workspace = check.workspace(workspace, dx ? glu_ffn_backward_workspace(tokens, s.d, s.m, s.r, x.device) : 0);
  p.scale = scale;
  p.activation = check.activation(activation);
  p.dtype = x.dtype;
  if (tokens == 0) return;
  LOCAS_LAUNCH_CUDA(glu_ffn_backward, x, stream, p);
}

void neuron_importance(const TensorRef& x, const TensorRef& gate, const TensorRef& up, const MaybeTensor& gate_bias,
                       const MaybeTensor& up_bias, const TensorRef& out, const MaybeTensor& workspace,
                       int64_t activation, uintptr_t stream) {
  const Checker check("neuron_importance", {"x", x});
  check_x(check, x, {DType::bf16, DType::f16});
  const int64_t tokens = x.shape[0], d = x.shape[1], m = gate.ndim == 2 ? gate.shape[0] : 0;
  if (tokens == 0) check.fail_shape({"x", x}, "at least one token, of which the mean is taken");
  if (d % kPieceElements != 0 || m % kPieceElements != 0)
    check.fail_shape({"gate", gate}, "[m, d], multiples of " + std::to_string(kPieceElements));
  NeuronImportanceParams p{};
  p.x = check.pieces({"x", x}, tokens, d);
  p.weights.gate = check.pieces({"gate", gate}, m, d);
  p.weights.up = check.pieces({"up", up}, m, d);
  p.weights.gate_bias = bias_of(check, "gate_bias", gate_bias, m);
  p.weights.up_bias = bias_of(check, "up_bias", up_bias, m);
  p.importance = check.vector<float>({"out", out}, m);
  p.workspace = check.workspace(workspace, neuron_importance_workspace(tokens, m, x.device));
  p.activation = check.activation(activation);
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
        py::arg("r"), py::arg("device"));
  m.def("glu_ffn_backward_workspace", &glu_ffn_backward_workspace, py::arg("tokens"), py::arg("d"), py::arg("m"),
        py::arg("r"), py::arg("device"));
  m.def("neuron_importance_workspace", &neuron_importance_workspace, py::arg("tokens"), py::arg("m"),
        py::arg("device"));
  m.def("cuda_families", &cuda_families);
  m.def("use_cuda_family", &use_cuda_family, py::arg("family"));
}

}  // namespace locas
