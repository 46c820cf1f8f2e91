// GLU, its backward and the neuron importance on the CPU.
#include <algorithm>
#include <cmath>

#include "common/activations.h"
#include "cpu/blocks.h"
#include "cpu/table.h"

namespace locas::cpu::LOCAS_ISA {
namespace {

// What stands for an `up` that is not there.
struct Ones {
  alignas(64) float at[kBlock];
  constexpr Ones() { std::fill(at, at + kBlock, 1.0f); }
};
constinit const Ones ones;

template <class T, Activation act>
void glu_activation_forward_typed(const GluActivationForwardParams& p) {
  for_each_block(p.gate.rows, p.gate.cols, [&](int64_t row, int64_t col, int n) {
    Block<T> gate_block, up_block, out_block;
    const float* gate = gate_block.load(p.gate.at<T>(row, col), n);
    const float* up = p.up.data ? up_block.load(p.up.at<T>(row, col), n) : ones.at;
    float* out = out_block.begin_store(p.out.at<T>(row, col));
#pragma omp simd
    for (int i = 0; i < n; ++i) out[i] = p.scale * activate<act>(gate[i], p.params).value * up[i];
    out_block.end_store(p.out.at<T>(row, col), n);
  });
}

template <class T, Activation act>
void glu_activation_backward_typed(const GluActivationBackwardParams& p) {
  for_each_block(p.gate.rows, p.gate.cols, [&](int64_t row, int64_t col, int n) {
    Block<T> d_hidden_block, gate_block, up_block, d_gate_block, d_up_block, hidden_block;
    const float* d_hidden = d_hidden_block.load(p.d_hidden.at<T>(row, col), n);
    const float* gate = gate_block.load(p.gate.at<T>(row, col), n);
    const float* up = p.up.data ? up_block.load(p.up.at<T>(row, col), n) : ones.at;
    float* d_gate = d_gate_block.begin_store(p.d_gate.at<T>(row, col));
    if (p.hidden.data) {
      float* hidden = hidden_block.begin_store(p.hidden.at<T>(row, col));
#pragma omp simd
      for (int i = 0; i < n; ++i) hidden[i] = p.scale * activate<act>(gate[i], p.params).value * up[i];
      hidden_block.end_store(p.hidden.at<T>(row, col), n);
    }
    if (p.d_up.data) {
      float* d_up = d_up_block.begin_store(p.d_up.at<T>(row, col));
#pragma omp simd
      for (int i = 0; i < n; ++i) {
        const ValueAndSlope a = activate<act>(gate[i], p.params);
        const float d = p.scale * d_hidden[i];
        d_gate[i] = d * up[i] * a.slope;
        d_up[i] = d * a.value;
      }
      d_up_block.end_store(p.d_up.at<T>(row, col), n);
    } else {
#pragma omp simd
      for (int i = 0; i < n; ++i) d_gate[i] = p.scale * d_hidden[i] * activate<act>(gate[i], p.params).slope;
    }
    d_gate_block.end_store(p.d_gate.at<T>(row, col), n);
  });
}

// A block of columns belongs to one thread, which adds the rows up in their order: the same sum for any thread count.
template <class T, Activation act>
void neuron_importance_of_products_typed(const NeuronImportanceOfProductsParams& p) {
  const int64_t rows = p.gate.rows, cols = p.gate.cols, blocks = (cols + kBlock - 1) / kBlock;
#pragma omp parallel for schedule(static) if (rows * cols >= kParallelElements)
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t col = block * kBlock;
    const int n = static_cast<int>(std::min<int64_t>(kBlock, cols - col));
    double sums[kBlock] = {};
    Block<T> gate_block, up_block;
    for (int64_t row = 0; row < rows; ++row) {
      const float* gate = gate_block.load(p.gate.at<T>(row, col), n);
      const float* up = up_block.load(p.up.at<T>(row, col), n);
#pragma omp simd
      for (int i = 0; i < n; ++i) sums[i] += std::fabs(activate<act>(gate[i], p.params).value * up[i]);
    }
    for (int i = 0; i < n; ++i) p.importance[col + i] = static_cast<float>(sums[i] / rows);
  }
}

}  // namespace

void glu_activation_forward(const GluActivationForwardParams& p) {
  with_type(p.dtype, [&]<class T>() {
    with_any_activation(p.activation, [&]<Activation act>() { glu_activation_forward_typed<T, act>(p); });
  });
}

void glu_activation_backward(const GluActivationBackwardParams& p) {
  with_type(p.dtype, [&]<class T>() {
    with_any_activation(p.activation, [&]<Activation act>() { glu_activation_backward_typed<T, act>(p); });
  });
}

void neuron_importance_of_products(const NeuronImportanceOfProductsParams& p) {
  with_type(p.dtype, [&]<class T>() {
    with_any_activation(p.activation, [&]<Activation act>() { neuron_importance_of_products_typed<T, act>(p); });
  });
}

}  // namespace locas::cpu::LOCAS_ISA
