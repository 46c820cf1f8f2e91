// The CPU kernels, readable: they are also the specification of the CUDA ones. Compiled once per instruction set with
// LOCAS_ISA naming the namespace. Rows go through in blocks of kBlock floats that stay in the first-level cache; plain
// loops over a block are what the compiler vectorises.
#include "cpu/kernels.h"

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "common/activations.h"
#include "common/slot_math.h"
#include "cpu/half.h"

namespace locas::cpu::LOCAS_ISA {
namespace {

constexpr int kBlock = 256;
// Below this many elements a second thread costs more than it saves.
constexpr int64_t kParallelElements = 1 << 15;

// A block of T seen as floats: in place for float, through a small buffer for the half types.
template <class T>
struct Block {
  alignas(64) float buffer[std::is_same_v<T, float> ? 1 : kBlock];

  const float* load(const T* from, int n) {
    if constexpr (std::is_same_v<T, float>) {
      return from;
    } else {
      load_block(from, buffer, n);
      return buffer;
    }
  }
  float* begin_store(T* to) {
    if constexpr (std::is_same_v<T, float>) return to;
    else return buffer;
  }
  void end_store(T* to, int n) {
    if constexpr (!std::is_same_v<T, float>) store_block(buffer, to, n);
  }
};

template <class F>
void with_type(DType dtype, F&& f) {
  switch (dtype) {
    case DType::f32: return f.template operator()<float>();
    case DType::bf16: return f.template operator()<bf16>();
    default: return f.template operator()<f16>();
  }
}

// Calls f(row, first column, columns) for every block, over the threads when there is enough to do.
template <class F>
void for_each_block(int64_t rows, int64_t cols, F&& f) {
  const int64_t blocks = (cols + kBlock - 1) / kBlock;
#pragma omp parallel for collapse(2) schedule(static) if (rows * cols >= kParallelElements)
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t block = 0; block < blocks; ++block)
      f(row, block * kBlock, static_cast<int>(std::min<int64_t>(kBlock, cols - block * kBlock)));
}

template <class T>
T* at(const Rows& m, int64_t row, int64_t col) {
  return static_cast<T*>(m.data) + row * m.stride + col;
}

// What stands for an `up` that is not there.
struct Ones {
  alignas(64) float at[kBlock];
  constexpr Ones() { std::fill(at, at + kBlock, 1.0f); }
};
constinit const Ones ones;

template <class T, Activation act>
void glu_forward_typed(const GluForwardParams& p) {
  for_each_block(p.rows, p.cols, [&](int64_t row, int64_t col, int n) {
    Block<T> gate_block, up_block, out_block;
    const float* gate = gate_block.load(at<T>(p.gate, row, col), n);
    const float* up = p.up.data ? up_block.load(at<T>(p.up, row, col), n) : ones.at;
    float* out = out_block.begin_store(at<T>(p.out, row, col));
#pragma omp simd
    for (int i = 0; i < n; ++i) out[i] = p.scale * activate<act>(gate[i]).value * up[i];
    out_block.end_store(at<T>(p.out, row, col), n);
  });
}

template <class T, Activation act>
void glu_backward_typed(const GluBackwardParams& p) {
  for_each_block(p.rows, p.cols, [&](int64_t row, int64_t col, int n) {
    Block<T> d_hidden_block, gate_block, up_block, d_gate_block, d_up_block, hidden_block;
    const float* d_hidden = d_hidden_block.load(at<T>(p.d_hidden, row, col), n);
    const float* gate = gate_block.load(at<T>(p.gate, row, col), n);
    const float* up = p.up.data ? up_block.load(at<T>(p.up, row, col), n) : ones.at;
    float* d_gate = d_gate_block.begin_store(at<T>(p.d_gate, row, col));
    if (p.hidden.data) {
      float* hidden = hidden_block.begin_store(at<T>(p.hidden, row, col));
#pragma omp simd
      for (int i = 0; i < n; ++i) hidden[i] = p.scale * activate<act>(gate[i]).value * up[i];
      hidden_block.end_store(at<T>(p.hidden, row, col), n);
    }
    if (p.d_up.data) {
      float* d_up = d_up_block.begin_store(at<T>(p.d_up, row, col));
#pragma omp simd
      for (int i = 0; i < n; ++i) {
        const ValueAndSlope a = activate<act>(gate[i]);
        const float d = p.scale * d_hidden[i];
        d_gate[i] = d * up[i] * a.slope;
        d_up[i] = d * a.value;
      }
      d_up_block.end_store(at<T>(p.d_up, row, col), n);
    } else {
#pragma omp simd
      for (int i = 0; i < n; ++i) d_gate[i] = p.scale * d_hidden[i] * activate<act>(gate[i]).slope;
    }
    d_gate_block.end_store(at<T>(p.d_gate, row, col), n);
  });
}

// A block of columns belongs to one thread, which adds the rows up in their order: the same sum for any thread count.
template <class T, Activation act>
void importance_typed(const ImportanceParams& p) {
  const int64_t blocks = (p.cols + kBlock - 1) / kBlock;
#pragma omp parallel for schedule(static) if (p.rows * p.cols >= kParallelElements)
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t col = block * kBlock;
    const int n = static_cast<int>(std::min<int64_t>(kBlock, p.cols - col));
    double sums[kBlock] = {};
    Block<T> gate_block, up_block;
    for (int64_t row = 0; row < p.rows; ++row) {
      const float* gate = gate_block.load(at<T>(p.gate, row, col), n);
      const float* up = up_block.load(at<T>(p.up, row, col), n);
#pragma omp simd
      for (int i = 0; i < n; ++i) sums[i] += std::fabs(activate<act>(gate[i]).value * up[i]);
    }
    for (int i = 0; i < n; ++i) p.importance[col + i] = static_cast<float>(sums[i] / p.rows);
  }
}

void glu_forward(const GluForwardParams& p) {
  with_type(p.dtype, [&]<class T>() {
    with_activation(p.activation, [&]<Activation act>() { glu_forward_typed<T, act>(p); });
  });
}

void glu_backward(const GluBackwardParams& p) {
  with_type(p.dtype, [&]<class T>() {
    with_activation(p.activation, [&]<Activation act>() { glu_backward_typed<T, act>(p); });
  });
}

void importance(const ImportanceParams& p) {
  with_type(p.dtype, [&]<class T>() {
    with_activation(p.activation, [&]<Activation act>() { importance_typed<T, act>(p); });
  });
}

// A row belongs to one thread, which goes over it twice, three times with the gradient: maximum, sum, gradient.
template <class T>
void cross_entropy_typed(const CrossEntropyParams& p) {
#pragma omp parallel for schedule(static) if (p.rows * p.cols >= kParallelElements)
  for (int64_t row = 0; row < p.rows; ++row) {
    Block<T> block;
    const auto for_each_block_of_row = [&](auto&& f) {
      for (int64_t col = 0; col < p.cols; col += kBlock) {
        const int n = static_cast<int>(std::min<int64_t>(kBlock, p.cols - col));
        f(block.load(at<T>(p.logits, row, col), n), col, n);
      }
    };
    float maximum = -INFINITY;
    for_each_block_of_row([&](const float* x, int64_t, int n) {
#pragma omp simd reduction(max : maximum)
      for (int i = 0; i < n; ++i) maximum = x[i] > maximum ? x[i] : maximum;
    });
    double sum = 0.0;
    for_each_block_of_row([&](const float* x, int64_t, int n) {
      float part = 0.0f;
#pragma omp simd reduction(+ : part)
      for (int i = 0; i < n; ++i) part += fast_exp(x[i] - maximum);
      sum += part;
    });
    float target;
    load_block(at<T>(p.logits, row, p.targets[row]), &target, 1);
    p.nll[row] = static_cast<float>(std::log(sum) + maximum - target);
    if (!p.d_logits.data) continue;
    const float inverse = static_cast<float>(1.0 / sum);
    for_each_block_of_row([&](const float* x, int64_t col, int n) {
      Block<T> out_block;
      T* to = at<T>(p.d_logits, row, col);
      float* out = out_block.begin_store(to);
#pragma omp simd
      for (int i = 0; i < n; ++i) out[i] = fast_exp(x[i] - maximum) * inverse;
      const int64_t hit = p.targets[row] - col;
      if (hit >= 0 && hit < n) out[hit] -= 1.0f;
      out_block.end_store(to, n);
    });
  }
}

void cross_entropy(const CrossEntropyParams& p) {
  with_type(p.dtype, [&]<class T>() { cross_entropy_typed<T>(p); });
}

template <class T>
float rounded(float x) {
  if constexpr (std::is_same_v<T, float>) {
    return x;
  } else {
    T narrow;
    store_block(&x, &narrow, 1);
    load_block(&narrow, &x, 1);
    return x;
  }
}

template <class T>
void rms_norm_typed(const RmsNormParams& p) {
#pragma omp parallel for schedule(static) if (p.rows * p.cols >= kParallelElements)
  for (int64_t row = 0; row < p.rows; ++row) {
    Block<T> x_block, weight_block, out_block;
    float sum = 0.0f;
    for (int64_t col = 0; col < p.cols; col += kBlock) {
      const int n = static_cast<int>(std::min<int64_t>(kBlock, p.cols - col));
      const float* x = x_block.load(at<T>(p.x, row, col), n);
#pragma omp simd reduction(+ : sum)
      for (int i = 0; i < n; ++i) sum += x[i] * x[i];
    }
    const float inverse = 1.0f / std::sqrt(sum / p.cols + p.eps);
    if (p.inverse_rms) p.inverse_rms[row] = inverse;
    for (int64_t col = 0; col < p.cols; col += kBlock) {
      const int n = static_cast<int>(std::min<int64_t>(kBlock, p.cols - col));
      const float* x = x_block.load(at<T>(p.x, row, col), n);
      const float* weight = weight_block.load(static_cast<const T*>(p.weight) + col, n);
      T* to = at<T>(p.out, row, col);
      float* out = out_block.begin_store(to);
#pragma omp simd
      for (int i = 0; i < n; ++i) out[i] = weight[i] * rounded<T>(x[i] * inverse);
      out_block.end_store(to, n);
    }
  }
}

template <class T>
void rms_norm_backward_typed(const RmsNormBackwardParams& p) {
#pragma omp parallel for schedule(static) if (p.rows * p.cols >= kParallelElements)
  for (int64_t row = 0; row < p.rows; ++row) {
    Block<T> d_out_block, x_block, weight_block, dx_block;
    const float inverse = p.inverse_rms[row];
    float dot = 0.0f;
    for (int64_t col = 0; col < p.cols; col += kBlock) {
      const int n = static_cast<int>(std::min<int64_t>(kBlock, p.cols - col));
      const float* d_out = d_out_block.load(at<T>(p.d_out, row, col), n);
      const float* x = x_block.load(at<T>(p.x, row, col), n);
      const float* weight = weight_block.load(static_cast<const T*>(p.weight) + col, n);
#pragma omp simd reduction(+ : dot)
      for (int i = 0; i < n; ++i) dot += d_out[i] * weight[i] * x[i];
    }
    const float shift = dot * inverse * inverse / p.cols;
    for (int64_t col = 0; col < p.cols; col += kBlock) {
      const int n = static_cast<int>(std::min<int64_t>(kBlock, p.cols - col));
      const float* d_out = d_out_block.load(at<T>(p.d_out, row, col), n);
      const float* x = x_block.load(at<T>(p.x, row, col), n);
      const float* weight = weight_block.load(static_cast<const T*>(p.weight) + col, n);
      T* to = at<T>(p.dx, row, col);
      float* dx = dx_block.begin_store(to);
#pragma omp simd
      for (int i = 0; i < n; ++i) dx[i] = inverse * (d_out[i] * weight[i] - x[i] * shift);
      dx_block.end_store(to, n);
    }
  }
}

void rms_norm(const RmsNormParams& p) {
  with_type(p.dtype, [&]<class T>() { rms_norm_typed<T>(p); });
}

void rms_norm_backward(const RmsNormBackwardParams& p) {
  with_type(p.dtype, [&]<class T>() { rms_norm_backward_typed<T>(p); });
}

double read(const DeviceScalar& scalar) {
  switch (scalar.dtype) {
    case DType::i64: return static_cast<double>(*static_cast<const int64_t*>(scalar.data));
    case DType::f64: return *static_cast<const double*>(scalar.data);
    default: return *static_cast<const float*>(scalar.data);
  }
}

// Clips the finished row and writes its rounded copy.
void finish_row(float* w, int64_t d, bool clip, void* compute, DType compute_dtype, int64_t row) {
  if (clip) {
    float sum_of_squares = 0.0f;
#pragma omp simd reduction(+ : sum_of_squares)
    for (int64_t i = 0; i < d; ++i) sum_of_squares += w[i] * w[i];
    const float factor = clip_factor(sum_of_squares);
    if (factor != 1.0f) {
#pragma omp simd
      for (int64_t i = 0; i < d; ++i) w[i] *= factor;
    }
  }
  if (compute) {
    with_type(compute_dtype, [&]<class T>() {
      T* copy = static_cast<T*>(compute) + row * d;
      for (int64_t i = 0; i < d; i += kBlock)
        store_block(w + i, copy + i, static_cast<int>(std::min<int64_t>(kBlock, d - i)));
    });
  }
}

void adamw(const AdamWParams& p) {
  if (p.finite.data && read(p.finite) == 0.0) return;
  const AdamWFactors factors = adamw_factors(p, read(p.step), read(p.learning_rate));
#pragma omp parallel for schedule(static) if (p.rows * p.d >= kParallelElements)
  for (int64_t row = 0; row < p.rows; ++row) {
    float* w = p.slots + row * p.d;
    const float* g = p.grad + row * p.d;
    float* exp_avg = p.exp_avg + row * p.d;
    float* exp_avg_sq = p.exp_avg_sq + row * p.d;
#pragma omp simd
    for (int64_t i = 0; i < p.d; ++i) w[i] = adamw_element(factors, w[i], g[i], exp_avg[i], exp_avg_sq[i]);
    finish_row(w, p.d, p.clip, p.compute, p.compute_dtype, row);
  }
}

void sgd(const SgdParams& p) {
  if (p.finite.data && read(p.finite) == 0.0) return;
  const float learning_rate = static_cast<float>(read(p.learning_rate));
  const float decay = 1.0f - learning_rate * p.weight_decay;
#pragma omp parallel for schedule(static) if (p.rows * p.d >= kParallelElements)
  for (int64_t row = 0; row < p.rows; ++row) {
    float* w = p.slots + row * p.d;
    const float* g = p.grad + row * p.d;
    if (p.momentum_buffer) {
      float* buffer = p.momentum_buffer + row * p.d;
#pragma omp simd
      for (int64_t i = 0; i < p.d; ++i) {
        buffer[i] = p.momentum * buffer[i] + g[i];
        w[i] = w[i] * decay - learning_rate * buffer[i];
      }
    } else {
#pragma omp simd
      for (int64_t i = 0; i < p.d; ++i) w[i] = w[i] * decay - learning_rate * g[i];
    }
    finish_row(w, p.d, p.clip, p.compute, p.compute_dtype, row);
  }
}

// Calls f(values, first column, columns) for every block of row `row` of the inputs and gradients.
template <class T, class F>
void for_each_block_of_source(const WriteSlotsParams& p, int64_t row, F&& f) {
  const T* from = static_cast<const T*>(p.is_value(row) ? p.gradients : p.inputs) + p.source_row(row) * p.d;
  Block<T> block;
  for (int64_t col = 0; col < p.d; col += kBlock) {
    const int n = static_cast<int>(std::min<int64_t>(kBlock, p.d - col));
    f(block.load(from + col, n), col, n);
  }
}

// -> whether all is finite
bool token_norms(const WriteSlotsParams& p) {
  bool all_finite = true;
  for (int64_t token = 0; token < p.tokens; ++token) {
    double inputs = 0.0, gradients = 0.0;
    for (int64_t row = token; row < p.rows(); row += p.tokens)
      (p.is_value(row) ? gradients : inputs) += p.workspace[row];
    const float norm = p.gradient_norms ? p.gradient_norms[token] : static_cast<float>(std::sqrt(gradients));
    const bool finite = is_finite(inputs + gradients + std::fabs(norm));
    p.norms[token] = finite ? norm : NAN;
    all_finite &= finite;
  }
  return all_finite;
}

// A row belongs to one thread. Sums are in double: squares of any two floats fit, and the order is fixed.
template <class T>
void write_slots_typed(const WriteSlotsParams& p) {
  const bool parallel = p.rows() * p.d >= kParallelElements;
#pragma omp parallel for schedule(static) if (parallel)
  for (int64_t row = 0; row < p.rows(); ++row) {
    double sum = 0.0;
    for_each_block_of_source<T>(p, row, [&](const float* x, int64_t, int n) {
#pragma omp simd reduction(+ : sum)
      for (int i = 0; i < n; ++i) sum += static_cast<double>(x[i]) * x[i];
    });
    p.workspace[row] = sum;
  }
  if (!token_norms(p)) return;
#pragma omp parallel for schedule(static) if (parallel)
  for (int64_t row = 0; row < p.rows(); ++row) {
    const double factor = p.is_value(row) ? p.epsilon * inverse_norm(p.norms[row % p.tokens])
                                          : inverse_norm(std::sqrt(p.workspace[row]));
    const int64_t slot_row = p.slot_row(row);
    float* w = p.slots + slot_row * p.d;
    for_each_block_of_source<T>(p, row, [&](const float* x, int64_t col, int n) {
#pragma omp simd
      for (int i = 0; i < n; ++i) w[col + i] = static_cast<float>(x[i] * factor);
    });
    finish_row(w, p.d, false, p.compute, p.compute_dtype, slot_row);
  }
}

void write_slots(const WriteSlotsParams& p) {
  with_type(p.dtype, [&]<class T>() { write_slots_typed<T>(p); });
}

}  // namespace

extern const Kernels table;
const Kernels table = {LOCAS_ISA_NAME, glu_forward, glu_backward, importance, cross_entropy,
                       rms_norm, rms_norm_backward, adamw, sgd, write_slots};

}  // namespace locas::cpu::LOCAS_ISA
