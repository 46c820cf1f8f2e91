// Bindings of the kernels between matrix products: activations, importance, loss and norms.
#include "bindings/checks.h"
#include "bindings/dispatch.h"
#include "bindings/module.h"
#include "common/elementwise_params.h"

namespace locas {
namespace {

// A checker of one call over a matrix, which gives the others shape, dtype and device.
Checker matrix_checker(const char* op, const Argument& like) {
  const Checker check(op, like);
  if (like.tensor.ndim != 2) check.fail_shape(like, "[rows, cols]");
  check.like_has_dtype({DType::f32, DType::bf16, DType::f16});
  return check;
}

void glu_activation_forward(const TensorRef& gate, const MaybeTensor& up, const TensorRef& out, int activation,
                            float scale, uintptr_t stream) {
  const Checker check = matrix_checker("glu_activation_forward", {"gate", gate});
  const int64_t rows = gate.shape[0], cols = gate.shape[1];
  GluActivationForwardParams p;
  p.gate = check.matrix({"gate", gate}, rows, cols);
  p.up = check.matrix_or_null("up", up, rows, cols);
  p.out = check.matrix({"out", out}, rows, cols);
  p.scale = scale;
  p.activation = check.activation(activation);
  p.dtype = gate.dtype;
  LOCAS_DISPATCH(glu_activation_forward, p, gate.device, stream);
}

void glu_activation_backward(const TensorRef& d_hidden, const TensorRef& gate, const MaybeTensor& up,
                             const TensorRef& d_gate, const MaybeTensor& d_up, const MaybeTensor& hidden,
                             int activation, float scale, uintptr_t stream) {
  const Checker check = matrix_checker("glu_activation_backward", {"gate", gate});
  const int64_t rows = gate.shape[0], cols = gate.shape[1];
  GluActivationBackwardParams p;
  p.gate = check.matrix({"gate", gate}, rows, cols);
  p.up = check.matrix_or_null("up", up, rows, cols);
  p.d_hidden = check.matrix({"d_hidden", d_hidden}, rows, cols);
  p.d_gate = check.matrix({"d_gate", d_gate}, rows, cols);
  p.d_up = check.matrix_or_null("d_up", d_up, rows, cols);
  if (up.has_value() != d_up.has_value())
    check.fail("d_up", up ? "is None, but up is given; expected both or none"
                          : "is given, but up is None; expected both or none");
  p.hidden = check.matrix_or_null("hidden", hidden, rows, cols);
  p.scale = scale;
  p.activation = check.activation(activation);
  p.dtype = gate.dtype;
  LOCAS_DISPATCH(glu_activation_backward, p, gate.device, stream);
}

void neuron_importance_of_products(const TensorRef& gate, const TensorRef& up, const TensorRef& out, int activation,
                                   uintptr_t stream) {
  const Checker check = matrix_checker("neuron_importance_of_products", {"gate", gate});
  const int64_t rows = gate.shape[0], cols = gate.shape[1];
  if (rows == 0) check.fail_shape({"gate", gate}, "at least one row, of which the mean is taken");
  NeuronImportanceOfProductsParams p;
  p.gate = check.matrix({"gate", gate}, rows, cols);
  p.up = check.matrix({"up", up}, rows, cols);
  p.importance = check.vector<float>({"out", out}, cols);
  p.activation = check.activation(activation);
  p.dtype = gate.dtype;
  LOCAS_DISPATCH(neuron_importance_of_products, p, gate.device, stream);
}

void token_nll(const TensorRef& logits, const TensorRef& targets, const TensorRef& nll, const MaybeTensor& d_logits,
               uintptr_t stream) {
  const Checker check = matrix_checker("token_nll", {"logits", logits});
  const int64_t rows = logits.shape[0], cols = logits.shape[1];
  TokenNllParams p;
  p.logits = check.matrix({"logits", logits}, rows, cols);
  p.d_logits = check.matrix_or_null("d_logits", d_logits, rows, cols);
  p.targets = check.vector<const int64_t>({"targets", targets}, rows);
  p.nll = check.vector<float>({"nll", nll}, rows);
  p.dtype = logits.dtype;
  LOCAS_DISPATCH(token_nll, p, logits.device, stream);
}

void rms_norm(const TensorRef& x, const TensorRef& weight, const TensorRef& out, const MaybeTensor& inverse_rms,
              float eps) {
  const Checker check = matrix_checker("rms_norm", {"x", x});
  check.like_is_on_cpu();
  const int64_t rows = x.shape[0], cols = x.shape[1];
  RmsNormParams p;
  p.x = check.matrix({"x", x}, rows, cols);
  p.weight = check.vector<const void>({"weight", weight}, cols);
  p.out = check.matrix({"out", out}, rows, cols);
  p.inverse_rms = check.vector_or_null<float>("inverse_rms", inverse_rms, rows);
  p.eps = eps;
  p.dtype = x.dtype;
  const py::gil_scoped_release released;
  cpu::kernels().rms_norm(p);
}

void rms_norm_backward(const TensorRef& d_out, const TensorRef& x, const TensorRef& weight,
                       const TensorRef& inverse_rms, const TensorRef& dx) {
  const Checker check = matrix_checker("rms_norm_backward", {"x", x});
  check.like_is_on_cpu();
  const int64_t rows = x.shape[0], cols = x.shape[1];
  RmsNormBackwardParams p;
  p.x = check.matrix({"x", x}, rows, cols);
  p.d_out = check.matrix({"d_out", d_out}, rows, cols);
  p.weight = check.vector<const void>({"weight", weight}, cols);
  p.inverse_rms = check.vector<const float>({"inverse_rms", inverse_rms}, rows);
  p.dx = check.matrix({"dx", dx}, rows, cols);
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
