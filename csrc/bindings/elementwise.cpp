// Bindings of the kernels between matrix products: activations, importance, loss and norms.
#include "bindings/checks.h"
#include "bindings/dispatch.h"
#include "bindings/module.h"
#include "common/elementwise_params.h"

namespace locas {
namespace {

void glu_activation_forward(const TensorRef& gate, const MaybeTensor& up, const TensorRef& out, int activation,
                            float scale, uintptr_t stream) {
  constexpr const char* op = "glu_activation_forward";
  GluActivationForwardParams p;
  p.gate = matrix(op, {"gate", gate}, gate);
  p.up = matrix_or_null(op, "up", up, gate);
  p.out = matrix(op, {"out", out}, gate);
  p.rows = gate.shape[0];
  p.cols = gate.shape[1];
  p.scale = scale;
  p.activation = activation_of(op, activation);
  p.dtype = gate.dtype;
  LOCAS_DISPATCH(glu_activation_forward, p, gate.device, stream);
}

void glu_activation_backward(const TensorRef& d_hidden, const TensorRef& gate, const MaybeTensor& up,
                             const TensorRef& d_gate, const MaybeTensor& d_up, const MaybeTensor& hidden,
                             int activation, float scale, uintptr_t stream) {
  constexpr const char* op = "glu_activation_backward";
  GluActivationBackwardParams p;
  p.gate = matrix(op, {"gate", gate}, gate);
  p.up = matrix_or_null(op, "up", up, gate);
  p.d_hidden = matrix(op, {"d_hidden", d_hidden}, gate);
  p.d_gate = matrix(op, {"d_gate", d_gate}, gate);
  p.d_up = matrix_or_null(op, "d_up", d_up, gate);
  if (up.has_value() != d_up.has_value())
    throw py::value_error("glu_activation_backward: up and d_up must be given together");
  p.hidden = matrix_or_null(op, "hidden", hidden, gate);
  p.rows = gate.shape[0];
  p.cols = gate.shape[1];
  p.scale = scale;
  p.activation = activation_of(op, activation);
  p.dtype = gate.dtype;
  LOCAS_DISPATCH(glu_activation_backward, p, gate.device, stream);
}

void neuron_importance_of_products(const TensorRef& gate, const TensorRef& up, const TensorRef& out, int activation,
                                   uintptr_t stream) {
  constexpr const char* op = "neuron_importance_of_products";
  NeuronImportanceOfProductsParams p;
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
  LOCAS_DISPATCH(neuron_importance_of_products, p, gate.device, stream);
}

void token_nll(const TensorRef& logits, const TensorRef& targets, const TensorRef& nll, const MaybeTensor& d_logits,
               uintptr_t stream) {
  constexpr const char* op = "token_nll";
  TokenNllParams p;
  p.logits = matrix(op, {"logits", logits}, logits);
  p.d_logits = matrix_or_null(op, "d_logits", d_logits, logits);
  p.rows = logits.shape[0];
  p.cols = logits.shape[1];
  const auto vector_of = [&](const Named& t, DType dtype) {
    if (t.tensor.ndim != 1 || t.tensor.shape[0] != p.rows || t.tensor.dtype != dtype || !t.tensor.contiguous() ||
        t.tensor.device != logits.device)
      fail(op, t,
           std::string("must be a contiguous ") + (dtype == DType::i64 ? "int64" : "float32") +
               " vector of one element per row, on logits' device");
    return t.tensor.data;
  };
  p.targets = static_cast<const int64_t*>(vector_of({"targets", targets}, DType::i64));
  p.nll = static_cast<float*>(vector_of({"nll", nll}, DType::f32));
  p.dtype = logits.dtype;
  LOCAS_DISPATCH(token_nll, p, logits.device, stream);
}

void rms_norm(const TensorRef& x, const TensorRef& weight, const TensorRef& out, const MaybeTensor& inverse_rms,
              float eps) {
  constexpr const char* op = "rms_norm";
  RmsNormParams p;
  p.x = matrix(op, {"x", x}, x);
  p.out = matrix(op, {"out", out}, x);
  p.rows = x.shape[0];
  p.cols = x.shape[1];
  p.weight = cpu_vector(op, {"weight", weight}, p.cols, x.dtype);
  p.inverse_rms =
      inverse_rms ? static_cast<float*>(cpu_vector(op, {"inverse_rms", *inverse_rms}, p.rows, DType::f32)) : nullptr;
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

}  // namespace

void bind_elementwise(py::module_& m) {
  m.def("glu_activation_forward", &glu_activation_forward, py::arg("gate"), py::arg("up"), py::arg("out"),
        py::arg("activation"), py::arg("scale"), py::arg("stream"));
  m.def("glu_activation_backward", &glu_activation_backward, py::arg("d_hidden"), py::arg("gate"), py::arg("up"),
        py::arg("d_gate"), py::arg("d_up"), py::arg("hidden"), py::arg("activation"), py::arg("scale"),
        py::arg("stream"));
  m.def("neuron_importance_of_products", &neuron_importance_of_products, py::arg("gate"), py::arg("up"), py::arg("out"),
        py::arg("activation"), py::arg("stream"));
  m.def("token_nll", &token_nll, py::arg("logits"), py::arg("targets"), py::arg("nll"), py::arg("d_logits"),
        py::arg("stream"));
  m.def("rms_norm", &rms_norm, py::arg("x"), py::arg("weight"), py::arg("out"), py::arg("inverse_rms"), py::arg("eps"));
  m.def("rms_norm_backward", &rms_norm_backward, py::arg("d_out"), py::arg("x"), py::arg("weight"),
        py::arg("inverse_rms"), py::arg("dx"));
}

}  // namespace locas
