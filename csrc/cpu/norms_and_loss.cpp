// Cross entropy and RMS norms on the CPU.
#include <algorithm>
#include <cmath>

#include "common/activations.h"
#include "cpu/blocks.h"
#include "cpu/table.h"

namespace locas::cpu::LOCAS_ISA {
namespace {

// A row belongs to one thread, which goes over it twice, three times with the gradient: maximum, sum, gradient.
template <class T>
void token_nll_typed(const TokenNllParams& p) {
  const int64_t rows = p.logits.rows, cols = p.logits.cols;
#pragma omp parallel for schedule(static) if (rows * cols >= kParallelElements)
  for (int64_t row = 0; row < rows; ++row) {
    Block<T> block;
    const auto for_each_block_of_row = [&](auto&& f) {
      for (int64_t col = 0; col < cols; col += kBlock) {
        const int n = static_cast<int>(std::min<int64_t>(kBlock, cols - col));
        f(block.load(p.logits.at<T>(row, col), n), col, n);
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
    load_block(p.logits.at<T>(row, p.targets[row]), &target, 1);
    p.nll[row] = static_cast<float>(std::log(sum) + maximum - target);
    if (!p.d_logits.data) continue;
    const float inverse = static_cast<float>(1.0 / sum);
    for_each_block_of_row([&](const float* x, int64_t col, int n) {
      Block<T> out_block;
      T* to = p.d_logits.at<T>(row, col);
      float* out = out_block.begin_store(to);
#pragma omp simd
      for (int i = 0; i < n; ++i) out[i] = fast_exp(x[i] - maximum) * inverse;
      const int64_t hit = p.targets[row] - col;
      if (hit >= 0 && hit < n) out[hit] -= 1.0f;
      out_block.end_store(to, n);
    });
  }
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
  const int64_t rows = p.x.rows, cols = p.x.cols;
#pragma omp parallel for schedule(static) if (rows * cols >= kParallelElements)
  for (int64_t row = 0; row < rows; ++row) {
    Block<T> x_block, weight_block, out_block;
    float sum = 0.0f;
    for (int64_t col = 0; col < cols; col += kBlock) {
      const int n = static_cast<int>(std::min<int64_t>(kBlock, cols - col));
      const float* x = x_block.load(p.x.at<T>(row, col), n);
#pragma omp simd reduction(+ : sum)
      for (int i = 0; i < n; ++i) sum += x[i] * x[i];
    }
    const float inverse = 1.0f / std::sqrt(sum / cols + p.eps);
    if (p.inverse_rms) p.inverse_rms[row] = inverse;
    for (int64_t col = 0; col < cols; col += kBlock) {
      const int n = static_cast<int>(std::min<int64_t>(kBlock, cols - col));
      const float* x = x_block.load(p.x.at<T>(row, col), n);
      const float* weight = weight_block.load(static_cast<const T*>(p.weight) + col, n);
      T* to = p.out.at<T>(row, col);
      float* out = out_block.begin_store(to);
#pragma omp simd
      for (int i = 0; i < n; ++i) out[i] = weight[i] * rounded<T>(x[i] * inverse);
      out_block.end_store(to, n);
    }
  }
}

template <class T>
void rms_norm_backward_typed(const RmsNormBackwardParams& p) {
  const int64_t rows = p.x.rows, cols = p.x.cols;
#pragma omp parallel for schedule(static) if (rows * cols >= kParallelElements)
  for (int64_t row = 0; row < rows; ++row) {
    Block<T> d_out_block, x_block, weight_block, dx_block;
    const float inverse = p.inverse_rms[row];
    float dot = 0.0f;
    for (int64_t col = 0; col < cols; col += kBlock) {
      const int n = static_cast<int>(std::min<int64_t>(kBlock, cols - col));
      const float* d_out = d_out_block.load(p.d_out.at<T>(row, col), n);
      const float* x = x_block.load(p.x.at<T>(row, col), n);
      const float* weight = weight_block.load(static_cast<const T*>(p.weight) + col, n);
#pragma omp simd reduction(+ : dot)
      for (int i = 0; i < n; ++i) dot += d_out[i] * weight[i] * x[i];
    }
    const float shift = dot * inverse * inverse / cols;
    for (int64_t col = 0; col < cols; col += kBlock) {
      const int n = static_cast<int>(std::min<int64_t>(kBlock, cols - col));
      const float* d_out = d_out_block.load(p.d_out.at<T>(row, col), n);
      const float* x = x_block.load(p.x.at<T>(row, col), n);
      const float* weight = weight_block.load(static_cast<const T*>(p.weight) + col, n);
      T* to = p.dx.at<T>(row, col);
      float* dx = dx_block.begin_store(to);
#pragma omp simd
      for (int i = 0; i < n; ++i) dx[i] = inverse * (d_out[i] * weight[i] - x[i] * shift);
      dx_block.end_store(to, n);
    }
  }
}

}  // namespace

void token_nll(const TokenNllParams& p) {
  with_type(p.dtype, [&]<class T>() { token_nll_typed<T>(p); });
}

void rms_norm(const RmsNormParams& p) {
  with_type(p.dtype, [&]<class T>() { rms_norm_typed<T>(p); });
}

void rms_norm_backward(const RmsNormBackwardParams& p) {
  with_type(p.dtype, [&]<class T>() { rms_norm_backward_typed<T>(p); });
}

}  // namespace locas::cpu::LOCAS_ISA
