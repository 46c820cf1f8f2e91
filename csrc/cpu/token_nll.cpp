// Cross entropy on the CPU.
#include <algorithm>
#include <cmath>

#include "common/logits.h"
#include "cpu/blocks.h"
#include "cpu/table.h"

namespace locas::cpu::LOCAS_ISA {
namespace {

// A row belongs to one thread, which goes over it twice, three times with the gradient: maximum, sum, gradient.
// Mapped logits are in the order of the logits, so the maximum is found before they are mapped.
template <class T, LogitMap map>
void token_nll_typed(const TokenNllParams& p) {
  const int64_t rows = p.logits.rows, cols = p.logits.cols;
  const float scale = p.logit_scale, cap = p.soft_cap;
#pragma omp parallel for schedule(static) if (rows * cols >= kParallelElements)
  for (int64_t row = 0; row < rows; ++row) {
    Block<T> block;
    const auto mapped = [&](float x) { return map_logit<map>(x, scale, cap).value; };
    float maximum = -INFINITY;
    for_each_block_of_row(cols, [&](int64_t col, int n) {
      const float* x = block.load(p.logits.at<T>(row, col), n);
#pragma omp simd reduction(max : maximum)
      for (int i = 0; i < n; ++i) maximum = x[i] > maximum ? x[i] : maximum;
    });
    maximum = mapped(maximum);
    double sum = 0.0;
    for_each_block_of_row(cols, [&](int64_t col, int n) {
      const float* x = block.load(p.logits.at<T>(row, col), n);
      float part = 0.0f;
#pragma omp simd reduction(+ : part)
      for (int i = 0; i < n; ++i) part += fast_exp(mapped(x[i]) - maximum);
      sum += part;
    });
    float target;
    load_block(p.logits.at<T>(row, p.targets[row]), &target, 1);
    p.nll[row] = static_cast<float>(std::log(sum) + maximum - mapped(target));
    if (!p.d_logits.data) continue;
    const float inverse = static_cast<float>(1.0 / sum);
    for_each_block_of_row(cols, [&](int64_t col, int n) {
      Block<T> out_block;
      const float* x = block.load(p.logits.at<T>(row, col), n);
      const int64_t hit = p.targets[row] - col;
      const float slope_of_hit = hit >= 0 && hit < n ? map_logit<map>(x[hit], scale, cap).slope : 0.0f;
      T* to = p.d_logits.at<T>(row, col);
      float* out = out_block.begin_store(to);
#pragma omp simd
      for (int i = 0; i < n; ++i) {
        const ValueAndSlope z = map_logit<map>(x[i], scale, cap);
        out[i] = fast_exp(z.value - maximum) * inverse * z.slope;
      }
      if (hit >= 0 && hit < n) out[hit] -= slope_of_hit;
      out_block.end_store(to, n);
    });
  }
}

}  // namespace

void token_nll(const TokenNllParams& p) {
  with_type(p.dtype, [&]<class T>() { with_logit_map(p, [&]<LogitMap map>() { token_nll_typed<T, map>(p); }); });
}

}  // namespace locas::cpu::LOCAS_ISA
