// The norms on the CPU: a row belongs to one thread.
#include <cmath>

#include "common/norm_params.h"
#include "cpu/blocks.h"
#include "cpu/rms_norm.h"
#include "cpu/table.h"

namespace locas::cpu::LOCAS_ISA {
namespace {

// sum = round(residual + x) of one row
template <class T>
void add_residual(const Matrix& x_rows, const Matrix& residual_rows, const Matrix& sum_rows, int64_t row) {
  for_each_block_of_row(x_rows.cols, [&](int64_t col, int n) {
    Block<T> x_block, residual_block, sum_block;
    const float* x = x_block.load(x_rows.at<T>(row, col), n);
    const float* residual = residual_block.load(residual_rows.at<T>(row, col), n);
    T* to = sum_rows.at<T>(row, col);
    float* sum = sum_block.begin_store(to);
#pragma omp simd
    for (int i = 0; i < n; ++i) sum[i] = residual[i] + x[i];
    sum_block.end_store(to, n);
  });
}

template <class T>
void rms_norm_typed(const RmsNormParams& p) {
  const int64_t rows = p.x.rows, cols = p.x.cols;
  const Matrix& from = p.residual.data ? p.sum : p.x;
#pragma omp parallel for schedule(static) if (rows * cols >= kParallelElements)
  for (int64_t row = 0; row < rows; ++row) {
    if (p.residual.data) add_residual<T>(p.x, p.residual, p.sum, row);
    Block<T> x_block, weight_block, out_block;
    float sum = 0.0f;
    for_each_block_of_row(cols, [&](int64_t col, int n) {
      const float* x = x_block.load(from.at<T>(row, col), n);
#pragma omp simd reduction(+ : sum)
      for (int i = 0; i < n; ++i) sum += x[i] * x[i];
    });
    const float inverse = 1.0f / std::sqrt(sum / cols + p.eps);
    if (p.inverse_rms) p.inverse_rms[row] = inverse;
    for_each_block_of_row(cols, [&](int64_t col, int n) {
      const float* x = x_block.load(from.at<T>(row, col), n);
      const float* weight = weight_block.load(static_cast<const T*>(p.weight) + col, n);
      T* to = p.out.at<T>(row, col);
      normalize_block<T>(x, weight, inverse, p.weight_offset, out_block.begin_store(to), n);
      out_block.end_store(to, n);
    });
  }
}

template <class T>
void rms_norm_backward_typed(const RmsNormBackwardParams& p) {
  const int64_t rows = p.x.rows, cols = p.x.cols;
  const float offset = p.weight_offset;
#pragma omp parallel for schedule(static) if (rows * cols >= kParallelElements)
  for (int64_t row = 0; row < rows; ++row) {
    Block<T> d_out_block, x_block, weight_block, d_sum_block, dx_block;
    const float inverse = p.inverse_rms[row];
    float dot = 0.0f;
    for_each_block_of_row(cols, [&](int64_t col, int n) {
      const float* d_out = d_out_block.load(p.d_out.at<T>(row, col), n);
      const float* x = x_block.load(p.x.at<T>(row, col), n);
      const float* weight = weight_block.load(static_cast<const T*>(p.weight) + col, n);
#pragma omp simd reduction(+ : dot)
      for (int i = 0; i < n; ++i) dot += d_out[i] * (offset + weight[i]) * x[i];
    });
    const float shift = dot * inverse * inverse / cols;
    for_each_block_of_row(cols, [&](int64_t col, int n) {
      const float* d_out = d_out_block.load(p.d_out.at<T>(row, col), n);
      const float* x = x_block.load(p.x.at<T>(row, col), n);
      const float* weight = weight_block.load(static_cast<const T*>(p.weight) + col, n);
      T* to = p.dx.at<T>(row, col);
      float* dx = dx_block.begin_store(to);
      if (p.d_sum.data) {
        const float* d_sum = d_sum_block.load(p.d_sum.at<T>(row, col), n);
#pragma omp simd
        for (int i = 0; i < n; ++i) dx[i] = inverse * (d_out[i] * (offset + weight[i]) - x[i] * shift) + d_sum[i];
      } else {
#pragma omp simd
        for (int i = 0; i < n; ++i) dx[i] = inverse * (d_out[i] * (offset + weight[i]) - x[i] * shift);
      }
      dx_block.end_store(to, n);
    });
  }
}

template <class T>
void layer_norm_typed(const LayerNormParams& p) {
  const int64_t rows = p.x.rows, cols = p.x.cols;
  const Matrix& from = p.residual.data ? p.sum : p.x;
#pragma omp parallel for schedule(static) if (rows * cols >= kParallelElements)
  for (int64_t row = 0; row < rows; ++row) {
    if (p.residual.data) add_residual<T>(p.x, p.residual, p.sum, row);
    Block<T> x_block, weight_block, bias_block, out_block;
    float sum = 0.0f, squares = 0.0f;
    for_each_block_of_row(cols, [&](int64_t col, int n) {
      const float* x = x_block.load(from.at<T>(row, col), n);
#pragma omp simd reduction(+ : sum)
      for (int i = 0; i < n; ++i) sum += x[i];
    });
    const float mean = sum / cols;
    for_each_block_of_row(cols, [&](int64_t col, int n) {
      const float* x = x_block.load(from.at<T>(row, col), n);
#pragma omp simd reduction(+ : squares)
      for (int i = 0; i < n; ++i) squares += (x[i] - mean) * (x[i] - mean);
    });
    const float inverse = 1.0f / std::sqrt(squares / cols + p.eps);
    if (p.mean) {
      p.mean[row] = mean;
      p.inverse_std[row] = inverse;
    }
    for_each_block_of_row(cols, [&](int64_t col, int n) {
      const float* x = x_block.load(from.at<T>(row, col), n);
      const float* weight = weight_block.load(static_cast<const T*>(p.weight) + col, n);
      T* to = p.out.at<T>(row, col);
      float* out = out_block.begin_store(to);
#pragma omp simd
      for (int i = 0; i < n; ++i) out[i] = (x[i] - mean) * inverse * weight[i];
      if (p.bias) {
        const float* bias = bias_block.load(static_cast<const T*>(p.bias) + col, n);
#pragma omp simd
        for (int i = 0; i < n; ++i) out[i] += bias[i];
      }
      out_block.end_store(to, n);
    });
  }
}

template <class T>
void layer_norm_backward_typed(const LayerNormBackwardParams& p) {
  const int64_t rows = p.x.rows, cols = p.x.cols;
#pragma omp parallel for schedule(static) if (rows * cols >= kParallelElements)
  for (int64_t row = 0; row < rows; ++row) {
    Block<T> d_out_block, x_block, weight_block, d_sum_block, dx_block;
    const float mean = p.mean[row], inverse = p.inverse_std[row];
    float sum = 0.0f, dot = 0.0f;
    for_each_block_of_row(cols, [&](int64_t col, int n) {
      const float* d_out = d_out_block.load(p.d_out.at<T>(row, col), n);
      const float* x = x_block.load(p.x.at<T>(row, col), n);
      const float* weight = weight_block.load(static_cast<const T*>(p.weight) + col, n);
#pragma omp simd reduction(+ : sum, dot)
      for (int i = 0; i < n; ++i) {
        sum += d_out[i] * weight[i];
        dot += d_out[i] * weight[i] * (x[i] - mean);
      }
    });
    const float shift = sum / cols, slope = dot * inverse * inverse / cols;
    for_each_block_of_row(cols, [&](int64_t col, int n) {
      const float* d_out = d_out_block.load(p.d_out.at<T>(row, col), n);
      const float* x = x_block.load(p.x.at<T>(row, col), n);
      const float* weight = weight_block.load(static_cast<const T*>(p.weight) + col, n);
      T* to = p.dx.at<T>(row, col);
      float* dx = dx_block.begin_store(to);
#pragma omp simd
      for (int i = 0; i < n; ++i) dx[i] = inverse * (d_out[i] * weight[i] - shift - (x[i] - mean) * slope);
      if (p.d_sum.data) {
        const float* d_sum = d_sum_block.load(p.d_sum.at<T>(row, col), n);
#pragma omp simd
        for (int i = 0; i < n; ++i) dx[i] += d_sum[i];
      }
      dx_block.end_store(to, n);
    });
  }
}

}  // namespace

void rms_norm(const RmsNormParams& p) {
  with_type(p.dtype, [&]<class T>() { rms_norm_typed<T>(p); });
}

void rms_norm_backward(const RmsNormBackwardParams& p) {
  with_type(p.dtype, [&]<class T>() { rms_norm_backward_typed<T>(p); });
}

void layer_norm(const LayerNormParams& p) {
  with_type(p.dtype, [&]<class T>() { layer_norm_typed<T>(p); });
}

void layer_norm_backward(const LayerNormBackwardParams& p) {
  with_type(p.dtype, [&]<class T>() { layer_norm_backward_typed<T>(p); });
}

}  // namespace locas::cpu::LOCAS_ISA
