// adamw_slots and sgd_slots (U): one optimizer step and the row clip over all slots of all layers in one launch.
//
//      slots [rows, d]    CTA b owns row b. Where d is a multiple of 4 and at most 128 * 4 * 8, a thread holds its part
//                         of the row, kVectors times four floats that lie 128 * 4 apart, in registers: all loads are
//                         under way before the first is used, and each byte moves once. Other widths go through a
//                         strided loop, twice: to step, then to clip and write the rounded copy.
//
// The norm is added up in a fixed order: the result repeats bit for bit.
#include <initializer_list>

#include "cuda/common/block_sum.cuh"
#include "cuda/common/elements.cuh"
#include "cuda/launch.cuh"
#include "cuda/ptx/convert.cuh"
#include "cuda/ptx/memory.cuh"
#include "cuda/ptx/thread.cuh"
#include "cuda/slots/update_rules.cuh"

namespace locas::cuda {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / 32;

using Shared = WarpSums<float, kWarps>;

template <class T, class Rule, int kVectors>
struct UpdateSlots {
  using Params = typename Rule::Params;
  static constexpr const char* name = Rule::names.in_registers;
  static constexpr int threads = kThreads, min_blocks = 1;

  static LOCAS_DEVICE void run(const Params& p, unsigned char* shared) {
    if (p.finite.data && read(p.finite) == 0.0) return;
    const int64_t first = static_cast<int64_t>(ptx::block_index()) * p.slots.cols;
    const Rule rule(p, first);
    float* slots = static_cast<float*>(p.slots.data) + first;
    Float4 w[kVectors];
    Float4 grad[kVectors];
    typename Rule::States states[kVectors];
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      const int64_t i = 4 * (ptx::thread_index() + static_cast<int64_t>(k) * kThreads);
      if (i < p.slots.cols) {
        w[k] = load4(slots + i);
        grad[k] = load4(static_cast<const float*>(p.grad.data) + first + i);
        states[k] = rule.load(i);
      }
    }
    float sum_of_squares = 0.0f;
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      const int64_t i = 4 * (ptx::thread_index() + static_cast<int64_t>(k) * kThreads);
      if (i < p.slots.cols) {
        w[k] = rule.step(i, w[k], grad[k], states[k]);
#pragma unroll
        for (int j = 0; j < 4; ++j) sum_of_squares += w[k].at[j] * w[k].at[j];
      }
    }
    const float factor = p.clip ? clip_factor(block_sum(sum_of_squares, *reinterpret_cast<Shared*>(shared))) : 1.0f;
    T* copy = p.compute.data ? static_cast<T*>(p.compute.data) + first : nullptr;
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      const int64_t i = 4 * (ptx::thread_index() + static_cast<int64_t>(k) * kThreads);
      if (i < p.slots.cols) {
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
struct UpdateSlotsAnyWidth {
  using Params = typename Rule::Params;
  static constexpr const char* name = Rule::names.any_width;
  static constexpr int threads = kThreads, min_blocks = 1;

  static LOCAS_DEVICE void run(const Params& p, unsigned char* shared) {
    if (p.finite.data && read(p.finite) == 0.0) return;
    const int64_t first = static_cast<int64_t>(ptx::block_index()) * p.slots.cols;
    const Rule rule(p, first);
    float* slots = static_cast<float*>(p.slots.data) + first;
    T* copy = p.compute.data ? static_cast<T*>(p.compute.data) + first : nullptr;
    float sum_of_squares = 0.0f;
    for (int64_t i = ptx::thread_index(); i < p.slots.cols; i += kThreads) {
      const float value =
          rule.step(i, ptx::load(slots + i), ptx::load(static_cast<const float*>(p.grad.data) + first + i));
      ptx::store(slots + i, value);
      sum_of_squares += value * value;
    }
    const float factor = p.clip ? clip_factor(block_sum(sum_of_squares, *reinterpret_cast<Shared*>(shared))) : 1.0f;
    if (factor == 1.0f && copy == nullptr) return;
    for (int64_t i = ptx::thread_index(); i < p.slots.cols; i += kThreads) {
      const float value = ptx::load(slots + i) * factor;
      if (factor != 1.0f) ptx::store(slots + i, value);
      if (copy) ptx::store(copy + i, ptx::from_float<T>(value));
    }
  }
};

template <class Rule>
void update(const typename Rule::Params& p, std::initializer_list<Matrix> matrices, Queue queue) {
  bool vectors = p.slots.cols % 4 == 0;
  for (const Matrix& m : matrices) vectors = vectors && reinterpret_cast<uintptr_t>(m.data) % 16 == 0;
  const int64_t per_thread = (p.slots.cols / 4 + kThreads - 1) / kThreads;
  with_type(p.compute_dtype, [&]<class T>() {
    if (vectors && per_thread <= 1) launch<UpdateSlots<T, Rule, 1>>(p.slots.rows, sizeof(Shared), queue, p);
    else if (vectors && per_thread <= 2) launch<UpdateSlots<T, Rule, 2>>(p.slots.rows, sizeof(Shared), queue, p);
    else if (vectors && per_thread <= 4) launch<UpdateSlots<T, Rule, 4>>(p.slots.rows, sizeof(Shared), queue, p);
    else if (vectors && per_thread <= 8) launch<UpdateSlots<T, Rule, 8>>(p.slots.rows, sizeof(Shared), queue, p);
    else launch<UpdateSlotsAnyWidth<T, Rule>>(p.slots.rows, sizeof(Shared), queue, p);
  });
}

}  // namespace

void adamw_slots(const AdamwSlotsParams& p, Queue queue) {
  update<AdamwSlots>(p, {p.slots, p.grad, p.exp_avg, p.exp_avg_sq, p.compute}, queue);
}

void sgd_slots(const SgdSlotsParams& p, Queue queue) {
  update<SgdSlots>(p, {p.slots, p.grad, p.momentum_buffer, p.compute}, queue);
}

}  // namespace locas::cuda
