// glu_activation_forward, glu_activation_backward and neuron_importance_of_products against the activations' textbook
// formulas in float64. The peer is what torch computes: each operation in float, its result rounded to the
// storage type.
#include <array>

#include "simt/tests/harness.h"

namespace locas::test {
namespace {

template <class Real>
struct ValueAndSlope {
  Real value, slope;
};

constexpr ActivationParams kParams = {0.75f, 1.25f};  // of xIELU; exact in every dtype

template <class Real>
ValueAndSlope<Real> activation(Activation activation, Real x) {
  switch (activation) {
    case Activation::silu: {
      const Real s = 1 / (1 + std::exp(-x));
      return {x * s, s * (1 + x * (1 - s))};
    }
    case Activation::gelu_tanh: {
      const Real c = std::sqrt(2.0 / M_PI), cubic = 0.044715, half = 0.5;
      const Real t = std::tanh(c * (x + cubic * x * x * x));
      return {half * x * (1 + t), half * (1 + t) + half * x * (1 - t * t) * c * (1 + 3 * cubic * x * x)};
    }
    case Activation::gelu: {
      const Real half = 0.5, cdf = half * (1 + std::erf(x * Real(M_SQRT1_2)));
      return {x * cdf, cdf + x * std::exp(-half * x * x) * Real(0.5 * M_2_SQRTPI * M_SQRT1_2)};
    }
    case Activation::xielu: {
      const Real half = 0.5;
      if (x > 0) return {kParams.positive * x * x + half * x, 2 * kParams.positive * x + half};
      const Real curve = std::expm1(x) - x;
      return {kParams.negative * curve + half * x, kParams.negative * std::expm1(x) + half};
    }
    case Activation::relu_squared: return {x > 0 ? x * x : Real(0), 2 * std::max<Real>(x, 0)};
    case Activation::quick_gelu: {
      const Real steepness = 1.702, s = 1 / (1 + std::exp(-steepness * x));
      return {x * s, s + steepness * x * s * (1 - s)};
    }
    default: return {std::max<Real>(x, 0), Real(x > 0)};
  }
}

struct Case {
  Activation activation;
  int64_t rows, cols, stride;
  size_t offset = 0;      // elements before each matrix
  bool in_place = false;  // d_hidden is d_gate
};

const std::vector<Case> kCases = {
    {Activation::silu, 5, 40, 40},          {Activation::silu, 300, 8, 8},
    {Activation::silu, 3, 13, 16},          {Activation::gelu_tanh, 7, 72, 80},
    {Activation::gelu_tanh, 2, 64, 64, 1},  {Activation::gelu, 9, 33, 33},
    {Activation::relu, 4, 16, 24, 0, true}, {Activation::silu, 1, 1, 1, 0, true},
    {Activation::silu, 6, 50, 53, 0, true}, {Activation::relu_squared, 5, 21, 24},
    {Activation::quick_gelu, 7, 30, 32, 1}, {Activation::xielu, 6, 45, 48},
};

template <class T>
void check_glu(const Case& c) {
  Random random(c.rows * 1000 + c.cols);
  const int64_t count = c.rows * c.cols;
  const auto gate = random.normals<T>(count, 2.0), up = random.normals<T>(count), d_hidden = random.normals<T>(count);
  const float scale = 0.3f;

  struct Results {
    std::vector<double> hidden, d_gate, d_up;
  } truth, peer;
  const auto r = [](double value) { return round_to<T>(value); };
  for (int64_t i = 0; i < count; ++i) {
    const double g = exact(gate[i]), u = exact(up[i]), d = exact(d_hidden[i]);
    const auto [value, slope] = activation<double>(c.activation, g);
    const auto [peer_value, peer_slope] = activation<float>(c.activation, g);
    truth.hidden.push_back(scale * value * u);
    truth.d_gate.push_back(scale * d * u * slope);
    truth.d_up.push_back(scale * d * value);
    peer.hidden.push_back(r(scale * r(r(peer_value) * u)));
    peer.d_gate.push_back(r(r(r(scale * d) * u) * r(peer_slope)));
    peer.d_up.push_back(r(r(scale * d) * r(peer_value)));
  }

  for_each_seed([&] {
    const auto input = [&](const char* name, const std::vector<T>& values) {
      return StridedBuffer<T>(name, values, c.rows, c.cols, c.stride, c.offset);
    };
    const auto output = [&](const char* name) { return StridedBuffer<T>(name, c.rows, c.cols, c.stride, c.offset); };
    auto gates = input("gate", gate), ups = input("up", up), out = output("out");
    cuda::glu_activation_forward({gates.view(), ups.view(), out.view(), scale, c.activation, kParams, kDType<T>},
                                 kQueue);
    expect_as_good_as("out", out.values(), truth.hidden, peer.hidden);

    auto d_hiddens = input("d_hidden", d_hidden), d_gate = output("d_gate"), d_up = output("d_up"),
         hidden = output("hidden");
    auto& d_gates = c.in_place ? d_hiddens : d_gate;
    const Matrix hidden_rows = c.in_place ? Matrix{} : hidden.view();
    cuda::glu_activation_backward({d_hiddens.view(), gates.view(), ups.view(), d_gates.view(), d_up.view(), hidden_rows,
                                   scale, c.activation, kParams, kDType<T>},
                                  kQueue);
    expect_as_good_as("d_gate", d_gates.values(), truth.d_gate, peer.d_gate);
    expect_as_good_as("d_up", d_up.values(), truth.d_up, peer.d_up);
    if (hidden_rows.data) expect_equal("hidden", hidden.values(), out.values());
  });
}

// Without `up`: the activation alone, as where up is all ones.
template <class T>
void check_without_up(const Case& c) {
  Random random(c.rows * 1000 + c.cols + 1);
  const int64_t count = c.rows * c.cols;
  const auto gate = random.normals<T>(count, 2.0), d_hidden = random.normals<T>(count);
  const std::vector<T> ones(count, ptx::from_float<T>(1.0f));
  const float scale = 0.3f;
  for_each_seed([&] {
    const auto input = [&](const char* name, const std::vector<T>& values) {
      return StridedBuffer<T>(name, values, c.rows, c.cols, c.stride, c.offset);
    };
    const auto output = [&](const char* name) { return StridedBuffer<T>(name, c.rows, c.cols, c.stride, c.offset); };
    const Matrix none;
    const auto run = [&](const Matrix& up, const Matrix& d_up) {
      auto gates = input("gate", gate), d_hiddens = input("d_hidden", d_hidden);
      auto out = output("out"), d_gate = output("d_gate"), hidden = output("hidden");
      cuda::glu_activation_forward({gates.view(), up, out.view(), scale, c.activation, kParams, kDType<T>}, kQueue);
      auto& d_gates = c.in_place ? d_hiddens : d_gate;
      cuda::glu_activation_backward({d_hiddens.view(), gates.view(), up, d_gates.view(), d_up, hidden.view(), scale,
                                     c.activation, kParams, kDType<T>},
                                    kQueue);
      return std::array{out.values(), d_gates.values(), hidden.values()};
    };
    auto ups = input("up", ones), d_up = output("d_up");
    const auto with_ones = run(ups.view(), d_up.view()), without = run(none, none);
    for (size_t i = 0; i < without.size(); ++i) expect_equal("without up", without[i], with_ones[i]);
  });
}

LOCAS_TEST(glu, "glu_activation_forward, glu_activation_backward") {
  std::vector<Case> cases = kCases;
  for (int i = 0; i < 2; ++i) {
    const int64_t cols = fresh().integer(1, 100);
    cases.push_back({Activation::silu, fresh().integer(1, 50), cols, cols + fresh().integer(0, 9)});
  }
  for (const Case& c : cases) {
    check_glu<bf16>(c);
    check_glu<f16>(c);
    check_glu<float>(c);
    check_without_up<bf16>(c);
    check_without_up<f16>(c);
    check_without_up<float>(c);
  }
  return std::to_string(6 * cases.size()) + " cases, 10 seeds";
}

template <class T>
void check_importance(Activation act, int64_t rows, int64_t cols, int64_t stride) {
  Random random(rows * 1000 + cols);
  const auto gate = random.normals<T>(rows * cols, 2.0), up = random.normals<T>(rows * cols);
  std::vector<double> truth(cols, 0.0);
  std::vector<float> sums(cols, 0.0f);
  for (int64_t i = 0; i < rows * cols; ++i) {
    const double term = std::abs(activation<double>(act, exact(gate[i])).value * exact(up[i]));
    truth[i % cols] += term / rows;
    sums[i % cols] += static_cast<float>(term);
  }
  for (float& sum : sums) sum /= rows;
  std::vector<float> first_run;
  for_each_seed([&] {
    StridedBuffer<T> gates("gate", gate, rows, cols, stride), ups("up", up, rows, cols, stride);
    simt::Buffer<float> importance("importance", cols);
    cuda::neuron_importance_of_products({gates.view(), ups.view(), importance.data(), act, kParams, kDType<T>}, kQueue);
    expect_as_good_as("importance", importance.values(), truth, exact(sums));
    if (first_run.empty()) first_run = importance.values();
    expect_equal("importance, repeated", importance.values(), first_run);
  });
}

LOCAS_TEST(importances, "neuron_importance_of_products") {
  check_importance<bf16>(Activation::silu, 37, 70, 72);
  check_importance<f16>(Activation::gelu_tanh, 8, 32, 32);
  check_importance<float>(Activation::relu, 3, 5, 5);
  check_importance<bf16>(Activation::xielu, 9, 40, 40);
  return "4 cases, 10 seeds";
}

}  // namespace
}  // namespace locas::test
