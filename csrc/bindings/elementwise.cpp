// Bindings of the kernels between matrix products: activations, importance and loss.
#include <cmath>

#include "bindings/checks.h"
#include "bindings/dispatch.h"
#include "bindings/module.h"
#include "common/elementwise_params.h"

namespace locas {
namespace {

void glu_activation_forward(const TensorRef& gate, const MaybeTensor& up, const TensorRef& out, int64_t activation,
                            float scale, uintptr_t stream) {
  const Checker check = matrix_checker("glu_activation_forward", {"gate", gate});
  const int64_t rows = gate.shape[0], cols = gate.shape[1];
  GluActivationForwardParams p;
  p.gate = check.matrix({"gate", gate}, rows, cols);
  p.up = check.matrix_or_null("up", up, rows, cols);
  p.out = check.matrix({"out", out}, rows, cols);
  p.scale = scale;
  p.activation = check.activation(activation, p.params);
  p.dtype = gate.dtype;
  LOCAS_DISPATCH(glu_activation_forward, p, gate.device, stream);
}

void glu_activation_backward(const TensorRef& d_hidden, const TensorRef& gate, const MaybeTensor& up,
                             const TensorRef& d_gate, const MaybeTensor& d_up, const MaybeTensor& hidden,
                             int64_t activation, float scale, uintptr_t stream) {
  const Checker check = matrix_checker("glu_activation_backward", {"gate", gate});
  const int64_t rows = gate.shape[0], cols = gate.shape[1];
  GluActivationBackwardParams p;
  p.gate = check.matrix({"gate", gate}, rows, cols);
  p.up = check.matrix_or_null("up", up, rows, cols);
  p.d_hidden = check.matrix({"d_hidden", d_hidden}, rows, cols);
  p.d_gate = check.matrix({"d_gate", d_gate}, rows, cols);
  p.d_up = check.matrix_or_null("d_up", d_up, rows, cols);
  check.both_or_none("d_up", d_up, "up", up);
  p.hidden = check.matrix_or_null("hidden", hidden, rows, cols);
  p.scale = scale;
  p.activation = check.activation(activation, p.params);
  p.dtype = gate.dtype;
  LOCAS_DISPATCH(glu_activation_backward, p, gate.device, stream);
}

void neuron_importance_of_products(const TensorRef& gate, const TensorRef& up, const TensorRef& out, int64_t activation,
                                   uintptr_t stream) {
  const Checker check = matrix_checker("neuron_importance_of_products", {"gate", gate});
  const int64_t rows = gate.shape[0], cols = gate.shape[1];
  if (rows == 0) check.fail_shape({"gate", gate}, "at least one row, of which the mean is taken");
  NeuronImportanceOfProductsParams p;
  p.gate = check.matrix({"gate", gate}, rows, cols);
  p.up = check.matrix({"up", up}, rows, cols);
  p.importance = check.vector<float>({"out", out}, cols);
  p.activation = check.activation(activation, p.params);
  p.dtype = gate.dtype;
  LOCAS_DISPATCH(neuron_importance_of_products, p, gate.device, stream);
}

void token_nll(const TensorRef& logits, const TensorRef& targets, const TensorRef& nll, const MaybeTensor& d_logits,
               float soft_cap, float logit_scale, uintptr_t stream) {
  const Checker check = matrix_checker("token_nll", {"logits", logits});
  const int64_t rows = logits.shape[0], cols = logits.shape[1];
  TokenNllParams p;
  p.logits = check.matrix({"logits", logits}, rows, cols);
  p.d_logits = check.matrix_or_null("d_logits", d_logits, rows, cols);
  p.targets = check.vector<const int64_t>({"targets", targets}, rows);
  p.nll = check.vector<float>({"nll", nll}, rows);
  if (!(soft_cap >= 0.0f && soft_cap < INFINITY))
    check.fail("soft_cap", "is " + std::to_string(soft_cap) + "; expected a number of at least 0, 0 for no cap");
  if (!(logit_scale > 0.0f && logit_scale < INFINITY))
    check.fail("logit_scale", "is " + std::to_string(logit_scale) + "; expected a number above 0");
  p.soft_cap = soft_cap;
  p.logit_scale = logit_scale;
  p.dtype = logits.dtype;
  LOCAS_DISPATCH(token_nll, p, logits.device, stream);
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
        py::arg("soft_cap"), py::arg("logit_scale"), py::arg("stream"));
}

}  // namespace locas
