// token_nll against log-sum-exp in float64. The peer computes in float and rounds the gradient.
#include "common/logits.h"
#include "simt/tests/harness.h"

namespace locas::test {
namespace {

struct Case {
  int64_t rows, cols, stride;
  bool gradient = true;
  float soft_cap = 0.0f, logit_scale = 1.0f;
  size_t offset = 0;  // elements before the logits and the gradient
};

// [rows] and [rows, cols]
template <class Real>
struct Losses {
  std::vector<Real> nll, d_logits;

  template <class T>
  Losses(const Case& c, const std::vector<T>& logits, const std::vector<int64_t>& targets) : d_logits(logits.size()) {
    std::vector<Real> z(c.cols), slope(c.cols);
    for (int64_t row = 0; row < c.rows; ++row) {
      Real maximum = -INFINITY, sum = 0;
      for (int64_t i = 0; i < c.cols; ++i) {
        z[i] = static_cast<Real>(exact(logits[row * c.cols + i])) * static_cast<Real>(c.logit_scale);
        slope[i] = static_cast<Real>(c.logit_scale);
        if (c.soft_cap > 0) {
          const Real t = std::tanh(z[i] / static_cast<Real>(c.soft_cap));
          z[i] = c.soft_cap * t;
          slope[i] *= 1 - t * t;
        }
        maximum = std::max(maximum, z[i]);
      }
      for (const Real value : z) sum += std::exp(value - maximum);
      nll.push_back(std::log(sum) + maximum - z[targets[row]]);
      for (int64_t i = 0; i < c.cols; ++i)
        d_logits[row * c.cols + i] = slope[i] * (std::exp(z[i] - maximum) / sum - (i == targets[row] ? 1 : 0));
    }
  }
};

template <class T>
void check(const Case& c) {
  Random random(c.rows * 1000 + c.cols);
  auto logits = random.normals<T>(c.rows * c.cols, 4.0);
  if (c.cols > 2) logits[1] = ptx::from_float<T>(-INFINITY);  // a token that the model rules out
  std::vector<int64_t> targets;
  for (int64_t row = 0; row < c.rows; ++row) targets.push_back(row == 0 ? c.cols - 1 : random.integer(0, c.cols - 1));
  const Losses<double> truth(c, logits, targets);
  const Losses<float> peer(c, logits, targets);

  for_each_seed([&] {
    StridedBuffer<T> x("logits", logits, c.rows, c.cols, c.stride, c.offset),
        d_logits("d_logits", c.rows, c.cols, c.stride, c.offset);
    simt::Buffer<int64_t> target("targets", targets);
    simt::Buffer<float> nll("nll", c.rows);
    const auto run = [&](const Matrix& gradient) {
      cuda::token_nll({x.view(), gradient, target.data(), nll.data(), c.soft_cap, c.logit_scale, kDType<T>}, kQueue);
    };
    run(c.gradient ? d_logits.view() : Matrix{});
    expect_as_good_as("nll", nll.values(), truth.nll, exact(peer.nll));
    if (!c.gradient) return;
    expect_as_good_as("d_logits", d_logits.values(), truth.d_logits, round_to<T>(exact(peer.d_logits)));
    const auto first = nll.values();
    run(x.view());
    expect_equal("nll in place", nll.values(), first);
    expect_equal("d_logits in place", x.values(), d_logits.values());
  });
}

// The gradient's rows begin elsewhere in their pieces than the logits'.
void check_rows_apart() {
  const Case c{3, 300, 300};
  const auto logits = Random(1).normals<bf16>(c.rows * c.cols);
  const std::vector<int64_t> targets{0, 299, 150};
  const Losses<double> truth(c, logits, targets);
  const Losses<float> peer(c, logits, targets);
  for_each_seed([&] {
    StridedBuffer<bf16> x("logits", logits, 3, 300, 300), d_logits("d_logits", 3, 300, 301, 3);
    simt::Buffer<int64_t> target("targets", targets);
    simt::Buffer<float> nll("nll", 3);
    cuda::token_nll({x.view(), d_logits.view(), target.data(), nll.data(), 0.0f, 1.0f, DType::bf16}, kQueue);
    expect_as_good_as("d_logits", d_logits.values(), truth.d_logits, round_to<bf16>(exact(peer.d_logits)));
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

// What the CPU's loops take for tanh.
void check_fast_tanh() {
  for (int i = -100000; i <= 100000; ++i) {
    const float x = static_cast<float>(i) * 2e-4f;
    if (const double error = std::abs(fast_tanh(x) - std::tanh(static_cast<double>(x))); !(error < 2e-7))
      fail("fast_tanh(%g) is off by %g", x, error);
  }
  if (!std::isnan(fast_tanh(NAN)) || fast_tanh(INFINITY) != 1.0f || fast_tanh(-INFINITY) != -1.0f)
    fail("fast_tanh of what is not finite");
}

LOCAS_TEST(token_nll, "token_nll") {
  std::vector<Case> cases = {
      {3, 1300, 1304},
      {2, 513, 513},
      {2, 96, 96},
      {2, 1, 1},
      {4, 70, 72, false},
      {2, 40000, 40000},
      {3, 1031, 1031, true, 3},
      {2, 300, 304, true, 0.0f, 0.25f},
      {2, 77, 80, true, 5, 2},
      {3, 130, 131, true, 0.0f, 1.0f, 1},
  };
  for (int i = 0; i < 3; ++i) {
    const int64_t cols = fresh().integer(2, 2000);
    cases.push_back({fresh().integer(1, 4), cols, cols + fresh().integer(0, 9), true, i * 4.0f, i == 1 ? 1.0f : 0.5f});
  }
  for (const Case& c : cases) {
    check<bf16>(c);
    check<f16>(c);
    check<float>(c);
  }
  check_rows_apart();
  for (const int64_t position : {10, 600, 699}) check_nan(position);
  check_fast_tanh();
  return std::to_string(3 * cases.size() + 4) + " cases, 10 seeds";
}

}  // namespace
}  // namespace locas::test
