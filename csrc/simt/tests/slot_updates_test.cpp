// adamw_slots, sgd_slots and the row clip against the textbook formulas in float64. The pattern for a kernel's
// test: a reference as plain loops over a number type (double: the truth, float: what torch would compute), a case that
// draws its data, launches through cuda/api.h in every seed and compares, and LOCAS_TEST functions that list cases.
#include "simt/tests/harness.h"

namespace locas::test {
namespace {

// One row of slots after a step, scaled back to length 1 if it is longer.
template <class Real>
void clip_rows(std::vector<Real>& slots, int64_t d) {
  for (size_t first = 0; first < slots.size(); first += d) {
    Real sum = 0;
    for (int64_t i = 0; i < d; ++i) sum += slots[first + i] * slots[first + i];
    if (sum > 1)
      for (int64_t i = 0; i < d; ++i) slots[first + i] /= std::sqrt(sum);
  }
}

struct AdamW {
  double learning_rate, beta1 = 0.9, beta2 = 0.999, eps = 1e-8, weight_decay = 0.01;
  int64_t step;
};

// [rows, d] each, in place
template <class Real>
struct AdamWState {
  std::vector<Real> slots, grad, exp_avg, exp_avg_sq;

  void step(const AdamW& o) {
    const Real correction1 = 1.0 - std::pow(o.beta1, o.step), correction2 = 1.0 - std::pow(o.beta2, o.step);
    for (size_t i = 0; i < slots.size(); ++i) {
      exp_avg[i] = Real(o.beta1) * exp_avg[i] + Real(1 - o.beta1) * grad[i];
      exp_avg_sq[i] = Real(o.beta2) * exp_avg_sq[i] + Real(1 - o.beta2) * grad[i] * grad[i];
      slots[i] -= Real(o.learning_rate * o.weight_decay) * slots[i];
      slots[i] -=
          Real(o.learning_rate) * (exp_avg[i] / correction1) / (std::sqrt(exp_avg_sq[i] / correction2) + Real(o.eps));
    }
  }
};

struct Shape {
  int64_t rows, d;
  size_t offset = 0;  // elements before each buffer: 1 makes every row misaligned
};

// Rows of lengths around 1, so that the clip takes some of them.
std::vector<float> draw_slots(Random& random, const Shape& shape) {
  return random.normals<float>(shape.rows * shape.d, 1.0 / std::sqrt(static_cast<double>(shape.d)));
}

// What the update needs besides the rows.
AdamwSlotsParams adamw_params(const AdamW& o, bool clip, const simt::Buffer<int64_t>& step,
                              const simt::Buffer<double>& learning_rate) {
  AdamwSlotsParams p{};
  p.step = {step.data(), DType::i64};
  p.learning_rate = {learning_rate.data(), DType::f64};
  p.beta1 = o.beta1;
  p.beta2 = o.beta2;
  p.log_beta1 = static_cast<float>(std::log(o.beta1));
  p.log_beta2 = static_cast<float>(std::log(o.beta2));
  p.eps = static_cast<float>(o.eps);
  p.weight_decay = static_cast<float>(o.weight_decay);
  p.clip = clip;
  return p;
}

template <class Copy>
void check_adamw(const Shape& shape, bool clip, bool with_copy) {
  Random random(shape.d);
  const size_t count = shape.rows * shape.d;
  const AdamW options{.learning_rate = 0.03, .step = random.integer(1, 2000)};
  AdamWState<float> before{draw_slots(random, shape), random.normals<float>(count), random.normals<float>(count, 0.1),
                           random.normals<float>(count, 0.1)};
  for (float& value : before.exp_avg_sq) value = value * value;

  AdamWState<float> peer = before;
  AdamWState<double> truth{exact(before.slots), exact(before.grad), exact(before.exp_avg), exact(before.exp_avg_sq)};
  peer.step(options);
  truth.step(options);
  if (clip) clip_rows(peer.slots, shape.d), clip_rows(truth.slots, shape.d);

  std::vector<float> first_run;
  for_each_seed([&] {
    simt::Buffer<float> slots("slots", before.slots, shape.offset), grad("grad", before.grad, shape.offset);
    simt::Buffer<float> exp_avg("exp_avg", before.exp_avg, shape.offset);
    simt::Buffer<float> exp_avg_sq("exp_avg_sq", before.exp_avg_sq, shape.offset);
    simt::Buffer<Copy> compute("compute", with_copy ? count : 0, shape.offset);
    simt::Buffer<int64_t> step("step", std::vector{options.step});
    simt::Buffer<double> learning_rate("learning_rate", std::vector{options.learning_rate});
    AdamwSlotsParams p = adamw_params(options, clip, step, learning_rate);
    p.slots = rows_of(slots, shape.rows, shape.d);
    p.grad = rows_of(grad, shape.rows, shape.d);
    p.exp_avg = rows_of(exp_avg, shape.rows, shape.d);
    p.exp_avg_sq = rows_of(exp_avg_sq, shape.rows, shape.d);
    if (with_copy) p.compute = rows_of(compute, shape.rows, shape.d);
    p.compute_dtype = kDType<Copy>;
    cuda::adamw_slots(p, kQueue);

    expect_as_good_as("slots", slots.values(), truth.slots, exact(peer.slots));
    expect_as_good_as("exp_avg", exp_avg.values(), truth.exp_avg, exact(peer.exp_avg));
    expect_as_good_as("exp_avg_sq", exp_avg_sq.values(), truth.exp_avg_sq, exact(peer.exp_avg_sq));
    if (with_copy) expect_as_good_as("compute", compute.values(), truth.slots, round_to<Copy>(exact(peer.slots)));
    // Bit for bit the same in every order of threads.
    if (first_run.empty()) first_run = slots.values();
    expect_equal("slots, repeated", slots.values(), first_run);
  });
}

LOCAS_TEST(adamw, "adamw_slots") {
  // Each of the kernels' widths, its bounds, and fresh ones.
  const std::vector<Shape> shapes = {{3, 1},
                                     {3, 36},
                                     {2, 512},
                                     {1, 1000},
                                     {2, 2048},
                                     {1, 4096},
                                     {1, 4100},
                                     {2, 260, 1},
                                     {2, fresh().integer(2, 4096)},
                                     {2, 4 * fresh().integer(2, 1024)}};
  for (const Shape& shape : shapes) check_adamw<bf16>(shape, true, true);
  check_adamw<f16>({3, 516}, true, true);
  check_adamw<float>({2, 97}, false, true);
  check_adamw<float>({2, 640}, true, false);
  return std::to_string(shapes.size() + 3) + " cases, 10 seeds";
}

struct Sgd {
  double learning_rate, momentum, weight_decay;
};

template <class Real>
struct SgdState {
  std::vector<Real> slots, grad, buffer;

  void step(const Sgd& o) {
    for (size_t i = 0; i < slots.size(); ++i) {
      buffer[i] = Real(o.momentum) * buffer[i] + grad[i];
      slots[i] -= Real(o.learning_rate * o.weight_decay) * slots[i];
      slots[i] -= Real(o.learning_rate) * buffer[i];
    }
  }
};

template <class Copy>
void check_sgd(const Shape& shape, double momentum) {
  Random random(shape.d);
  const size_t count = shape.rows * shape.d;
  const Sgd options{.learning_rate = 0.05, .momentum = momentum, .weight_decay = 0.02};
  const SgdState<float> before{draw_slots(random, shape), random.normals<float>(count, 0.3),
                               random.normals<float>(count, 0.3)};
  SgdState<float> peer = before;
  SgdState<double> truth{exact(before.slots), exact(before.grad), exact(before.buffer)};
  peer.step(options);
  truth.step(options);
  clip_rows(peer.slots, shape.d);
  clip_rows(truth.slots, shape.d);

  std::vector<float> first_run;
  for_each_seed([&] {
    simt::Buffer<float> slots("slots", before.slots, shape.offset), grad("grad", before.grad, shape.offset);
    simt::Buffer<float> buffer("momentum_buffer", before.buffer, shape.offset);
    simt::Buffer<Copy> compute("compute", count, shape.offset);
    simt::Buffer<float> learning_rate("learning_rate", std::vector{static_cast<float>(options.learning_rate)});
    SgdSlotsParams p{};
    p.slots = rows_of(slots, shape.rows, shape.d);
    p.grad = rows_of(grad, shape.rows, shape.d);
    if (momentum != 0.0) p.momentum_buffer = rows_of(buffer, shape.rows, shape.d);
    p.compute = rows_of(compute, shape.rows, shape.d);
    p.compute_dtype = kDType<Copy>;
    p.learning_rate = {learning_rate.data(), DType::f32};
    p.momentum = static_cast<float>(momentum);
    p.weight_decay = static_cast<float>(options.weight_decay);
    p.clip = true;
    cuda::sgd_slots(p, kQueue);

    expect_as_good_as("slots", slots.values(), truth.slots, exact(peer.slots));
    expect_as_good_as("compute", compute.values(), truth.slots, round_to<Copy>(exact(peer.slots)));
    if (momentum != 0.0) expect_as_good_as("momentum_buffer", buffer.values(), truth.buffer, exact(peer.buffer));
    else expect_equal("momentum_buffer without momentum", buffer.values(), before.buffer);
    if (first_run.empty()) first_run = slots.values();
    expect_equal("slots, repeated", slots.values(), first_run);
  });
}

LOCAS_TEST(sgd, "sgd_slots") {
  for (const double momentum : {0.0, 0.9}) {
    check_sgd<bf16>({3, 64}, momentum);
    check_sgd<f16>({2, 1028}, momentum);
    check_sgd<bf16>({3, 77}, momentum);
    check_sgd<f16>({2, 128, 1}, momentum);
    check_sgd<bf16>({2, fresh().integer(2, 4096)}, momentum);
    check_sgd<bf16>({2, 4 * fresh().integer(2, 1024)}, momentum);
  }
  return "12 cases, 10 seeds";
}

// ---- the same updates with the gradient formed from its factors ----------------------------------------------------
struct FactorShape {
  int64_t layers, r, d, tokens;
};

template <class T>
struct Factors {
  FactorShape s;
  int64_t stride;                                // of the coefficients: r and some columns that belong to others
  simt::Buffer<T> d_gate, d_key, hidden, x, dy;  // all layers, one behind the other

  Factors(const FactorShape& s, Random& random)
      : s(s), stride(s.r + 3), d_gate("d_gate", draw(random, stride)), d_key("d_key", draw(random, stride)),
        hidden("hidden", draw(random, stride)), x("x", draw(random, s.d)), dy("dy", draw(random, s.d)) {}

  std::vector<T> draw(Random& random, int64_t width) { return random.normals<T>(s.layers * s.tokens * width, 0.5); }

  LayerFactors params(float scale) {
    LayerFactors p{};
    for (int64_t layer = 0; layer < s.layers; ++layer) {
      const auto rows = [&](simt::Buffer<T>& buffer, int64_t cols, int64_t width) {
        return Matrix{buffer.data() + layer * s.tokens * width, s.tokens, cols, width};
      };
      p.layers[layer] = {rows(d_gate, s.r, stride), rows(d_key, s.r, stride), rows(hidden, s.r, stride),
                         rows(x, s.d, s.d), rows(dy, s.d, s.d)};
    }
    p.count = static_cast<int>(s.layers);
    p.scale = scale;
    p.dtype = kDType<T>;
    return p;
  }

  // [layers, 3, r, d]
  template <class Real>
  std::vector<Real> gradient(double scale) const {
    std::vector<Real> result;
    const simt::Buffer<T>* coefficients[] = {&d_gate, &d_key, &hidden};
    for (int64_t layer = 0; layer < s.layers; ++layer)
      for (int kind = 0; kind < 3; ++kind)
        for (int64_t slot = 0; slot < s.r; ++slot)
          for (int64_t i = 0; i < s.d; ++i) {
            Real sum = 0;
            for (int64_t token = 0; token < s.tokens; ++token) {
              const int64_t row = layer * s.tokens + token;
              sum += Real(exact((*coefficients[kind])[row * stride + slot])) *
                     Real(exact((kind == 2 ? dy : x)[row * s.d + i]));
            }
            result.push_back(sum * Real(scale));
          }
    return result;
  }
};

constexpr float kGradientScale = 0.25f;

template <class T>
void check_adamw_from_factors(const FactorShape& s, bool clip) {
  Random random(s.d * 100 + s.tokens);
  Factors<T> factors(s, random);
  const Shape shape{s.layers * 3 * s.r, s.d};
  const size_t count = shape.rows * shape.d;
  const AdamW options{.learning_rate = 0.03, .step = random.integer(1, 2000)};
  const auto slots_before = draw_slots(random, shape), exp_avg_before = random.normals<float>(count, 0.1);
  std::vector<float> exp_avg_sq_before = random.normals<float>(count, 0.1);
  for (float& value : exp_avg_sq_before) value = value * value;
  AdamWState<float> peer{slots_before, factors.template gradient<float>(kGradientScale), exp_avg_before,
                         exp_avg_sq_before};
  AdamWState<double> truth{exact(slots_before), factors.template gradient<double>(kGradientScale),
                           exact(exp_avg_before), exact(exp_avg_sq_before)};
  peer.step(options);
  truth.step(options);
  if (clip) clip_rows(peer.slots, s.d), clip_rows(truth.slots, s.d);
  for_each_seed([&] {
    simt::Buffer<float> slots("slots", slots_before), exp_avg("exp_avg", exp_avg_before);
    simt::Buffer<float> exp_avg_sq("exp_avg_sq", exp_avg_sq_before);
    simt::Buffer<T> compute("compute", count);
    simt::Buffer<int64_t> step("step", std::vector{options.step}), finite("finite", std::vector<int64_t>{0});
    simt::Buffer<double> learning_rate("learning_rate", std::vector{options.learning_rate});
    AdamwSlotsParams p = adamw_params(options, clip, step, learning_rate);
    p.slots = rows_of(slots, shape.rows, shape.d);
    p.exp_avg = rows_of(exp_avg, shape.rows, shape.d);
    p.exp_avg_sq = rows_of(exp_avg_sq, shape.rows, shape.d);
    p.compute = rows_of(compute, shape.rows, shape.d);
    p.compute_dtype = kDType<T>;
    p.finite = {finite.data(), DType::i64};
    cuda::adamw_slots_from_factors(p, factors.params(kGradientScale), kQueue);
    expect_equal("slots where the gradient is not finite", slots.values(), slots_before);
    finite[0] = 1;
    cuda::adamw_slots_from_factors(p, factors.params(kGradientScale), kQueue);
    expect_as_good_as("slots", slots.values(), truth.slots, exact(peer.slots));
    expect_as_good_as("exp_avg", exp_avg.values(), truth.exp_avg, exact(peer.exp_avg));
    expect_as_good_as("exp_avg_sq", exp_avg_sq.values(), truth.exp_avg_sq, exact(peer.exp_avg_sq));
    expect_as_good_as("compute", compute.values(), truth.slots, round_to<T>(exact(peer.slots)));
  });
}

template <class T>
void check_sgd_from_factors(const FactorShape& s, double momentum) {
  Random random(s.d * 100 + s.tokens);
  Factors<T> factors(s, random);
  const Shape shape{s.layers * 3 * s.r, s.d};
  const size_t count = shape.rows * shape.d;
  const Sgd options{.learning_rate = 0.05, .momentum = momentum, .weight_decay = 0.02};
  const auto slots_before = draw_slots(random, shape), buffer_before = random.normals<float>(count, 0.3);
  SgdState<float> peer{slots_before, factors.template gradient<float>(kGradientScale), buffer_before};
  SgdState<double> truth{exact(slots_before), factors.template gradient<double>(kGradientScale), exact(buffer_before)};
  peer.step(options);
  truth.step(options);
  clip_rows(peer.slots, s.d);
  clip_rows(truth.slots, s.d);
  for_each_seed([&] {
    simt::Buffer<float> slots("slots", slots_before), buffer("momentum_buffer", buffer_before);
    simt::Buffer<T> compute("compute", count);
    simt::Buffer<float> learning_rate("learning_rate", std::vector{static_cast<float>(options.learning_rate)});
    SgdSlotsParams p{};
    p.slots = rows_of(slots, shape.rows, shape.d);
    if (momentum != 0.0) p.momentum_buffer = rows_of(buffer, shape.rows, shape.d);
    p.compute = rows_of(compute, shape.rows, shape.d);
    p.compute_dtype = kDType<T>;
    p.learning_rate = {learning_rate.data(), DType::f32};
    p.momentum = static_cast<float>(momentum);
    p.weight_decay = static_cast<float>(options.weight_decay);
    p.clip = true;
    cuda::sgd_slots_from_factors(p, factors.params(kGradientScale), kQueue);
    expect_as_good_as("slots", slots.values(), truth.slots, exact(peer.slots));
    if (momentum != 0.0) expect_as_good_as("momentum_buffer", buffer.values(), truth.buffer, exact(peer.buffer));
  });
}

LOCAS_TEST(from_factors, "adamw_slots_from_factors, sgd_slots_from_factors") {
  check_adamw_from_factors<bf16>({2, 5, 72, 7}, true);
  check_adamw_from_factors<f16>({1, 4, 1032, 64}, true);
  check_adamw_from_factors<bf16>({1, 1, 2056, 1}, false);
  check_adamw_from_factors<bf16>({1, 3, 4104, 3}, true);
  check_sgd_from_factors<bf16>({3, 6, 136, 33}, 0.0);
  check_sgd_from_factors<f16>({1, 9, 264, 16}, 0.9);
  return "6 cases, 10 seeds";
}

}  // namespace
}  // namespace locas::test
