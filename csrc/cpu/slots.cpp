// Updates of slots and closed-form writing on the CPU.
#include <algorithm>
#include <cmath>

#include "common/slot_math.h"
#include "cpu/blocks.h"
#include "cpu/table.h"

namespace locas::cpu::LOCAS_ISA {
namespace {

double read(const DeviceScalar& scalar) {
  switch (scalar.dtype) {
    case DType::i64: return static_cast<double>(*static_cast<const int64_t*>(scalar.data));
    case DType::f64: return *static_cast<const double*>(scalar.data);
    default: return *static_cast<const float*>(scalar.data);
  }
}

// Clips the finished row and writes its rounded copy.
void finish_row(float* w, int64_t d, bool clip, const Matrix& compute, DType compute_dtype, int64_t row) {
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
  if (compute.data) {
    with_type(compute_dtype, [&]<class T>() {
      T* copy = compute.at<T>(row, 0);
      for (int64_t i = 0; i < d; i += kBlock)
        store_block(w + i, copy + i, static_cast<int>(std::min<int64_t>(kBlock, d - i)));
    });
  }
}

// Calls f(values, first column, columns) for every block of row `row` of the inputs and gradients.
template <class T, class F>
void for_each_block_of_source(const WriteSlotsParams& p, int64_t row, F&& f) {
  const T* from = (p.is_value(row) ? p.gradients : p.inputs).at<const T>(p.source_row(row), 0);
  Block<T> block;
  for (int64_t col = 0; col < p.d(); col += kBlock) {
    const int n = static_cast<int>(std::min<int64_t>(kBlock, p.d() - col));
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
  const bool parallel = p.rows() * p.d() >= kParallelElements;
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
    const double factor =
        p.is_value(row) ? p.epsilon * inverse_norm(p.norms[row % p.tokens]) : inverse_norm(std::sqrt(p.workspace[row]));
    const int64_t slot_row = p.slot_row(row);
    float* w = p.slots.at<float>(slot_row, 0);
    for_each_block_of_source<T>(p, row, [&](const float* x, int64_t col, int n) {
#pragma omp simd
      for (int i = 0; i < n; ++i) w[col + i] = static_cast<float>(x[i] * factor);
    });
    finish_row(w, p.d(), false, p.compute, p.compute_dtype, slot_row);
  }
}

}  // namespace

void adamw_slots(const AdamwSlotsParams& p) {
  if (p.finite.data && read(p.finite) == 0.0) return;
  const AdamwFactors factors = adamw_factors(p, read(p.step), read(p.learning_rate));
  const int64_t rows = p.slots.rows, d = p.slots.cols;
#pragma omp parallel for schedule(static) if (rows * d >= kParallelElements)
  for (int64_t row = 0; row < rows; ++row) {
    float* w = p.slots.at<float>(row, 0);
    const float* g = p.grad.at<const float>(row, 0);
    float* exp_avg = p.exp_avg.at<float>(row, 0);
    float* exp_avg_sq = p.exp_avg_sq.at<float>(row, 0);
#pragma omp simd
    for (int64_t i = 0; i < d; ++i) w[i] = adamw_element(factors, w[i], g[i], exp_avg[i], exp_avg_sq[i]);
    finish_row(w, d, p.clip, p.compute, p.compute_dtype, row);
  }
}

void sgd_slots(const SgdSlotsParams& p) {
  if (p.finite.data && read(p.finite) == 0.0) return;
  const float learning_rate = static_cast<float>(read(p.learning_rate));
  const float decay = 1.0f - learning_rate * p.weight_decay;
  const int64_t rows = p.slots.rows, d = p.slots.cols;
#pragma omp parallel for schedule(static) if (rows * d >= kParallelElements)
  for (int64_t row = 0; row < rows; ++row) {
    float* w = p.slots.at<float>(row, 0);
    const float* g = p.grad.at<const float>(row, 0);
    if (p.momentum_buffer.data) {
      float* buffer = p.momentum_buffer.at<float>(row, 0);
#pragma omp simd
      for (int64_t i = 0; i < d; ++i) {
        buffer[i] = p.momentum * buffer[i] + g[i];
        w[i] = w[i] * decay - learning_rate * buffer[i];
      }
    } else {
#pragma omp simd
      for (int64_t i = 0; i < d; ++i) w[i] = w[i] * decay - learning_rate * g[i];
    }
    finish_row(w, d, p.clip, p.compute, p.compute_dtype, row);
  }
}

void write_slots(const WriteSlotsParams& p) {
  with_type(p.dtype, [&]<class T>() { write_slots_typed<T>(p); });
}

}  // namespace locas::cpu::LOCAS_ISA
