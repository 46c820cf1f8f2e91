// Bindings of the slots' update: AdamW and SGD with the row clip, from a gradient or from its factors.
#include <array>
#include <cmath>
#include <vector>

#include "bindings/checks.h"
#include "bindings/dispatch.h"
#include "bindings/module.h"
#include "bindings/slot_checks.h"
#include "common/ffn_params.h"
#include "common/slot_params.h"

namespace locas {
namespace {

// Errors bear the name of the public op, which leaves these checks to its kernels.
constexpr const char *kAdamwOp = "update_slots_", *kSgdOp = "sgd_slots_";

DeviceScalar scalar(const Checker& check, const Argument& a) {
  if (a.tensor.numel() != 1) check.fail_shape(a, "a 0-d tensor");
  check.has_dtype(a, {DType::f32, DType::f64, DType::i64});
  check.is_beside_like(a);
  return {a.tensor.data, a.tensor.dtype};
}

DeviceScalar finite_or_null(const Checker& check, const MaybeTensor& finite) {
  return finite ? scalar(check, {"finite", *finite}) : DeviceScalar{nullptr, DType::f32};
}

// Everything of an AdamW step but the gradient.
AdamwSlotsParams adamw_params(const Checker& check, const TensorRef& slots, const TensorRef& exp_avg,
                              const TensorRef& exp_avg_sq, const TensorRef& step, const TensorRef& learning_rate,
                              double beta1, double beta2, float eps, float weight_decay, bool clip,
                              const MaybeTensor& compute, const MaybeTensor& finite) {
  const Argument shape{"slots", slots};
  AdamwSlotsParams p{};
  p.slots = slots.as_rows();
  p.exp_avg = check.rows<float>({"exp_avg", exp_avg}, shape);
  p.exp_avg_sq = check.rows<float>({"exp_avg_sq", exp_avg_sq}, shape);
  p.compute = compute_copy(check, compute, slots);
  p.compute_dtype = dtype_of_copy(compute);
  p.step = scalar(check, {"step", step});
  p.learning_rate = scalar(check, {"learning_rate", learning_rate});
  p.beta1 = beta1;
  p.beta2 = beta2;
  p.log_beta1 = static_cast<float>(std::log(beta1));
  p.log_beta2 = static_cast<float>(std::log(beta2));
  p.eps = eps;
  p.weight_decay = weight_decay;
  p.clip = clip;
  p.finite = finite_or_null(check, finite);
  return p;
}

// Everything of an SGD step but the gradient.
SgdSlotsParams sgd_params(const Checker& check, const TensorRef& slots, const MaybeTensor& momentum_buffer,
                          const TensorRef& learning_rate, float momentum, float weight_decay, bool clip,
                          const MaybeTensor& compute, const MaybeTensor& finite) {
  SgdSlotsParams p{};
  p.slots = slots.as_rows();
  if (momentum_buffer) p.momentum_buffer = check.rows<float>({"momentum_buffer", *momentum_buffer}, {"slots", slots});
  p.compute = compute_copy(check, compute, slots);
  p.compute_dtype = dtype_of_copy(compute);
  p.learning_rate = scalar(check, {"learning_rate", learning_rate});
  p.momentum = momentum;
  p.weight_decay = weight_decay;
  p.clip = clip;
  p.finite = finite_or_null(check, finite);
  return p;
}

void adamw_slots(const TensorRef& slots, const TensorRef& grad, const TensorRef& exp_avg, const TensorRef& exp_avg_sq,
                 const TensorRef& step, const TensorRef& learning_rate, double beta1, double beta2, float eps,
                 float weight_decay, bool clip, const MaybeTensor& compute, const MaybeTensor& finite,
                 uintptr_t stream) {
  const Checker check = slots_checker(kAdamwOp, slots);
  AdamwSlotsParams p = adamw_params(check, slots, exp_avg, exp_avg_sq, step, learning_rate, beta1, beta2, eps,
                                    weight_decay, clip, compute, finite);
  p.grad = check.rows<float>({"grad", grad}, {"slots", slots});
  check_apart(check, {{"slots", &slots}, {"exp_avg", &exp_avg}, {"exp_avg_sq", &exp_avg_sq}, part("compute", compute)},
              {{"grad", &grad}});
  LOCAS_DISPATCH(adamw_slots, p, slots.device, stream);
}

void sgd_slots(const TensorRef& slots, const TensorRef& grad, const MaybeTensor& momentum_buffer,
               const TensorRef& learning_rate, float momentum, float weight_decay, bool clip,
               const MaybeTensor& compute, const MaybeTensor& finite, uintptr_t stream) {
  const Checker check = slots_checker(kSgdOp, slots);
  SgdSlotsParams p =
      sgd_params(check, slots, momentum_buffer, learning_rate, momentum, weight_decay, clip, compute, finite);
  p.grad = check.rows<float>({"grad", grad}, {"slots", slots});
  check_apart(check, {{"slots", &slots}, part("momentum_buffer", momentum_buffer), part("compute", compute)},
              {{"grad", &grad}});
  LOCAS_DISPATCH(sgd_slots, p, slots.device, stream);
}

// The 5 tensors of each layer's SlotFactors: d_gate, d_key, hidden [tokens, r], x, dy [tokens, d].
using FactorTensors = std::vector<std::array<TensorRef, 5>>;

// Of x and slots, what the kernel is built for.
void check_limits(const Checker& check, const TensorRef& x, const TensorRef& slots) {
  if (x.ndim != 2 || x.shape[0] < 1 || x.shape[0] > kMostFactorTokens)
    check.fail_shape({"x", x}, "[tokens, d], 1 to " + std::to_string(kMostFactorTokens) + " tokens");
  const int64_t d = slots.shape[3];
  if (d % kPieceElements != 0 || d > kMostFactorWidth)
    check.fail_shape({"slots", slots}, "[layers, 3, r, d], d a multiple of " + std::to_string(kPieceElements) +
                                           " and at most " + std::to_string(kMostFactorWidth));
}

LayerFactors layer_factors(const char* op, const FactorTensors& layers, float scale, const TensorRef& compute,
                           const TensorRef& slots) {
  const Checker of_slots(op, {"slots", slots});
  if (layers.empty() || layers.size() > static_cast<size_t>(kMostFactorLayers))
    of_slots.fail("factors", "has " + std::to_string(layers.size()) + " layers; expected 1 to " +
                                 std::to_string(kMostFactorLayers));
  if (slots.ndim != 4 || slots.shape[1] != 3 || layers.size() != static_cast<size_t>(slots.shape[0]))
    of_slots.fail_shape({"slots", slots}, "[" + std::to_string(layers.size()) + ", 3, r, d]");
  const TensorRef& first_x = layers[0][3];
  const Checker check(op, {"x", first_x});
  check.like_has_dtype({DType::bf16, DType::f16});
  of_slots.is_beside_like({"x", first_x});
  check_limits(check, first_x, slots);
  check.has_dtype({"compute", compute}, {first_x.dtype});
  LayerFactors p{};
  p.count = static_cast<int>(layers.size());
  p.scale = scale;
  p.dtype = first_x.dtype;
  const int64_t tokens = first_x.shape[0], r = slots.shape[2], d = slots.shape[3];
  for (size_t layer = 0; layer < layers.size(); ++layer) {
    const auto& [d_gate, d_key, hidden, x, dy] = layers[layer];
    p.layers[layer] = {check.matrix({"d_gate", d_gate}, tokens, r), check.matrix({"d_key", d_key}, tokens, r),
                       check.matrix({"hidden", hidden}, tokens, r), check.pieces({"x", x}, tokens, d),
                       check.pieces({"dy", dy}, tokens, d)};
  }
  return p;
}

void adamw_slots_from_factors(const TensorRef& slots, const TensorRef& exp_avg, const TensorRef& exp_avg_sq,
                              const TensorRef& step, const TensorRef& learning_rate, double beta1, double beta2,
                              float eps, float weight_decay, bool clip, const TensorRef& compute,
                              const MaybeTensor& finite, const FactorTensors& factors, float factor_scale,
                              uintptr_t stream) {
  const AdamwSlotsParams p = adamw_params(slots_checker(kAdamwOp, slots), slots, exp_avg, exp_avg_sq, step,
                                          learning_rate, beta1, beta2, eps, weight_decay, clip, compute, finite);
  const LayerFactors layers = layer_factors(kAdamwOp, factors, factor_scale, compute, slots);
  LOCAS_LAUNCH_CUDA(adamw_slots_from_factors, slots, stream, p, layers);
}

void sgd_slots_from_factors(const TensorRef& slots, const MaybeTensor& momentum_buffer, const TensorRef& learning_rate,
                            float momentum, float weight_decay, bool clip, const TensorRef& compute,
                            const MaybeTensor& finite, const FactorTensors& factors, float factor_scale,
                            uintptr_t stream) {
  const SgdSlotsParams p = sgd_params(slots_checker(kSgdOp, slots), slots, momentum_buffer, learning_rate, momentum,
                                      weight_decay, clip, compute, finite);
  const LayerFactors layers = layer_factors(kSgdOp, factors, factor_scale, compute, slots);
  LOCAS_LAUNCH_CUDA(sgd_slots_from_factors, slots, stream, p, layers);
}

}  // namespace

void bind_update_slots(py::module_& m) {
  m.def("adamw_slots", &adamw_slots, py::arg("slots"), py::arg("grad"), py::arg("exp_avg"), py::arg("exp_avg_sq"),
        py::arg("step"), py::arg("learning_rate"), py::arg("beta1"), py::arg("beta2"), py::arg("eps"),
        py::arg("weight_decay"), py::arg("clip"), py::arg("compute"), py::arg("finite"), py::arg("stream"));
  m.def("sgd_slots", &sgd_slots, py::arg("slots"), py::arg("grad"), py::arg("momentum_buffer"),
        py::arg("learning_rate"), py::arg("momentum"), py::arg("weight_decay"), py::arg("clip"), py::arg("compute"),
        py::arg("finite"), py::arg("stream"));
  m.def("adamw_slots_from_factors", &adamw_slots_from_factors, py::arg("slots"), py::arg("exp_avg"),
        py::arg("exp_avg_sq"), py::arg("step"), py::arg("learning_rate"), py::arg("beta1"), py::arg("beta2"),
        py::arg("eps"), py::arg("weight_decay"), py::arg("clip"), py::arg("compute"), py::arg("finite"),
        py::arg("factors"), py::arg("factor_scale"), py::arg("stream"));
  m.def("sgd_slots_from_factors", &sgd_slots_from_factors, py::arg("slots"), py::arg("momentum_buffer"),
        py::arg("learning_rate"), py::arg("momentum"), py::arg("weight_decay"), py::arg("clip"), py::arg("compute"),
        py::arg("finite"), py::arg("factors"), py::arg("factor_scale"), py::arg("stream"));
}

}  // namespace locas
