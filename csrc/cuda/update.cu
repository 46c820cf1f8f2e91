// One optimizer step and the row clip over all slots of all layers in one launch.
//
//      slots [rows, d]    CTA b owns row b. Where d is a multiple of 4 and at most 128 * 4 * 8, a thread holds its part of
//                         the row, kVectors times four floats that lie 128 * 4 apart, in registers: all loads are under
//                         way before the first is used, and each byte moves once. Other widths go through a strided loop,
//                         twice: to step, then to clip and write the rounded copy.
//
// The norm is added up in a fixed order: the result repeats bit for bit.
#include <initializer_list>

#include "../glu_math.h"
#include "elements.cuh"
#include "launch.cuh"

namespace locas::cuda {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / 32;

struct Shared {
  float warp_sums[kWarps];
};

LOCAS_DEVICE double read(const DeviceScalar& scalar) {
  switch (scalar.dtype) {
    case DType::i64: return static_cast<double>(ptx::load(static_cast<const int64_t*>(scalar.data)));
    case DType::f64: return ptx::load(static_cast<const double*>(scalar.data));
    default: return ptx::load(static_cast<const float*>(scalar.data));
  }
}

// The sum over the CTA, the same value in every thread.
LOCAS_DEVICE float block_sum(float value, Shared& shared) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) value += ptx::shuffle_xor(value, mask);
  if (ptx::lane_index() == 0) ptx::store(&shared.warp_sums[ptx::warp_index()], value);
  ptx::sync_threads();
  float total = 0.0f;
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) total += ptx::load(&shared.warp_sums[warp]);
  return total;
}

using Float4 = Elements<float, 4>;
LOCAS_DEVICE Float4 load4(const float* from) { return ptx::load(reinterpret_cast<const Float4*>(from)); }
LOCAS_DEVICE void store4(float* to, Float4 value) { ptx::store(reinterpret_cast<Float4*>(to), value); }

// The two rules: what a row needs besides the slots, and the new value of one element or of four.
struct AdamWRule {
  using Params = AdamWParams;
  static constexpr const char* name = "U update_slots_ (AdamW)";
  AdamWFactors factors;
  const float* __restrict__ grad;
  float* __restrict__ exp_avg;
  float* __restrict__ exp_avg_sq;

  LOCAS_DEVICE AdamWRule(const AdamWParams& p, int64_t first)
      : factors(adamw_factors(p, read(p.step), read(p.learning_rate))),
        grad(p.grad + first), exp_avg(p.exp_avg + first), exp_avg_sq(p.exp_avg_sq + first) {}

  struct Operands {
    Float4 grad, exp_avg, exp_avg_sq;
  };
  LOCAS_DEVICE Operands load(int64_t i) const { return {load4(grad + i), load4(exp_avg + i), load4(exp_avg_sq + i)}; }
  LOCAS_DEVICE Float4 step(int64_t i, Float4 w, Operands o) const {
#pragma unroll
    for (int j = 0; j < 4; ++j)
      w.at[j] = adamw_element(factors, w.at[j], o.grad.at[j], o.exp_avg.at[j], o.exp_avg_sq.at[j]);
    store4(exp_avg + i, o.exp_avg);
    store4(exp_avg_sq + i, o.exp_avg_sq);
    return w;
  }
  LOCAS_DEVICE float step(int64_t i, float w) const {
    float first = ptx::load(exp_avg + i), second = ptx::load(exp_avg_sq + i);
    w = adamw_element(factors, w, ptx::load(grad + i), first, second);
    ptx::store(exp_avg + i, first);
    ptx::store(exp_avg_sq + i, second);
    return w;
  }
};

struct SgdRule {
  using Params = SgdParams;
  static constexpr const char* name = "U update_slots_ (SGD)";
  float learning_rate, decay, momentum;
  const float* __restrict__ grad;
  float* __restrict__ buffer;  // null without momentum

  LOCAS_DEVICE SgdRule(const SgdParams& p, int64_t first)
      : learning_rate(static_cast<float>(read(p.learning_rate))), decay(1.0f - learning_rate * p.weight_decay),
        momentum(p.momentum), grad(p.grad + first), buffer(p.momentum_buffer ? p.momentum_buffer + first : nullptr) {}

  struct Operands {
    Float4 grad, buffer;
  };
  LOCAS_DEVICE Operands load(int64_t i) const { return {load4(grad + i), buffer ? load4(buffer + i) : Float4{}}; }
  LOCAS_DEVICE Float4 step(int64_t i, Float4 w, Operands o) const {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      o.buffer.at[j] = momentum * o.buffer.at[j] + o.grad.at[j];
      w.at[j] = w.at[j] * decay - learning_rate * o.buffer.at[j];
    }
    if (buffer) store4(buffer + i, o.buffer);
    return w;
  }
  LOCAS_DEVICE float step(int64_t i, float w) const {
    float direction = ptx::load(grad + i);
    if (buffer) {
      direction = momentum * ptx::load(buffer + i) + direction;
      ptx::store(buffer + i, direction);
    }
    return w * decay - learning_rate * direction;
  }
};

template <class T, class Rule, int kVectors>
struct UpdateInRegisters {
  using Params = typename Rule::Params;
  static constexpr const char* name = Rule::name;
  static constexpr int threads = kThreads, min_blocks = 1;

  static LOCAS_DEVICE void run(const Params& p, unsigned char* shared) {
    if (p.finite.data && read(p.finite) == 0.0) return;
    const int64_t first = static_cast<int64_t>(ptx::block_index()) * p.d;
    const Rule rule(p, first);
    float* slots = p.slots + first;
    Float4 w[kVectors];
    typename Rule::Operands operands[kVectors];
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      const int64_t i = 4 * (ptx::thread_index() + static_cast<int64_t>(k) * kThreads);
      if (i < p.d) {
        w[k] = load4(slots + i);
        operands[k] = rule.load(i);
      }
    }
    float sum_of_squares = 0.0f;
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      const int64_t i = 4 * (ptx::thread_index() + static_cast<int64_t>(k) * kThreads);
      if (i < p.d) {
        w[k] = rule.step(i, w[k], operands[k]);
#pragma unroll
        for (int j = 0; j < 4; ++j) sum_of_squares += w[k].at[j] * w[k].at[j];
      }
    }
    const float factor = p.clip ? clip_factor(block_sum(sum_of_squares, *reinterpret_cast<Shared*>(shared))) : 1.0f;
    T* copy = p.compute ? static_cast<T*>(p.compute) + first : nullptr;
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      const int64_t i = 4 * (ptx::thread_index() + static_cast<int64_t>(k) * kThreads);
      if (i < p.d) {
        Elements<T, 4> rounded;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          w[k].at[j] *= factor;
          rounded.at[j] = ptx::from_float<T>(w[k].at[j]);
        }
        store4(slots + i, w[k]);
        if (copy) ptx::store(reinterpret_cast<Elements<T, 4>*>(copy + i), rounded);
      }
    }
  }
};

template <class T, class Rule>
struct UpdateAnyWidth {
  using Params = typename Rule::Params;
  static constexpr const char* name = Rule::name;
  static constexpr int threads = kThreads, min_blocks = 1;

  static LOCAS_DEVICE void run(const Params& p, unsigned char* shared) {
    if (p.finite.data && read(p.finite) == 0.0) return;
    const int64_t first = static_cast<int64_t>(ptx::block_index()) * p.d;
    const Rule rule(p, first);
    float* slots = p.slots + first;
    T* copy = p.compute ? static_cast<T*>(p.compute) + first : nullptr;
    float sum_of_squares = 0.0f;
    for (int64_t i = ptx::thread_index(); i < p.d; i += kThreads) {
      const float value = rule.step(i, ptx::load(slots + i));
      ptx::store(slots + i, value);
      sum_of_squares += value * value;
    }
    const float factor = p.clip ? clip_factor(block_sum(sum_of_squares, *reinterpret_cast<Shared*>(shared))) : 1.0f;
    if (factor == 1.0f && copy == nullptr) return;
    for (int64_t i = ptx::thread_index(); i < p.d; i += kThreads) {
      const float value = ptx::load(slots + i) * factor;
      if (factor != 1.0f) ptx::store(slots + i, value);
      if (copy) ptx::store(copy + i, ptx::from_float<T>(value));
    }
  }
};

template <class Rule>
void update(const typename Rule::Params& p, std::initializer_list<const void*> pointers, Queue queue) {
  bool vectors = p.d % 4 == 0;
  for (const void* pointer : pointers) vectors = vectors && reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
  const int64_t per_thread = (p.d / 4 + kThreads - 1) / kThreads;
  with_type(p.compute_dtype, [&]<class T>() {
    if (vectors && per_thread <= 1) launch<UpdateInRegisters<T, Rule, 1>>(p.rows, sizeof(Shared), queue, p);
    else if (vectors && per_thread <= 2) launch<UpdateInRegisters<T, Rule, 2>>(p.rows, sizeof(Shared), queue, p);
    else if (vectors && per_thread <= 4) launch<UpdateInRegisters<T, Rule, 4>>(p.rows, sizeof(Shared), queue, p);
    else if (vectors && per_thread <= 8) launch<UpdateInRegisters<T, Rule, 8>>(p.rows, sizeof(Shared), queue, p);
    else launch<UpdateAnyWidth<T, Rule>>(p.rows, sizeof(Shared), queue, p);
  });
}

}  // namespace

void adamw(const AdamWParams& p, Queue queue) {
  update<AdamWRule>(p, {p.slots, p.grad, p.exp_avg, p.exp_avg_sq, p.compute}, queue);
}

void sgd(const SgdParams& p, Queue queue) {
  update<SgdRule>(p, {p.slots, p.grad, p.momentum_buffer, p.compute}, queue);
}

}  // namespace locas::cuda
