// What the bindings of the FFN on the CPU and on CUDA have in common.
#pragma once

#include "bindings/checks.h"
#include "common/ffn_params.h"

namespace locas {

// gate, up, down and their biases in the order of HostWeights, then the slots as in SlotViews.
struct FfnTensors {
  const TensorRef &gate, &up, &down;
  const MaybeTensor &gate_bias, &up_bias, &down_bias;
  const TensorRef &gate_key, &value;
};

// [tokens, d] in a dtype that the kernels take.
inline void check_x(const Checker& check, const TensorRef& x, std::initializer_list<DType> dtypes) {
  check.like_has_dtype(dtypes);
  if (x.ndim != 2) check.fail_shape({"x", x}, "[tokens, d]");
}

// The sizes that x, gate and value have; the checks of the weights hold the others against them.
inline FfnSizes ffn_sizes(const TensorRef& x, const TensorRef& gate, const TensorRef& value) {
  return {x.shape[1], gate.ndim == 2 ? gate.shape[0] : 0, value.ndim == 2 ? value.shape[0] : 0};
}

// gate_key [2r, d] as gate and key rows.
struct GateAndKey {
  Matrix gate, key;
};
inline GateAndKey split(const Matrix& gate_key, int64_t element_size) {
  const int64_t r = gate_key.rows / 2;
  char* data = static_cast<char*>(gate_key.data);
  return {{data, r, gate_key.cols, gate_key.stride},
          {data + element_size * r * gate_key.stride, r, gate_key.cols, gate_key.stride}};
}

// float32 [3, r, d] as [3 r, d].
inline Matrix slots_grad_rows(const Checker& check, const TensorRef& slots_grad, const FfnSizes& s) {
  check.contiguous<float>({"slots_grad", slots_grad}, {3, s.r, s.d});
  return {slots_grad.data, 3 * s.r, s.d, s.d};
}

}  // namespace locas
