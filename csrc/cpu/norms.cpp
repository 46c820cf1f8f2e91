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

// centres: layer_norm, whose formula is that of the centred row; otherwise rms_norm.
template <class T, bool centres>
void norm_typed(const NormParams& p) {
  const int64_t rows = p.x.rows, cols = p.x.cols;
  const Matrix& from = p.residual.data ? p.sum : p.x;
#pragma omp parallel for schedule(static) if (rows * cols >= kParallelElements)
  for (int64_t row = 0; row < rows; ++row) {
    if (p.residual.data) add_residual<T>(p.x, p.residual, p.sum, row);
    Block<T> x_block, weight_block, bias_block, out_block;
    float sum = 0.0f, squares = 0.0f, mean = 0.0f;
    if constexpr (centres) {
      for_each_block_of_row(cols, [&](int64_t col, int n) {
        const float* x = x_block.load(from.at<T>(row, col), n);
#pragma omp simd reduction(+ : sum)
        for (int i = 0; i < n; ++i) sum += x[i];
      });
      mean = sum / cols;
    }
    for_each_block_of_row(cols, [&](int64_t col, int n) {
      const float* x = x_block.load(from.at<T>(row, col), n);
#pragma omp simd reduction(+ : squares)
      for (int i = 0; i < n; ++i) squares += centres ? (x[i] - mean) * (x[i] - mean) : x[i] * x[i];
    });
    const float inverse = 1.0f / std::sqrt(squares / cols + p.eps);
    if (centres && p.mean) p.mean[row] = mean;
    if (p.inverse) p.inverse[row] = inverse;
    for_each_block_of_row(cols, [&](int64_t col, int n) {
      const float* x = x_block.load(from.at<T>(row, col), n);
      const float* weight = weight_block.load(static_cast<const T*>(p.weight) + col, n);
      T* to = p.out.at<T>(row, col);
      float* out = out_block.begin_store(to);
      if constexpr (centres) {
#pragma omp simd
        for (int i = 0; i < n; ++i) out[i] = (x[i] - mean) * inverse * weight[i];
        if (p.bias) {
          const float* bias = bias_block.load(static_cast<const T*>(p.bias) + col, n);
#pragma omp simd
          for (int i = 0; i < n; ++i) out[i] += bias[i];
        }
      } else {
        normalize_block<T>(x, weight, inverse, p.weight_offset, out, n);
      }
      out_block.end_store(to, n);
    });
  }
}

template <class T, bool centres>
void norm_backward_typed(const NormBackwardParams& p) {
  const int64_t rows = p.x.rows, cols = p.x.cols;
  const float offset = p.weight_offset;
#pragma omp parallel for schedule(static) if (rows * cols >= kParallelElements)
  for (int64_t row = 0; row < rows; ++row) {
    Block<T> d_out_block, x_block, weight_block, d_sum_block, dx_block;
    const float mean = centres ? p.mean[row] : 0.0f, inverse = p.inverse[row];
    float sum = 0.0f, dot = 0.0f;
    // Calls f(column, columns, d_out, x, weight) for each block of the row.
    const auto for_each_block_loaded = [&](auto&& f) {
      for_each_block_of_row(cols, [&](int64_t col, int n) {
        f(col, n, d_out_block.load(p.d_out.at<T>(row, col), n), x_block.load(p.x.at<T>(row, col), n),
          weight_block.load(static_cast<const T*>(p.weight) + col, n));
      });
    };
    for_each_block_loaded([&](int64_t, int n, const float* d_out, const float* x, const float* weight) {
      if constexpr (centres) {
#pragma omp simd reduction(+ : sum, dot)
        for (int i = 0; i < n; ++i) {
          sum += d_out[i] * weight[i];
          dot += d_out[i] * weight[i] * (x[i] - mean);
        }
      } else {
#pragma omp simd reduction(+ : dot)
        for (int i = 0; i < n; ++i) dot += d_out[i] * (offset + weight[i]) * x[i];
      }
    });
    const float shift = sum / cols, slope = dot * inverse * inverse / cols;
    for_each_block_loaded([&](int64_t col, int n, const float* d_out, const float* x, const float* weight) {
      T* to = p.dx.at<T>(row, col);
      float* dx = dx_block.begin_store(to);
      const float* d_sum = p.d_sum.data ? d_sum_block.load(p.d_sum.at<T>(row, col), n) : nullptr;
      const auto gradient = [&](int i) {
        if constexpr (centres) return inverse * (d_out[i] * weight[i] - shift - (x[i] - mean) * slope);
        else return inverse * (d_out[i] * (offset + weight[i]) - x[i] * slope);
      };
      if (d_sum) {
#pragma omp simd
        for (int i = 0; i < n; ++i) dx[i] = gradient(i) + d_sum[i];
      } else {
#pragma omp simd
        for (int i = 0; i < n; ++i) dx[i] = gradient(i);
      }
      dx_block.end_store(to, n);
    });
  }
}

}  // namespace

void rms_norm(const NormParams& p) {
  with_type(p.dtype, [&]<class T>() { norm_typed<T, false>(p); });
}

void rms_norm_backward(const NormBackwardParams& p) {
  with_type(p.dtype, [&]<class T>() { norm_backward_typed<T, false>(p); });
}

void layer_norm(const NormParams& p) {
  with_type(p.dtype, [&]<class T>() { norm_typed<T, true>(p); });
}

void layer_norm_backward(const NormBackwardParams& p) {
  with_type(p.dtype, [&]<class T>() { norm_backward_typed<T, true>(p); });
}

}  // namespace locas::cpu::LOCAS_ISA
