// The Python module locas_ext._C: checks each argument once, fills the launch parameters, picks the device.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cmath>
#include <optional>

#include "cpu/kernels.h"
#include "params.h"
#include "tensor_ref.h"
#ifdef LOCAS_WITH_CUDA
#include "cuda/launch.h"
#endif

#ifdef _OPENMP
#include <omp.h>
#endif

namespace py = pybind11;

namespace locas {
namespace {

struct Named {
  const char* name;
  const TensorRef& tensor;
};

[[noreturn]] void fail(const char* op, const Named& t, const std::string& problem) {
  throw py::value_error(std::string(op) + ": " + t.name + " " + problem);
}

// A [rows, cols] matrix with a contiguous last dimension that matches `like` in shape, dtype and device.
Rows matrix(const char* op, const Named& t, const TensorRef& like) {
  if (t.tensor.ndim != 2) fail(op, t, "has shape " + t.tensor.shape_text() + "; expected [rows, cols]");
  if (!t.tensor.same_shape(like)) fail(op, t, "has shape " + t.tensor.shape_text() + "; expected " + like.shape_text());
  if (t.tensor.dtype != like.dtype) fail(op, t, "has another dtype than gate");
  if (t.tensor.device != like.device) fail(op, t, "lies on another device than gate");
  if (t.tensor.dtype == DType::f64 || t.tensor.dtype == DType::i64)
    fail(op, t, "has a dtype that the kernels do not take; expected float32, bfloat16 or float16");
  if (t.tensor.shape[1] > 1 && t.tensor.stride[1] != 1) fail(op, t, "must be contiguous in its last dimension");
  return {t.tensor.data, t.tensor.stride[0]};
}

Activation activation_of(const char* op, int index) {
  if (index < 0 || index > static_cast<int>(Activation::relu))
    throw py::value_error(std::string(op) + ": unknown activation index " + std::to_string(index));
  return static_cast<Activation>(index);
}

// An fp32 contiguous tensor of the slots' shape on the slots' device.
float* slot_state(const char* op, const Named& t, const TensorRef& slots) {
  if (!t.tensor.same_shape(slots)) fail(op, t, "has shape " + t.tensor.shape_text() + "; expected " + slots.shape_text());
  if (t.tensor.dtype != DType::f32) fail(op, t, "must be float32");
  if (t.tensor.device != slots.device) fail(op, t, "lies on another device than slots");
  if (!t.tensor.contiguous()) fail(op, t, "must be contiguous");
  return static_cast<float*>(t.tensor.data);
}

DeviceScalar scalar(const char* op, const Named& t, const TensorRef& slots) {
  if (t.tensor.numel() != 1) fail(op, t, "has shape " + t.tensor.shape_text() + "; expected a 0-d tensor");
  if (t.tensor.dtype != DType::f32 && t.tensor.dtype != DType::f64 && t.tensor.dtype != DType::i64)
    fail(op, t, "must be float32, float64 or int64");
  if (t.tensor.device != slots.device) fail(op, t, "lies on another device than slots");
  return {t.tensor.data, t.tensor.dtype};
}

// The rounded copy of the slots, in a half dtype; returns null for None.
void* compute_copy(const char* op, const std::optional<TensorRef>& t, const TensorRef& slots) {
  if (!t) return nullptr;
  const Named named{"compute", *t};
  if (!t->same_shape(slots)) fail(op, named, "has shape " + t->shape_text() + "; expected " + slots.shape_text());
  if (t->dtype == DType::f64 || t->dtype == DType::i64) fail(op, named, "must be float32, bfloat16 or float16");
  if (t->device != slots.device) fail(op, named, "lies on another device than slots");
  if (!t->contiguous()) fail(op, named, "must be contiguous");
  return t->data;
}

void slot_rows(const char* op, const TensorRef& slots, int64_t& rows, int64_t& d) {
  if (slots.ndim < 1) fail(op, {"slots", slots}, "has no dimensions; expected [..., d]");
  d = slots.shape[slots.ndim - 1];
  rows = d == 0 ? 0 : slots.numel() / d;
}

// Runs the CPU or the CUDA kernel of one op with the interpreter released.
#ifdef LOCAS_WITH_CUDA
#define LOCAS_DISPATCH(kernel, params, device_index, stream)                       \
  do {                                                                             \
    const py::gil_scoped_release released;                                         \
    if ((device_index) < 0) cpu::kernels().kernel(params);                         \
    else cuda::kernel(params, {device_index, reinterpret_cast<void*>(stream)});    \
  } while (0)
#else
#define LOCAS_DISPATCH(kernel, params, device_index, stream)                                        \
  do {                                                                                              \
    (void)(stream);                                                                                 \
    if ((device_index) >= 0)                                                                        \
      throw std::runtime_error(#kernel ": this build has no CUDA kernels; rebuild with LOCAS_CUDA=1 " \
                               "where nvcc is found");                                              \
    const py::gil_scoped_release released;                                                          \
    cpu::kernels().kernel(params);                                                                  \
  } while (0)
#endif

void glu_forward(const TensorRef& gate, const TensorRef& up, const TensorRef& out, int activation, float scale,
                 uintptr_t stream) {
  constexpr const char* op = "glu_forward";
  GluForwardParams p;
  p.gate = matrix(op, {"gate", gate}, gate);
  p.up = matrix(op, {"up", up}, gate);
  p.out = matrix(op, {"out", out}, gate);
  p.rows = gate.shape[0];
  p.cols = gate.shape[1];
  p.scale = scale;
  p.activation = activation_of(op, activation);
  p.dtype = gate.dtype;
  LOCAS_DISPATCH(glu_forward, p, gate.device, stream);
}

void glu_backward(const TensorRef& d_hidden, const TensorRef& gate, const TensorRef& up, const TensorRef& d_gate,
                  const TensorRef& d_up, const std::optional<TensorRef>& hidden, int activation, float scale,
                  uintptr_t stream) {
  constexpr const char* op = "glu_backward";
  GluBackwardParams p;
  p.gate = matrix(op, {"gate", gate}, gate);
  p.up = matrix(op, {"up", up}, gate);
  p.d_hidden = matrix(op, {"d_hidden", d_hidden}, gate);
  p.d_gate = matrix(op, {"d_gate", d_gate}, gate);
  p.d_up = matrix(op, {"d_up", d_up}, gate);
  p.hidden = hidden ? matrix(op, {"hidden", *hidden}, gate) : Rows{nullptr, 0};
  p.rows = gate.shape[0];
  p.cols = gate.shape[1];
  p.scale = scale;
  p.activation = activation_of(op, activation);
  p.dtype = gate.dtype;
  LOCAS_DISPATCH(glu_backward, p, gate.device, stream);
}

void importance(const TensorRef& gate, const TensorRef& up, const TensorRef& out, int activation, uintptr_t stream) {
  constexpr const char* op = "importance";
  ImportanceParams p;
  p.gate = matrix(op, {"gate", gate}, gate);
  p.up = matrix(op, {"up", up}, gate);
  p.rows = gate.shape[0];
  p.cols = gate.shape[1];
  if (p.rows == 0) fail(op, {"gate", gate}, "has no rows; the mean needs at least one");
  if (out.ndim != 1 || out.shape[0] != p.cols || out.dtype != DType::f32 || !out.contiguous() ||
      out.device != gate.device)
    fail(op, {"out", out}, "must be a contiguous float32 vector of one element per column, on gate's device");
  p.importance = static_cast<float*>(out.data);
  p.activation = activation_of(op, activation);
  p.dtype = gate.dtype;
  LOCAS_DISPATCH(importance, p, gate.device, stream);
}

void cross_entropy(const TensorRef& logits, const TensorRef& targets, const TensorRef& nll,
                   const std::optional<TensorRef>& d_logits, uintptr_t stream) {
  constexpr const char* op = "cross_entropy";
  CrossEntropyParams p;
  p.logits = matrix(op, {"logits", logits}, logits);
  p.d_logits = d_logits ? matrix(op, {"d_logits", *d_logits}, logits) : Rows{nullptr, 0};
  p.rows = logits.shape[0];
  p.cols = logits.shape[1];
  const auto vector_of = [&](const Named& t, DType dtype) {
    if (t.tensor.ndim != 1 || t.tensor.shape[0] != p.rows || t.tensor.dtype != dtype || !t.tensor.contiguous() ||
        t.tensor.device != logits.device)
      fail(op, t, std::string("must be a contiguous ") + (dtype == DType::i64 ? "int64" : "float32") +
                      " vector of one element per row, on logits' device");
    return t.tensor.data;
  };
  p.targets = static_cast<const int64_t*>(vector_of({"targets", targets}, DType::i64));
  p.nll = static_cast<float*>(vector_of({"nll", nll}, DType::f32));
  p.dtype = logits.dtype;
  LOCAS_DISPATCH(cross_entropy, p, logits.device, stream);
}

// A contiguous vector of `size` elements on the CPU.
void* cpu_vector(const char* op, const Named& t, int64_t size, DType dtype) {
  if (t.tensor.ndim != 1 || t.tensor.shape[0] != size || t.tensor.dtype != dtype || !t.tensor.contiguous() ||
      t.tensor.device >= 0)
    fail(op, t, "must be a contiguous vector of " + std::to_string(size) + " elements on the CPU, of the right dtype");
  return t.tensor.data;
}

void rms_norm(const TensorRef& x, const TensorRef& weight, const TensorRef& out,
              const std::optional<TensorRef>& inverse_rms, float eps) {
  constexpr const char* op = "rms_norm";
  RmsNormParams p;
  p.x = matrix(op, {"x", x}, x);
  p.out = matrix(op, {"out", out}, x);
  p.rows = x.shape[0];
  p.cols = x.shape[1];
  p.weight = cpu_vector(op, {"weight", weight}, p.cols, x.dtype);
  p.inverse_rms = inverse_rms ? static_cast<float*>(cpu_vector(op, {"inverse_rms", *inverse_rms}, p.rows, DType::f32))
                              : nullptr;
  p.eps = eps;
  p.dtype = x.dtype;
  const py::gil_scoped_release released;
  cpu::kernels().rms_norm(p);
}

void rms_norm_backward(const TensorRef& d_out, const TensorRef& x, const TensorRef& weight,
                       const TensorRef& inverse_rms, const TensorRef& dx) {
  constexpr const char* op = "rms_norm_backward";
  RmsNormBackwardParams p;
  p.x = matrix(op, {"x", x}, x);
  p.d_out = matrix(op, {"d_out", d_out}, x);
  p.dx = matrix(op, {"dx", dx}, x);
  p.rows = x.shape[0];
  p.cols = x.shape[1];
  p.weight = cpu_vector(op, {"weight", weight}, p.cols, x.dtype);
  p.inverse_rms = static_cast<const float*>(cpu_vector(op, {"inverse_rms", inverse_rms}, p.rows, DType::f32));
  p.dtype = x.dtype;
  const py::gil_scoped_release released;
  cpu::kernels().rms_norm_backward(p);
}

// ---- the fused FFN -------------------------------------------------------------------------------------------
using MaybeTensor = std::optional<TensorRef>;

// A [rows, cols] half-precision matrix that the fused kernels can read in 16-byte pieces, of x's dtype and device.
Rows pieces(const char* op, const Named& t, int64_t rows, int64_t cols, const TensorRef& x) {
  if (t.tensor.ndim != 2 || t.tensor.shape[0] != rows || t.tensor.shape[1] != cols)
    fail(op, t, "has shape " + t.tensor.shape_text() + "; expected [" + std::to_string(rows) + ", " + std::to_string(cols) + "]");
  if (t.tensor.dtype != x.dtype) fail(op, t, "has another dtype than x");
  if (t.tensor.device != x.device) fail(op, t, "lies on another device than x");
  const int64_t stride = rows > 1 ? t.tensor.stride[0] : cols;
  if (t.tensor.stride[1] != 1 || stride % 8 != 0 || reinterpret_cast<uintptr_t>(t.tensor.data) % 16 != 0)
    fail(op, t, "must be contiguous in its last dimension, with rows that begin at multiples of 16 bytes");
  return {t.tensor.data, stride};
}

Rows pieces_or_null(const char* op, const char* name, const MaybeTensor& t, int64_t rows, int64_t cols, const TensorRef& x) {
  return t ? pieces(op, {name, *t}, rows, cols, x) : Rows{nullptr, 0};
}

const void* bias_of(const char* op, const char* name, const MaybeTensor& t, int64_t size, const TensorRef& x) {
  if (!t) return nullptr;
  if (t->ndim != 1 || t->shape[0] != size || t->dtype != x.dtype || t->device != x.device || !t->contiguous() ||
      reinterpret_cast<uintptr_t>(t->data) % 16 != 0)
    fail(op, {name, *t}, "must be a contiguous vector of " + std::to_string(size) + " elements, of x's dtype and device");
  return t->data;
}

float* workspace_of(const char* op, const MaybeTensor& t, int64_t floats, const TensorRef& x) {
  if (floats == 0) return nullptr;
  if (!t || t->dtype != DType::f32 || t->device != x.device || !t->contiguous() || t->numel() < floats)
    throw py::value_error(std::string(op) + ": workspace must hold " + std::to_string(floats) + " float32 on x's device");
  return static_cast<float*>(t->data);
}

// gate, up, down and their biases in the order of HostWeights, then the slots as in SlotViews.
struct FfnTensors {
  const TensorRef &gate, &up, &down;
  const MaybeTensor &gate_bias, &up_bias, &down_bias;
  const TensorRef &gate_key, &value;
};

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

// The fused kernels are CUDA only.
#ifdef LOCAS_WITH_CUDA
#define LOCAS_LAUNCH_CUDA(kernel, like, stream, ...)                                                              \
  do {                                                                                                            \
    if ((like).device < 0) throw py::value_error(#kernel ": the tensors are on the CPU; this kernel needs CUDA"); \
    const py::gil_scoped_release released;                                                                        \
    cuda::kernel(__VA_ARGS__, {(like).device, reinterpret_cast<void*>(stream)});                                  \
  } while (0)
#else
#define LOCAS_LAUNCH_CUDA(kernel, like, stream, ...)                                                    \
  do {                                                                                                  \
    (void)(stream), (void)sizeof(__VA_ARGS__);                                                          \
    throw std::runtime_error(#kernel ": this build has no CUDA kernels; rebuild with LOCAS_CUDA=1 "     \
                             "where nvcc is found");                                                    \
  } while (0)
#endif

int64_t ffn_forward_workspace(int64_t tokens, int64_t d, int64_t m, int64_t r) {
#ifdef LOCAS_WITH_CUDA
  FfnWeights w{};
  w.d = d, w.m = m, w.r = r;
  return cuda::ffn_forward_workspace(tokens, w);
#else
  (void)tokens, (void)d, (void)m, (void)r;
  return 0;
#endif
}

int64_t ffn_backward_workspace(int64_t tokens, int64_t d, int64_t m, int64_t r) {
#ifdef LOCAS_WITH_CUDA
  FfnWeights w{};
  w.d = d, w.m = m, w.r = r;
  return cuda::ffn_backward_workspace(tokens, w);
#else
  (void)tokens, (void)d, (void)m, (void)r;
  return 0;
#endif
}

int64_t neuron_importance_workspace(int64_t tokens, int64_t m) {
#ifdef LOCAS_WITH_CUDA
  return cuda::neuron_importance_workspace(tokens, m);
#else
  (void)tokens, (void)m;
  return 0;
#endif
}

void ffn_forward(const TensorRef& x, const TensorRef& gate, const TensorRef& up, const TensorRef& down,
                 const MaybeTensor& gate_bias, const MaybeTensor& up_bias, const MaybeTensor& down_bias,
                 const TensorRef& gate_key, const TensorRef& value, const TensorRef& hidden, const MaybeTensor& gate_out,
                 const MaybeTensor& up_out, const TensorRef& y, const MaybeTensor& workspace, int activation, float scale,
                 uintptr_t stream) {
  constexpr const char* op = "ffn_forward";
  FfnForwardParams p;
  p.weights = weights_of(op, {gate, up, down, gate_bias, up_bias, down_bias, gate_key, value}, x);
  p.tokens = x.shape[0];
  const int64_t width = p.weights.m + p.weights.padded_r();
  p.x = pieces(op, {"x", x}, p.tokens, p.weights.d, x);
  p.hidden = pieces(op, {"hidden", hidden}, p.tokens, width, x);
  p.gate = pieces_or_null(op, "gate_out", gate_out, p.tokens, width, x);
  p.up = pieces_or_null(op, "up_out", up_out, p.tokens, width, x);
  p.y = pieces(op, {"y", y}, p.tokens, p.weights.d, x);
  p.workspace = workspace_of(op, workspace, ffn_forward_workspace(p.tokens, p.weights.d, p.weights.m, p.weights.r), x);
  p.scale = scale;
  p.activation = activation_of(op, activation);
  p.dtype = x.dtype;
  if (p.tokens == 0) return;
  LOCAS_LAUNCH_CUDA(ffn_forward, x, stream, p);
}

void ffn_backward(const TensorRef& dy, const TensorRef& x, const TensorRef& gate, const TensorRef& up, const TensorRef& down,
                  const MaybeTensor& gate_bias, const MaybeTensor& up_bias, const MaybeTensor& down_bias,
                  const TensorRef& gate_key, const TensorRef& value, const TensorRef& gate_saved, const TensorRef& up_saved,
                  const TensorRef& d_gate, const TensorRef& d_up, const TensorRef& memory_hidden, const MaybeTensor& dx,
                  const MaybeTensor& slots_grad, const MaybeTensor& workspace, int activation, float scale,
                  uintptr_t stream) {
  constexpr const char* op = "ffn_backward";
  FfnBackwardParams p;
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
    if (slots_grad->ndim != 3 || slots_grad->shape[0] != 3 || slots_grad->shape[1] != w.r || slots_grad->shape[2] != w.d ||
        slots_grad->dtype != DType::f32 || slots_grad->device != x.device || !slots_grad->contiguous() ||
        reinterpret_cast<uintptr_t>(slots_grad->data) % 16 != 0)
      fail(op, {"slots_grad", *slots_grad}, "must be contiguous float32 [3, r, d] on x's device");
    p.slots_grad = static_cast<float*>(slots_grad->data);
  }
  p.workspace = workspace_of(op, workspace, dx ? ffn_backward_workspace(p.tokens, w.d, w.m, w.r) : 0, x);
  p.scale = scale;
  p.activation = activation_of(op, activation);
  p.dtype = x.dtype;
  if (p.tokens == 0) return;
  LOCAS_LAUNCH_CUDA(ffn_backward, x, stream, p);
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

// Everything of an AdamW step but the gradient.
AdamWParams adamw_params(const char* op, const TensorRef& slots, const TensorRef& exp_avg, const TensorRef& exp_avg_sq,
                         const TensorRef& step, const TensorRef& learning_rate, double beta1, double beta2, float eps,
                         float weight_decay, bool clip, const MaybeTensor& compute, const MaybeTensor& finite) {
  AdamWParams p{};
  p.slots = slot_state(op, {"slots", slots}, slots);
  p.exp_avg = slot_state(op, {"exp_avg", exp_avg}, slots);
  p.exp_avg_sq = slot_state(op, {"exp_avg_sq", exp_avg_sq}, slots);
  p.compute = compute_copy(op, compute, slots);
  p.compute_dtype = compute ? compute->dtype : DType::f32;
  slot_rows(op, slots, p.rows, p.d);
  p.step = scalar(op, {"step", step}, slots);
  p.learning_rate = scalar(op, {"learning_rate", learning_rate}, slots);
  p.beta1 = beta1;
  p.beta2 = beta2;
  p.log_beta1 = static_cast<float>(std::log(beta1));
  p.log_beta2 = static_cast<float>(std::log(beta2));
  p.eps = eps;
  p.weight_decay = weight_decay;
  p.clip = clip;
  if (finite) p.finite = scalar(op, {"finite", *finite}, slots);
  return p;
}

SgdParams sgd_params(const char* op, const TensorRef& slots, const MaybeTensor& momentum_buffer,
                     const TensorRef& learning_rate, float momentum, float weight_decay, bool clip,
                     const MaybeTensor& compute, const MaybeTensor& finite) {
  SgdParams p{};
  p.slots = slot_state(op, {"slots", slots}, slots);
  p.momentum_buffer = momentum_buffer ? slot_state(op, {"momentum_buffer", *momentum_buffer}, slots) : nullptr;
  p.compute = compute_copy(op, compute, slots);
  p.compute_dtype = compute ? compute->dtype : DType::f32;
  slot_rows(op, slots, p.rows, p.d);
  p.learning_rate = scalar(op, {"learning_rate", learning_rate}, slots);
  p.momentum = momentum;
  p.weight_decay = weight_decay;
  p.clip = clip;
  if (finite) p.finite = scalar(op, {"finite", *finite}, slots);
  return p;
}

// ---- the FFN on the CPU --------------------------------------------------------------------------------------
Rows cpu_matrix(const char* op, const Named& t, int64_t rows, int64_t cols, const TensorRef& x) {
  if (t.tensor.ndim != 2 || t.tensor.shape[0] != rows || t.tensor.shape[1] != cols)
    fail(op, t, "has shape " + t.tensor.shape_text() + "; expected [" + std::to_string(rows) + ", " + std::to_string(cols) + "]");
  if (t.tensor.dtype != x.dtype) fail(op, t, "has another dtype than x");
  if (t.tensor.device >= 0) fail(op, t, "must lie on the CPU");
  if (cols > 1 && t.tensor.stride[1] != 1) fail(op, t, "must be contiguous in its last dimension");
  return {t.tensor.data, t.tensor.stride[0]};
}

FfnWeights cpu_weights_of(const char* op, const FfnTensors& t, const TensorRef& x) {
  const cpu::FfnKernels* kernels = cpu::ffn_kernels();
  if (!kernels) throw std::runtime_error(std::string(op) + ": needs a processor with AVX-512");
  if (x.dtype != DType::f32 && !(x.dtype == DType::bf16 && kernels->bf16))
    fail(op, {"x", x}, "has a dtype that this processor has no products for; expected float32, or bfloat16 with AVX-512 BF16");
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

// saved [2, tokens rounded up to 16, m + r] or, without the host's part, [.., .., r]; returns how many host neurons it holds.
int64_t saved_neurons(const char* op, const TensorRef& saved, const FfnWeights& w, const TensorRef& x) {
  const int64_t rows = (x.shape[0] + 15) / 16 * 16;
  if (saved.ndim != 3 || saved.shape[0] != 2 || saved.shape[1] != rows ||
      (saved.shape[2] != w.m + w.r && saved.shape[2] != w.r) || saved.dtype != x.dtype || !saved.contiguous() ||
      saved.device >= 0)
    fail(op, {"saved", saved}, "has shape " + saved.shape_text() + "; expected contiguous [2, " + std::to_string(rows) + ", " +
                                   std::to_string(w.m + w.r) + " or " + std::to_string(w.r) + "] of x's dtype on the CPU");
  return saved.shape[2] - w.r;
}

void cpu_ffn_forward(const TensorRef& x, const TensorRef& gate, const TensorRef& up, const TensorRef& down,
                     const MaybeTensor& gate_bias, const MaybeTensor& up_bias, const MaybeTensor& down_bias,
                     const TensorRef& gate_key, const TensorRef& value, const TensorRef& y, const MaybeTensor& saved,
                     int activation, float scale) {
  constexpr const char* op = "cpu_ffn_forward";
  CpuFfnForwardParams p;
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
  cpu::ffn_kernels()->forward(p);
}

void cpu_ffn_backward(const TensorRef& dy, const TensorRef& x, const TensorRef& saved, const TensorRef& gate,
                      const TensorRef& up, const TensorRef& down, const TensorRef& gate_key, const TensorRef& value,
                      const MaybeTensor& dx, const TensorRef& slots_grad, int activation, float scale) {
  constexpr const char* op = "cpu_ffn_backward";
  CpuFfnBackwardParams p;
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
  cpu::ffn_kernels()->backward(p);
}

void adamw(const TensorRef& slots, const TensorRef& grad, const TensorRef& exp_avg, const TensorRef& exp_avg_sq,
           const TensorRef& step, const TensorRef& learning_rate, double beta1, double beta2, float eps,
           float weight_decay, bool clip, const MaybeTensor& compute, const MaybeTensor& finite, uintptr_t stream) {
  constexpr const char* op = "update_slots_";
  AdamWParams p = adamw_params(op, slots, exp_avg, exp_avg_sq, step, learning_rate, beta1, beta2, eps, weight_decay, clip,
                               compute, finite);
  p.grad = slot_state(op, {"grad", grad}, slots);
  LOCAS_DISPATCH(adamw, p, slots.device, stream);
}

void sgd(const TensorRef& slots, const TensorRef& grad, const MaybeTensor& momentum_buffer, const TensorRef& learning_rate,
         float momentum, float weight_decay, bool clip, const MaybeTensor& compute, const MaybeTensor& finite,
         uintptr_t stream) {
  constexpr const char* op = "sgd_slots_";
  SgdParams p = sgd_params(op, slots, momentum_buffer, learning_rate, momentum, weight_decay, clip, compute, finite);
  p.grad = slot_state(op, {"grad", grad}, slots);
  LOCAS_DISPATCH(sgd, p, slots.device, stream);
}

// The 5 tensors of each layer's SlotFactors: d_gate, d_key, hidden [tokens, r], x, dy [tokens, d].
LayerFactors layer_factors(const char* op, const std::vector<std::array<TensorRef, 5>>& layers, float scale,
                           const TensorRef& compute, const TensorRef& slots) {
  LayerFactors p{};
  if (slots.ndim != 4 || slots.shape[1] != 3 || layers.size() != static_cast<size_t>(slots.shape[0]))
    fail(op, {"slots", slots}, "has shape " + slots.shape_text() + "; expected [" + std::to_string(layers.size()) + ", 3, r, d]");
  if (layers.size() > LayerFactors::kMostLayers)
    throw py::value_error(std::string(op) + ": factors of " + std::to_string(layers.size()) + " layers; at most " +
                          std::to_string(LayerFactors::kMostLayers));
  const TensorRef& x = layers.at(0)[3];
  const int64_t d = slots.shape[3];
  p.count = static_cast<int>(layers.size());
  p.r = slots.shape[2];
  p.tokens = x.ndim == 2 ? x.shape[0] : 0;
  p.scale = scale;
  p.dtype = x.dtype;
  if (x.dtype != DType::bf16 && x.dtype != DType::f16) fail(op, {"x", x}, "must be bfloat16 or float16");
  if (compute.dtype != x.dtype) fail(op, {"compute", compute}, "has another dtype than x");
  if (x.device != slots.device) fail(op, {"x", x}, "lies on another device than slots");
  if (p.tokens < 1 || p.tokens > LayerFactors::kMostTokens)
    fail(op, {"x", x}, "has shape " + x.shape_text() + "; expected 1 to " + std::to_string(LayerFactors::kMostTokens) + " tokens");
  if (d % 8 != 0 || d > LayerFactors::kMostWidth)
    fail(op, {"slots", slots}, "has rows of " + std::to_string(d) + "; expected a multiple of 8, at most " +
                                   std::to_string(LayerFactors::kMostWidth));
  for (size_t layer = 0; layer < layers.size(); ++layer) {
    const auto& [d_gate, d_key, hidden, layer_x, dy] = layers[layer];
    const auto coefficients = [&](const char* name, const TensorRef& t) {
      if (t.ndim != 2 || t.shape[0] != p.tokens || t.shape[1] != p.r || t.dtype != x.dtype || t.device != x.device ||
          (p.r > 1 && t.stride[1] != 1))
        fail(op, {name, t}, "must be [tokens, r], contiguous in its last dimension, of x's dtype and device");
      return Rows{t.data, t.stride[0]};
    };
    p.layers[layer] = {coefficients("d_gate", d_gate), coefficients("d_key", d_key), coefficients("hidden", hidden),
                       pieces(op, {"x", layer_x}, p.tokens, d, x), pieces(op, {"dy", dy}, p.tokens, d, x)};
  }
  return p;
}

using FactorTensors = std::vector<std::array<TensorRef, 5>>;

void adamw_from_factors(const TensorRef& slots, const TensorRef& exp_avg, const TensorRef& exp_avg_sq, const TensorRef& step,
                        const TensorRef& learning_rate, double beta1, double beta2, float eps, float weight_decay,
                        bool clip, const TensorRef& compute, const MaybeTensor& finite, const FactorTensors& factors,
                        float factor_scale, uintptr_t stream) {
  constexpr const char* op = "update_slots_";
  const AdamWParams p = adamw_params(op, slots, exp_avg, exp_avg_sq, step, learning_rate, beta1, beta2, eps, weight_decay,
                                     clip, compute, finite);
  const LayerFactors layers = layer_factors(op, factors, factor_scale, compute, slots);
  LOCAS_LAUNCH_CUDA(adamw_from_factors, slots, stream, p, layers);
}

void sgd_from_factors(const TensorRef& slots, const MaybeTensor& momentum_buffer, const TensorRef& learning_rate,
                      float momentum, float weight_decay, bool clip, const TensorRef& compute, const MaybeTensor& finite,
                      const FactorTensors& factors, float factor_scale, uintptr_t stream) {
  constexpr const char* op = "sgd_slots_";
  const SgdParams p = sgd_params(op, slots, momentum_buffer, learning_rate, momentum, weight_decay, clip, compute, finite);
  const LayerFactors layers = layer_factors(op, factors, factor_scale, compute, slots);
  LOCAS_LAUNCH_CUDA(sgd_from_factors, slots, stream, p, layers);
}

py::dict build_info() {
  py::dict info;
  info["version"] = LOCAS_VERSION;
  info["compiler"] = LOCAS_COMPILER;
  info["cpu_isa"] = cpu::kernels().isa;
  const cpu::FfnKernels* ffn = cpu::ffn_kernels();
  info["cpu_ffn"] = !ffn ? py::list() : ffn->bf16 ? py::list(py::make_tuple("float32", "bfloat16"))
                                                  : py::list(py::make_tuple("float32"));
#ifdef _OPENMP
  info["openmp_threads"] = omp_get_max_threads();
#else
  info["openmp_threads"] = 1;
#endif
#ifdef LOCAS_WITH_CUDA
  info["cuda_architectures"] = cuda::compiled_architectures();
  info["cuda_devices"] = cuda::devices();
#else
  info["cuda_architectures"] = py::none();
  info["cuda_devices"] = py::list();
#endif
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of locas_ext; use them through locas_ext.ops.";
  m.def("glu_forward", &glu_forward, py::arg("gate"), py::arg("up"), py::arg("out"), py::arg("activation"),
        py::arg("scale"), py::arg("stream"));
  m.def("glu_backward", &glu_backward, py::arg("d_hidden"), py::arg("gate"), py::arg("up"), py::arg("d_gate"),
        py::arg("d_up"), py::arg("hidden"), py::arg("activation"), py::arg("scale"), py::arg("stream"));
  m.def("cpu_ffn_forward", &cpu_ffn_forward, py::arg("x"), py::arg("gate"), py::arg("up"), py::arg("down"),
        py::arg("gate_bias"), py::arg("up_bias"), py::arg("down_bias"), py::arg("gate_key"), py::arg("value"), py::arg("y"),
        py::arg("saved"), py::arg("activation"), py::arg("scale"));
  m.def("cpu_ffn_backward", &cpu_ffn_backward, py::arg("dy"), py::arg("x"), py::arg("saved"), py::arg("gate"),
        py::arg("up"), py::arg("down"), py::arg("gate_key"), py::arg("value"), py::arg("dx"), py::arg("slots_grad"),
        py::arg("activation"), py::arg("scale"));
  m.def("importance", &importance, py::arg("gate"), py::arg("up"), py::arg("out"), py::arg("activation"),
        py::arg("stream"));
  m.def("cross_entropy", &cross_entropy, py::arg("logits"), py::arg("targets"), py::arg("nll"), py::arg("d_logits"),
        py::arg("stream"));
  m.def("rms_norm", &rms_norm, py::arg("x"), py::arg("weight"), py::arg("out"), py::arg("inverse_rms"),
        py::arg("eps"));
  m.def("rms_norm_backward", &rms_norm_backward, py::arg("d_out"), py::arg("x"), py::arg("weight"),
        py::arg("inverse_rms"), py::arg("dx"));
  m.def("adamw", &adamw, py::arg("slots"), py::arg("grad"), py::arg("exp_avg"), py::arg("exp_avg_sq"),
        py::arg("step"), py::arg("learning_rate"), py::arg("beta1"), py::arg("beta2"), py::arg("eps"),
        py::arg("weight_decay"), py::arg("clip"), py::arg("compute"), py::arg("finite"), py::arg("stream"));
  m.def("sgd", &sgd, py::arg("slots"), py::arg("grad"), py::arg("momentum_buffer"), py::arg("learning_rate"),
        py::arg("momentum"), py::arg("weight_decay"), py::arg("clip"), py::arg("compute"), py::arg("finite"),
        py::arg("stream"));
  m.def("ffn_forward", &ffn_forward, py::arg("x"), py::arg("gate"), py::arg("up"), py::arg("down"), py::arg("gate_bias"),
        py::arg("up_bias"), py::arg("down_bias"), py::arg("gate_key"), py::arg("value"), py::arg("hidden"),
        py::arg("gate_out"), py::arg("up_out"), py::arg("y"), py::arg("workspace"), py::arg("activation"),
        py::arg("scale"), py::arg("stream"));
  m.def("ffn_backward", &ffn_backward, py::arg("dy"), py::arg("x"), py::arg("gate"), py::arg("up"), py::arg("down"),
        py::arg("gate_bias"), py::arg("up_bias"), py::arg("down_bias"), py::arg("gate_key"), py::arg("value"),
        py::arg("gate_saved"), py::arg("up_saved"), py::arg("d_gate"), py::arg("d_up"), py::arg("memory_hidden"),
        py::arg("dx"), py::arg("slots_grad"), py::arg("workspace"), py::arg("activation"), py::arg("scale"),
        py::arg("stream"));
  m.def("neuron_importance", &neuron_importance, py::arg("x"), py::arg("gate"), py::arg("up"), py::arg("gate_bias"),
        py::arg("up_bias"), py::arg("out"), py::arg("workspace"), py::arg("activation"), py::arg("stream"));
  m.def("ffn_forward_workspace", &ffn_forward_workspace, py::arg("tokens"), py::arg("d"), py::arg("m"), py::arg("r"));
  m.def("ffn_backward_workspace", &ffn_backward_workspace, py::arg("tokens"), py::arg("d"), py::arg("m"), py::arg("r"));
  m.def("neuron_importance_workspace", &neuron_importance_workspace, py::arg("tokens"), py::arg("m"));
  m.def("adamw_from_factors", &adamw_from_factors, py::arg("slots"), py::arg("exp_avg"), py::arg("exp_avg_sq"),
        py::arg("step"), py::arg("learning_rate"), py::arg("beta1"), py::arg("beta2"), py::arg("eps"),
        py::arg("weight_decay"), py::arg("clip"), py::arg("compute"), py::arg("finite"), py::arg("factors"),
        py::arg("factor_scale"), py::arg("stream"));
  m.def("sgd_from_factors", &sgd_from_factors, py::arg("slots"), py::arg("momentum_buffer"), py::arg("learning_rate"),
        py::arg("momentum"), py::arg("weight_decay"), py::arg("clip"), py::arg("compute"), py::arg("finite"),
        py::arg("factors"), py::arg("factor_scale"), py::arg("stream"));
  m.def("build_info", &build_info);
}

}  // namespace locas
