// token_nll against log-sum-exp in float64. The peer computes in float and rounds the gradient.
#include "simt/tests/harness.h"

namespace locas::test {
namespace {

// [rows] and [rows, cols]
template <class Real>
struct Losses {
  std::vector<Real> nll, d_logits;

  template <class T>
  Losses(const std::vector<T>& logits, const std::vector<int64_t>& targets, int64_t cols) : d_logits(logits.size()) {
    for (size_t row = 0; row < targets.size(); ++row) {
      const T* x = logits.data() + row * cols;
      Real maximum = -INFINITY, sum = 0;
      for (int64_t i = 0; i < cols; ++i) maximum = std::max(maximum, static_cast<Real>(exact(x[i])));
      for (int64_t i = 0; i < cols; ++i) sum += std::exp(static_cast<Real>(exact(x[i])) - maximum);
      nll.push_back(std::log(sum) + maximum - static_cast<Real>(exact(x[targets[row]])));
      for (int64_t i = 0; i < cols; ++i)
        d_logits[row * cols + i] =
            std::exp(static_cast<Real>(exact(x[i])) - maximum) / sum - (i == targets[row] ? 1 : 0);
    }
  }
};

template <class T>
void check(int64_t rows, int64_t cols, int64_t stride, bool with_gradient) {
  Random random(rows * 1000 + cols);
  auto logits = random.normals<T>(rows * cols, 4.0);
  if (cols > 2) logits[1] = ptx::from_float<T>(-INFINITY);  // a token that the model rules out
  std::vector<int64_t> targets;
  for (int64_t row = 0; row < rows; ++row) targets.push_back(row == 0 ? cols - 1 : random.integer(0, cols - 1));
  const Losses<double> truth(logits, targets, cols);
  const Losses<float> peer(logits, targets, cols);

  for_each_seed([&] {
    StridedBuffer<T> x("logits", logits, rows, cols, stride), d_logits("d_logits", rows, cols, stride);
    simt::Buffer<int64_t> target("targets", targets);
    simt::Buffer<float> nll("nll", rows);
    const Matrix gradient = with_gradient ? d_logits.view() : Matrix{};
    cuda::token_nll({x.view(), gradient, target.data(), nll.data(), 0.0f, 1.0f, kDType<T>}, kQueue);
    expect_as_good_as("nll", nll.values(), truth.nll, exact(peer.nll));
    if (with_gradient)
      expect_as_good_as("d_logits", d_logits.values(), truth.d_logits, round_to<T>(exact(peer.d_logits)));
  });
}

// A NaN logit must not vanish in a maximum, wherever it is: first or later of those that a thread sees.
void check_nan(int64_t position) {
  for_each_seed([&] {
    simt::Buffer<float> logits("logits", std::vector<float>(700, 1.0f)), nll("nll", 1);
    simt::Buffer<int64_t> target("targets", std::vector<int64_t>{3});
    logits[position] = NAN;
    cuda::token_nll({rows_of(logits, 1, 700), {}, target.data(), nll.data(), 0.0f, 1.0f, DType::f32}, kQueue);
    if (!std::isnan(nll[0])) fail("nll is %g, but logit %td is NaN", nll[0], position);
  });
}

LOCAS_TEST(token_nll, "token_nll") {
  check<bf16>(3, 1300, 1304, true);
  check<f16>(2, 513, 513, true);
  check<float>(2, 96, 96, true);
  check<bf16>(2, 1, 1, true);
  check<bf16>(4, 70, 72, false);
  check_nan(10);
  check_nan(600);
  check<bf16>(2, fresh().integer(2, 2000), 2000, true);
  return "8 cases, 10 seeds";
}

}  // namespace
}  // namespace locas::test
