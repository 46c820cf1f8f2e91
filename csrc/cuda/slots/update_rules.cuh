// AdamW and SGD as the update kernels see them, on a row of slots that begins at element `first`.
#pragma once

#include "common/slot_math.h"
#include "cuda/common/elements.cuh"
#include "cuda/ptx/memory.cuh"

namespace locas::cuda {

LOCAS_DEVICE double read(const DeviceScalar& scalar) {
  switch (scalar.dtype) {
    case DType::i64: return static_cast<double>(ptx::load(static_cast<const int64_t*>(scalar.data)));
    case DType::f64: return ptx::load(static_cast<const double*>(scalar.data));
    default: return ptx::load(static_cast<const float*>(scalar.data));
  }
}

using Float4 = Elements<float, 4>;
LOCAS_DEVICE Float4 load4(const float* from) { return ptx::load(reinterpret_cast<const Float4*>(from)); }
LOCAS_DEVICE void store4(float* to, Float4 value) { ptx::store(reinterpret_cast<Float4*>(to), value); }

// What the kernels of a rule are called in messages: rows in registers and rows of any width (update.cu), and the
// gradient from factors (update_from_factors.cu).
struct KernelNames {
  const char *in_registers, *any_width, *from_factors;
};

// The two rules: what a row needs besides slots and gradient, and the new value of one element or of four.
struct AdamwSlots {
  using Params = AdamwSlotsParams;
  static constexpr KernelNames names = {"adamw_slots", "adamw_slots_any_width", "adamw_slots_from_factors"};
  AdamwFactors factors;
  float* __restrict__ exp_avg;
  float* __restrict__ exp_avg_sq;

  LOCAS_DEVICE AdamwSlots(const AdamwSlotsParams& p, int64_t first)
      : factors(adamw_factors(p, read(p.step), read(p.learning_rate))),
        exp_avg(static_cast<float*>(p.exp_avg.data) + first),
        exp_avg_sq(static_cast<float*>(p.exp_avg_sq.data) + first) {}

  struct States {
    Float4 exp_avg, exp_avg_sq;
  };
  LOCAS_DEVICE States load(int64_t i) const { return {load4(exp_avg + i), load4(exp_avg_sq + i)}; }
  LOCAS_DEVICE Float4 step(int64_t i, Float4 w, Float4 grad, States o) const {
#pragma unroll
    for (int j = 0; j < 4; ++j)
      w.at[j] = adamw_element(factors, w.at[j], grad.at[j], o.exp_avg.at[j], o.exp_avg_sq.at[j]);
    store4(exp_avg + i, o.exp_avg);
    store4(exp_avg_sq + i, o.exp_avg_sq);
    return w;
  }
  LOCAS_DEVICE float step(int64_t i, float w, float grad) const {
    float first = ptx::load(exp_avg + i), second = ptx::load(exp_avg_sq + i);
    w = adamw_element(factors, w, grad, first, second);
    ptx::store(exp_avg + i, first);
    ptx::store(exp_avg_sq + i, second);
    return w;
  }
};

struct SgdSlots {
  using Params = SgdSlotsParams;
  static constexpr KernelNames names = {"sgd_slots", "sgd_slots_any_width", "sgd_slots_from_factors"};
  float learning_rate, decay, momentum;
  float* __restrict__ buffer;  // null without momentum

  LOCAS_DEVICE SgdSlots(const SgdSlotsParams& p, int64_t first)
      : learning_rate(static_cast<float>(read(p.learning_rate))), decay(1.0f - learning_rate * p.weight_decay),
        momentum(p.momentum),
        buffer(p.momentum_buffer.data ? static_cast<float*>(p.momentum_buffer.data) + first : nullptr) {}

  struct States {
    Float4 buffer;
  };
  LOCAS_DEVICE States load(int64_t i) const { return {buffer ? load4(buffer + i) : Float4{}}; }
  LOCAS_DEVICE Float4 step(int64_t i, Float4 w, Float4 grad, States o) const {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      o.buffer.at[j] = momentum * o.buffer.at[j] + grad.at[j];
      w.at[j] = w.at[j] * decay - learning_rate * o.buffer.at[j];
    }
    if (buffer) store4(buffer + i, o.buffer);
    return w;
  }
  LOCAS_DEVICE float step(int64_t i, float w, float direction) const {
    if (buffer) {
      direction = momentum * ptx::load(buffer + i) + direction;
      ptx::store(buffer + i, direction);
    }
    return w * decay - learning_rate * direction;
  }
};

}  // namespace locas::cuda
