// Bindings of the slots' update: AdamW and SGD with the row clip, from a gradient or from its factors.
#include <array>
#include <cmath>
#include <vector>

#include "bindings/checks.h"
#include "bindings/dispatch.h"
#include "bindings/module.h"
#include "bindings/slot_checks.h"
#include "common/slot_params.h"

namespace locas {
namespace {

DeviceScalar scalar(const char* op, const Named& t, const TensorRef& slots) {
  if (t.tensor.numel() != 1) fail(op, t, "has shape " + t.tensor.shape_text() + "; expected a 0-d tensor");
  if (t.tensor.dtype != DType::f32 && t.tensor.dtype != DType::f64 && t.tensor.dtype != DType::i64)
    fail(op, t, "must be float32, float64 or int64");
  if (t.tensor.device != slots.device) fail(op, t, "lies on another device than slots");
  return {t.tensor.data, t.tensor.dtype};
}

void slot_rows(const char* op, const TensorRef& slots, int64_t& rows, int64_t& d) {
  if (slots.ndim < 1) fail(op, {"slots", slots}, "has no dimensions; expected [..., d]");
  d = slots.shape[slots.ndim - 1];
  rows = d == 0 ? 0 : slots.numel() / d;
}

// Everything of an AdamW step but the gradient.
AdamwSlotsParams adamw_params(const char* op, const TensorRef& slots, const TensorRef& exp_avg,
                              const TensorRef& exp_avg_sq, const TensorRef& step, const TensorRef& learning_rate,
                              double beta1, double beta2, float eps, float weight_decay, bool clip,
                              const MaybeTensor& compute, const MaybeTensor& finite) {
  AdamwSlotsParams p{};
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

SgdSlotsParams sgd_params(const char* op, const TensorRef& slots, const MaybeTensor& momentum_buffer,
                          const TensorRef& learning_rate, float momentum, float weight_decay, bool clip,
                          const MaybeTensor& compute, const MaybeTensor& finite) {
  SgdSlotsParams p{};
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

void adamw_slots(const TensorRef& slots, const TensorRef& grad, const TensorRef& exp_avg, const TensorRef& exp_avg_sq,
                 const TensorRef& step, const TensorRef& learning_rate, double beta1, double beta2, float eps,
                 float weight_decay, bool clip, const MaybeTensor& compute, const MaybeTensor& finite,
                 uintptr_t stream) {
  constexpr const char* op = "adamw_slots";
  AdamwSlotsParams p = adamw_params(op, slots, exp_avg, exp_avg_sq, step, learning_rate, beta1, beta2, eps,
                                    weight_decay, clip, compute, finite);
  p.grad = slot_state(op, {"grad", grad}, slots);
  LOCAS_DISPATCH(adamw_slots, p, slots.device, stream);
}

void sgd_slots(const TensorRef& slots, const TensorRef& grad, const MaybeTensor& momentum_buffer,
               const TensorRef& learning_rate, float momentum, float weight_decay, bool clip,
               const MaybeTensor& compute, const MaybeTensor& finite, uintptr_t stream) {
  constexpr const char* op = "sgd_slots";
  SgdSlotsParams p =
      sgd_params(op, slots, momentum_buffer, learning_rate, momentum, weight_decay, clip, compute, finite);
  p.grad = slot_state(op, {"grad", grad}, slots);
  LOCAS_DISPATCH(sgd_slots, p, slots.device, stream);
}

// The 5 tensors of each layer's SlotFactors: d_gate, d_key, hidden [tokens, r], x, dy [tokens, d].
LayerFactors layer_factors(const char* op, const std::vector<std::array<TensorRef, 5>>& layers, float scale,
                           const TensorRef& compute, const TensorRef& slots) {
  LayerFactors p{};
  if (slots.ndim != 4 || slots.shape[1] != 3 || layers.size() != static_cast<size_t>(slots.shape[0]))
    fail(op, {"slots", slots},
         "has shape " + slots.shape_text() + "; expected [" + std::to_string(layers.size()) + ", 3, r, d]");
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
    fail(op, {"x", x},
         "has shape " + x.shape_text() + "; expected 1 to " + std::to_string(LayerFactors::kMostTokens) + " tokens");
  if (d % 8 != 0 || d > LayerFactors::kMostWidth)
    fail(op, {"slots", slots},
         "has rows of " + std::to_string(d) + "; expected a multiple of 8, at most " +
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

void adamw_slots_from_factors(const TensorRef& slots, const TensorRef& exp_avg, const TensorRef& exp_avg_sq,
                              const TensorRef& step, const TensorRef& learning_rate, double beta1, double beta2,
                              float eps, float weight_decay, bool clip, const TensorRef& compute,
                              const MaybeTensor& finite, const FactorTensors& factors, float factor_scale,
                              uintptr_t stream) {
  constexpr const char* op = "adamw_slots_from_factors";
  const AdamwSlotsParams p = adamw_params(op, slots, exp_avg, exp_avg_sq, step, learning_rate, beta1, beta2, eps,
                                          weight_decay, clip, compute, finite);
  const LayerFactors layers = layer_factors(op, factors, factor_scale, compute, slots);
  LOCAS_LAUNCH_CUDA(adamw_slots_from_factors, slots, stream, p, layers);
}

void sgd_slots_from_factors(const TensorRef& slots, const MaybeTensor& momentum_buffer, const TensorRef& learning_rate,
                            float momentum, float weight_decay, bool clip, const TensorRef& compute,
                            const MaybeTensor& finite, const FactorTensors& factors, float factor_scale,
                            uintptr_t stream) {
  constexpr const char* op = "sgd_slots_from_factors";
  const SgdSlotsParams p =
      sgd_params(op, slots, momentum_buffer, learning_rate, momentum, weight_decay, clip, compute, finite);
  const LayerFactors layers = layer_factors(op, factors, factor_scale, compute, slots);
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
