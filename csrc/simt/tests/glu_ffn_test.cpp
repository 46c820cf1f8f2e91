// glu_ffn (K1-K4, D1 and D2, DB) and neuron_importance: the fused FFN with memory against float64, over shapes that fit no
// tile.
//
// Small integers make every product and sum exact, so that one wrong index shows as a difference; normal numbers then
// test the rounding. All outputs start as NaN, and all inputs end where their last element ends.
#include <algorithm>

#include "cuda/ffn/ffn_kernels.h"
#include "cuda/ffn/sm80/launchers.h"
#include "cuda/ffn/sm90/launchers.h"
#include "cuda/ffn/sm90/plan.cuh"
#include "simt/tests/harness.h"

namespace locas::test {
namespace {

using cuda::FfnKernels;

struct Shape {
  int64_t tokens, d, m, r;
  Activation activation;
  bool biases;
};

double activated(Activation activation, double x) {
  switch (activation) {
    case Activation::silu: return x / (1.0 + std::exp(-x));
    case Activation::gelu_tanh: return 0.5 * x * (1.0 + std::tanh(std::sqrt(2.0 / M_PI) * (x + 0.044715 * x * x * x)));
    case Activation::gelu: return 0.5 * x * (1.0 + std::erf(x / std::sqrt(2.0)));
    case Activation::relu_squared: return x > 0.0 ? x * x : 0.0;
    case Activation::quick_gelu: return x / (1.0 + std::exp(-1.702 * x));
    default: return x > 0.0 ? x : 0.0;
  }
}

double slope(Activation activation, double x) {
  if (activation == Activation::relu) return x > 0.0 ? 1.0 : 0.0;
  const double h = 1e-5;
  return (activated(activation, x + h) - activated(activation, x - h)) / (2 * h);
}

// [rows, cols] in doubles.
struct Doubles {
  int64_t rows, cols;
  std::vector<double> values;
  Doubles(int64_t rows, int64_t cols) : rows(rows), cols(cols), values(rows * cols) {}
  double& at(int64_t row, int64_t col) { return values[row * cols + col]; }
  double at(int64_t row, int64_t col) const { return values[row * cols + col]; }
};

template <class T>
Doubles matrix(const simt::Buffer<T>& buffer, int64_t rows, int64_t cols, int64_t stride = 0, int64_t first = 0) {
  Doubles result(rows, cols);
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t col = 0; col < cols; ++col)
      result.at(row, col) = exact(buffer[row * (stride ? stride : cols) + first + col]);
  return result;
}

// a b^T, or a b with `plain`, or a^T b with `left`.
enum class Order { transposed, plain, left };
Doubles product(const Doubles& a, const Doubles& b, Order order) {
  const int64_t rows = order == Order::left ? a.cols : a.rows, cols = order == Order::transposed ? b.rows : b.cols;
  const int64_t inner = order == Order::left ? a.rows : a.cols;
  Doubles result(rows, cols);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < cols; ++j) {
      double sum = 0.0;
      for (int64_t k = 0; k < inner; ++k)
        sum +=
            (order == Order::left ? a.at(k, i) : a.at(i, k)) * (order == Order::transposed ? b.at(j, k) : b.at(k, j));
      result.at(i, j) = sum;
    }
  return result;
}

template <class F>
Doubles mapped(const Doubles& a, const Doubles& b, F&& f) {
  Doubles result(a.rows, a.cols);
  for (size_t i = 0; i < result.values.size(); ++i) result.values[i] = f(a.values[i], b.values[i]);
  return result;
}

template <class T>
Doubles rounded(const Doubles& a) {
  return mapped(a, a, [](double x, double) { return round_to<T>(x); });
}

// One FFN with its memory: inputs, outputs and the launch parameters over them.
template <class T>
struct Ffn {
  Shape s;
  int64_t width;  // m + r, r rounded up to 8
  double scale;
  simt::Buffer<T> x, dy, gate_weight, up_weight, down_weight, slots, gate_bias, up_bias, down_bias;
  simt::Buffer<T> hidden, gate, up, y, d_gate, d_up, memory_hidden, dx;
  simt::Buffer<float> slots_grad;

  Ffn(const Shape& s, double scale, const std::function<std::vector<T>(int64_t, int64_t)>& draw)
      : s(s), width(s.m + (s.r + 7) / 8 * 8), scale(scale), x("x", draw(s.tokens * s.d, 1)),
        dy("dy", draw(s.tokens * s.d, 1)), gate_weight("gate_weight", draw(s.m * s.d, s.d)),
        up_weight("up_weight", draw(s.m * s.d, s.d)), down_weight("down_weight", draw(s.d * s.m, s.m)),
        slots("slots", draw(3 * s.r * s.d, s.d)), gate_bias("gate_bias", draw(s.m, 1)),
        up_bias("up_bias", draw(s.m, 1)), down_bias("down_bias", draw(s.d, 1)), hidden("hidden", s.tokens * width),
        gate("gate", s.tokens * width), up("up", s.tokens * width), y("y", s.tokens * s.d),
        d_gate("d_gate", s.tokens * width), d_up("d_up", s.tokens * width),
        memory_hidden("memory_hidden", s.tokens * (width - s.m)), dx("dx", s.tokens * s.d),
        slots_grad("slots_grad", 3 * s.r * s.d) {
    std::fill(slots_grad.data(), slots_grad.data() + slots_grad.size(), 1.0f);  // is added to
  }

  FfnWeights weights() {
    const auto bias = [&](simt::Buffer<T>& buffer) { return s.biases ? buffer.data() : nullptr; };
    const auto slot_rows = [&](int kind) { return Matrix{slots.data() + kind * s.r * s.d, s.r, s.d, s.d}; };
    return {.gate = rows_of(gate_weight, s.m, s.d),
            .up = rows_of(up_weight, s.m, s.d),
            .down = rows_of(down_weight, s.d, s.m),
            .gate_bias = bias(gate_bias),
            .up_bias = bias(up_bias),
            .down_bias = bias(down_bias),
            .memory_gate = slot_rows(0),
            .memory_key = slot_rows(1),
            .memory_value = slot_rows(2)};
  }

  Matrix tokens_by(simt::Buffer<T>& buffer, int64_t cols, bool there = true) {
    return there ? rows_of(buffer, s.tokens, cols) : Matrix{};
  }

  void forward(const FfnKernels& kernels, bool save) {
    const FfnWeights w = weights();
    simt::Buffer<float> workspace("workspace", kernels.glu_ffn_forward_workspace(s.tokens, w.sizes()));
    kernels.glu_ffn_forward({.weights = w,
                             .x = tokens_by(x, s.d),
                             .hidden = tokens_by(hidden, width),
                             .gate = tokens_by(gate, width, save),
                             .up = tokens_by(up, width, save),
                             .y = tokens_by(y, s.d),
                             .workspace = workspace.data(),
                             .scale = static_cast<float>(scale),
                             .activation = s.activation,
                             .dtype = kDType<T>},
                            kQueue);
  }

  void backward(const FfnKernels& kernels, bool needs_dx) {
    const FfnWeights w = weights();
    const int64_t floats = needs_dx ? kernels.glu_ffn_backward_workspace(s.tokens, w.sizes()) : 0;
    simt::Buffer<float> workspace("workspace", floats);
    kernels.glu_ffn_backward({.weights = w,
                              .dy = tokens_by(dy, s.d),
                              .x = tokens_by(x, s.d),
                              .gate = tokens_by(gate, width),
                              .up = tokens_by(up, width),
                              .d_gate = tokens_by(d_gate, width),
                              .d_up = tokens_by(d_up, width),
                              .memory_hidden = tokens_by(memory_hidden, width - s.m),
                              .dx = tokens_by(dx, s.d, needs_dx),
                              .slots_grad = rows_of(slots_grad, 3 * s.r, s.d),
                              .workspace = workspace.data(),
                              .scale = static_cast<float>(scale),
                              .activation = s.activation,
                              .dtype = kDType<T>},
                             kQueue);
  }

  Doubles slot_rows(int kind) const {
    Doubles result(s.r, s.d);
    for (int64_t i = 0; i < s.r * s.d; ++i) result.values[i] = exact(slots[kind * s.r * s.d + i]);
    return result;
  }
};

void add_bias(Doubles& a, const std::vector<double>& bias) {
  for (int64_t row = 0; row < a.rows; ++row)
    for (int64_t col = 0; col < a.cols; ++col) a.at(row, col) += bias[col];
}

// What the forward and backward give, exactly (rounds = false) or rounded to T wherever torch would write a tensor.
template <class T>
struct Expected {
  Doubles gate, up, memory_gate, memory_up, hidden, memory_hidden, y;
  Doubles dx, d_gate_rows, d_key_rows, d_value_rows;
};

template <class T>
Expected<T> expected(const Ffn<T>& f, bool rounds) {
  const Shape& s = f.s;
  const auto keep = [&](Doubles a) { return rounds ? rounded<T>(a) : a; };
  const auto bias = [&](const simt::Buffer<T>& buffer) {
    std::vector<double> values;
    for (size_t i = 0; i < buffer.size(); ++i) values.push_back(s.biases ? exact(buffer[i]) : 0.0);
    return values;
  };
  const auto x = matrix(f.x, s.tokens, s.d), dy = matrix(f.dy, s.tokens, s.d);
  const auto w_gate = matrix(f.gate_weight, s.m, s.d), w_up = matrix(f.up_weight, s.m, s.d);
  const auto w_down = matrix(f.down_weight, s.d, s.m);
  const Doubles g = f.slot_rows(0), k = f.slot_rows(1), v = f.slot_rows(2);
  const auto glu = [&](double scale) {
    return [=, &s](double gate, double up) { return scale * activated(s.activation, gate) * up; };
  };
  Doubles gate = product(x, w_gate, Order::transposed), up = product(x, w_up, Order::transposed);
  add_bias(gate, bias(f.gate_bias));
  add_bias(up, bias(f.up_bias));
  gate = keep(gate), up = keep(up);
  const Doubles memory_gate = keep(product(x, g, Order::transposed)),
                memory_up = keep(product(x, k, Order::transposed));
  const Doubles hidden = keep(mapped(gate, up, glu(1.0))),
                memory_hidden = keep(mapped(memory_gate, memory_up, glu(f.scale)));
  const auto plus = [](double a, double b) { return a + b; };
  Doubles host_y = product(hidden, w_down, Order::transposed);
  add_bias(host_y, bias(f.down_bias));
  const Doubles y = keep(mapped(keep(host_y), product(memory_hidden, v, Order::plain), plus));

  const auto d_up_of = [&](double scale, const Doubles& d_hidden, const Doubles& gate) {
    return keep(mapped(d_hidden, gate, [&](double d, double g) { return scale * d * activated(s.activation, g); }));
  };
  const auto d_gate_of = [&](double scale, const Doubles& d_hidden, const Doubles& gate, const Doubles& up) {
    const Doubles slopes = mapped(gate, up, [&](double g, double u) { return slope(s.activation, g) * u; });
    return keep(mapped(d_hidden, slopes, [&](double d, double a) { return scale * d * a; }));
  };
  const Doubles d_hidden = keep(product(dy, w_down, Order::plain)), d_memory = keep(product(dy, v, Order::transposed));
  const Doubles d_gate = d_gate_of(1.0, d_hidden, gate, up), d_up = d_up_of(1.0, d_hidden, gate);
  const Doubles d_memory_gate = d_gate_of(f.scale, d_memory, memory_gate, memory_up);
  const Doubles d_memory_up = d_up_of(f.scale, d_memory, memory_gate);
  Doubles dx = keep(product(d_gate, w_gate, Order::plain));
  dx = keep(mapped(dx, product(d_up, w_up, Order::plain), plus));
  dx = keep(mapped(dx, product(d_memory_gate, g, Order::plain), plus));
  dx = keep(mapped(dx, product(d_memory_up, k, Order::plain), plus));
  return {gate,
          up,
          memory_gate,
          memory_up,
          hidden,
          memory_hidden,
          y,
          dx,
          keep(product(d_memory_gate, x, Order::left)),
          keep(product(d_memory_up, x, Order::left)),
          keep(product(memory_hidden, dy, Order::left))};
}

template <class T>
std::vector<T> typed(const Doubles& a) {
  std::vector<T> values;
  for (double value : a.values) values.push_back(ptx::from_float<T>(static_cast<float>(value)));
  return values;
}

template <class T>
std::vector<T> columns(const simt::Buffer<T>& buffer, int64_t rows, int64_t stride, int64_t first, int64_t count) {
  std::vector<T> values;
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t col = 0; col < count; ++col) values.push_back(buffer[row * stride + first + col]);
  return values;
}

// check(what, ours, name of the member of Expected) for every output.
template <class T, class Check>
void check_forward(const Ffn<T>& f, bool save, Check&& check) {
  const Shape& s = f.s;
  const auto part = [&](const simt::Buffer<T>& buffer, int64_t first, int64_t count) {
    return columns(buffer, s.tokens, f.width, first, count);
  };
  if (save) {
    check("gate", part(f.gate, 0, s.m), &Expected<T>::gate);
    check("up", part(f.up, 0, s.m), &Expected<T>::up);
    check("memory gate", part(f.gate, s.m, s.r), &Expected<T>::memory_gate);
    check("memory key", part(f.up, s.m, s.r), &Expected<T>::memory_up);
  }
  check("hidden", part(f.hidden, 0, s.m), &Expected<T>::hidden);
  check("memory hidden", part(f.hidden, s.m, s.r), &Expected<T>::memory_hidden);
  check("y", f.y.values(), &Expected<T>::y);
  const int64_t padding = f.width - s.m - s.r;
  expect_equal("padding", part(f.hidden, s.m + s.r, padding),
               std::vector<T>(s.tokens * padding, ptx::from_float<T>(0.0f)));
}

template <class T>
std::vector<float> without_start(const Ffn<T>& f, int kind) {
  std::vector<float> values;
  for (int64_t i = 0; i < f.s.r * f.s.d; ++i) values.push_back(f.slots_grad[kind * f.s.r * f.s.d + i] - 1.0f);
  return values;
}

template <class T, class Check, class CheckFloat>
void check_backward(const Ffn<T>& f, bool needs_dx, Check&& check, CheckFloat&& check_float) {
  if (needs_dx) check("dx", f.dx.values(), &Expected<T>::dx);
  check_float("d_gate rows", without_start(f, 0), &Expected<T>::d_gate_rows);
  check_float("d_key rows", without_start(f, 1), &Expected<T>::d_key_rows);
  check_float("d_value rows", without_start(f, 2), &Expected<T>::d_value_rows);
}

// -1, 0 or 1, mostly 0: with ReLU, every result is an integer that float holds exactly.
template <class T>
void exact_case(const Shape& s, const FfnKernels& kernels, Random& random) {
  Ffn<T> f(s, 2.0, [&](int64_t count, int64_t) {
    std::vector<T> values(count);
    for (T& value : values) {
      const int64_t drawn = random.integer(-3, 3);
      value = ptx::from_float<T>(drawn == 3 ? 1.0f : drawn == -3 ? -1.0f : 0.0f);
    }
    return values;
  });
  const Expected<T> exact = expected(f, false);
  const auto check = [&](const char* what, const std::vector<T>& ours, Doubles Expected<T>::* member) {
    expect_equal(what, ours, typed<T>(exact.*member));
  };
  const auto check_float = [&](const char* what, const std::vector<float>& ours, Doubles Expected<T>::* member) {
    expect_equal(what, ours, typed<float>(exact.*member));
  };
  const bool save = random.integer(0, 3) > 0;
  f.forward(kernels, save);
  check_forward(f, save, check);
  if (!save) return;
  const bool needs_dx = random.integer(0, 3) > 0;
  f.backward(kernels, needs_dx);
  check_backward(f, needs_dx, check, check_float);
}

template <class T>
void rounded_case(const Shape& s, const FfnKernels& kernels, Random& random, bool backward = true) {
  Ffn<T> f(s, 0.7, [&](int64_t count, int64_t fan_in) {
    return random.normals<T>(count, 1.0 / std::sqrt(static_cast<double>(fan_in)));
  });
  const Expected<T> exact = expected(f, false), peer = expected(f, true);
  const auto check = [&](const char* what, const auto& ours, Doubles Expected<T>::* member) {
    expect_as_good_as(what, ours, (exact.*member).values, (peer.*member).values, kRounding<T>);
  };
  f.forward(kernels, true);
  check_forward(f, true, check);
  if (!backward) return;
  f.backward(kernels, true);
  check_backward(f, true, check, check);
}

// Fresh sizes for every seed: d and m are multiples of 8, r and the tokens are not.
Shape draw_shape(Random& random, int64_t least_tokens, int64_t most_tokens, Activation activation) {
  return {random.integer(least_tokens, most_tokens),
          8 * random.integer(1, 20),
          8 * random.integer(1, 24),
          random.integer(1, 40),
          activation,
          random.integer(0, 1) == 1};
}

// Integers in one half type and normal numbers in the other, every seed.
std::string run_each(const FfnKernels& kernels, int64_t least_tokens, int64_t most_tokens, uint64_t start) {
  Random random(start);
  int cases = 0;
  for_each_seed([&] {
    const Shape whole = draw_shape(random, least_tokens, most_tokens, Activation::relu);
    const Shape other = draw_shape(random, least_tokens, most_tokens, static_cast<Activation>((start + cases / 4) % 6));
    if (cases % 4 == 0) {
      exact_case<bf16>(whole, kernels, random);
      rounded_case<f16>(other, kernels, random);
    } else {
      exact_case<f16>(whole, kernels, random);
      rounded_case<bf16>(other, kernels, random);
    }
    cases += 2;
  });
  return std::to_string(cases) + " shapes, " + std::to_string(kSeeds) + " seeds";
}

// The sm80 family with one of its forwards, on a device without room for its cooperative kernel.
FfnKernels with_forward(void (*forward)(const GluFfnForwardParams&, cuda::Queue)) {
  FfnKernels kernels = cuda::sm80::table;
  kernels.glu_ffn_forward = forward;
  kernels.glu_ffn_backward = [](const GluFfnBackwardParams& p, cuda::Queue queue) {
    simt::set_cooperative_launches(false);
    cuda::sm80::glu_ffn_backward(p, queue);
    simt::set_cooperative_launches(true);
  };
  return kernels;
}
FfnKernels tiles() {
  FfnKernels kernels = with_forward(cuda::sm80::glu_ffn_forward_tiles);
  kernels.glu_ffn_forward_workspace = cuda::sm80::glu_ffn_tiles_workspace;
  return kernels;
}
FfnKernels decode() { return with_forward(cuda::sm80::glu_ffn_forward_decode); }

LOCAS_TEST(narrow_tiles, "glu_ffn with narrow tiles") { return run_each(tiles(), 1, 16, 1); }
LOCAS_TEST(small_tiles, "glu_ffn with small tiles") { return run_each(tiles(), 17, 100, 2); }
LOCAS_TEST(large_tiles, "glu_ffn with large tiles") { return run_each(tiles(), 260, 300, 3); }
LOCAS_TEST(few_tokens, "glu_ffn_decode") { return run_each(decode(), 1, cuda::sm80::kMostDecodeTokens, 4); }

// Weights whose rows a warp comes back to several times: as many as it fetches ahead, and more.
Shape draw_long_rows(Random& random, int64_t most_tokens) {
  const bool wide = random.integer(0, 1) == 1;
  const int64_t d = 8 * (wide ? random.integer(30, 140) : random.integer(1, 8));
  const int64_t m = 8 * (wide ? random.integer(1, 14) : random.integer(60, 270));
  return {random.integer(most_tokens / 2 + 1, most_tokens), d, m, random.integer(1, 20), Activation::silu, false};
}

LOCAS_TEST(long_rows, "glu_ffn_decode with long rows") {
  Random& random = fresh();
  int seed = 0;
  for_each_seed([&] {
    for (const int64_t most_tokens : {8 << seed % 2, 32 << seed % 2})
      rounded_case<bf16>(draw_long_rows(random, most_tokens), decode(), random, false);
    ++seed;
  });
  return "20 shapes, 10 seeds";
}

LOCAS_TEST(decode_backward, "glu_ffn_decode_backward") {
  Random& random = fresh();
  int seed = 0;
  for_each_seed([&] {
    const int most_tokens = 8 << seed % 2;
    if (seed % 5 < 3) rounded_case<bf16>(draw_long_rows(random, most_tokens), cuda::sm80::table, random);
    else exact_case<f16>(draw_shape(random, 1, most_tokens, Activation::relu), cuda::sm80::table, random);
    ++seed;
  });
  return "10 shapes, 10 seeds";
}

// The sm90 family with tiles of the test's choice: each product whole or in slices.
using cuda::sm90::TileKind;

struct HopperTiles {
  TileKind hidden, down, hidden_grad, input;
  int splits;  // at most, of K2, and of both kinds of unit of K4
};
HopperTiles hopper_tiles;

int hopper_splits(int64_t blocks) { return static_cast<int>(std::min<int64_t>(hopper_tiles.splits, blocks)); }

void hopper_forward(const GluFfnForwardParams& p, cuda::Queue queue) {
  GluFfnForwardParams own = p;
  const int64_t blocks = cuda::divide_up(p.weights.m(), 64) + cuda::divide_up(p.weights.r(), 64);
  const int splits = hopper_splits(blocks);
  simt::Buffer<float> workspace("workspace", splits > 1 ? splits * p.tokens() * p.weights.d() : 0);
  own.workspace = workspace.data();
  cuda::sm90::glu_ffn_hidden(own, static_cast<int>(hopper_tiles.hidden), queue);
  cuda::sm90::glu_ffn_down(own, static_cast<int>(hopper_tiles.down), splits, queue);
}

void hopper_backward(const GluFfnBackwardParams& p, cuda::Queue queue) {
  GluFfnBackwardParams own = p;
  const int64_t blocks = cuda::divide_up(p.weights.m(), 64) + cuda::divide_up(p.weights.r(), 64);
  const int splits = p.dx.data ? hopper_splits(2 * blocks) : 1;
  const int slot_splits = hopper_splits(cuda::divide_up(p.tokens(), 64));
  simt::Buffer<float> workspace("workspace",
                                (splits > 1 ? splits * p.tokens() * p.weights.d() : 0) +
                                    (slot_splits > 1 ? slot_splits * 3 * p.weights.r() * p.weights.d() : 0));
  own.workspace = workspace.data();
  cuda::sm90::glu_ffn_hidden_grad(own, static_cast<int>(hopper_tiles.hidden_grad), queue);
  cuda::sm90::glu_ffn_input_and_slots_grad(own, static_cast<int>(hopper_tiles.input), splits, slot_splits, queue);
}

FfnKernels hopper(const HopperTiles& tiles) {
  hopper_tiles = tiles;
  FfnKernels kernels = with_forward(hopper_forward);
  kernels.glu_ffn_backward = hopper_backward;
  return kernels;
}

// Integers in one case and normal numbers in the next.
void alternating_case(const FfnKernels& kernels, Random& random, int64_t least_tokens, int64_t most_tokens,
                      uint64_t number) {
  const Activation activation = number % 2 == 0 ? Activation::relu : static_cast<Activation>(number / 2 % 6);
  const Shape s = draw_shape(random, least_tokens, most_tokens, activation);
  switch (number % 4) {
    case 0: return exact_case<bf16>(s, kernels, random);
    case 1: return rounded_case<f16>(s, kernels, random);
    case 2: return exact_case<f16>(s, kernels, random);
    default: return rounded_case<bf16>(s, kernels, random);
  }
}
int run_alternating(const FfnKernels& kernels, int64_t least_tokens, int64_t most_tokens, uint64_t start) {
  Random random(start);
  int cases = 0;
  for_each_seed([&] { alternating_case(kernels, random, least_tokens, most_tokens, start + cases++); });
  return cases;
}
std::string shapes(int count) { return std::to_string(count) + " shapes, " + std::to_string(kSeeds) + " seeds"; }

// Each instance of each product.
LOCAS_TEST(hopper_wide, "glu_ffn of sm90 with wide tiles") {
  using enum TileKind;
  int count = run_alternating(
      hopper({m128n128_ping_pong, m128n128_ping_pong, m128n128_ping_pong, m128n128_ping_pong, 1}), 1, 300, 10);
  count += run_alternating(hopper({m128n192, m128n128, m128n128_ping_pong, m128n128_ping_pong, 3}), 1, 300, 12);
  return shapes(count);
}
LOCAS_TEST(hopper_narrow, "glu_ffn of sm90 with narrow tiles") {
  using enum TileKind;
  int count = run_alternating(hopper({m128n64, m128n128, m128n64, m64n128_ping_pong, 2}), 1, 300, 20);
  count += run_alternating(hopper({m64n128_ping_pong, m64n128_ping_pong, m64n128_ping_pong, m64n64_ping_pong, 4}), 1,
                           300, 22);
  count +=
      run_alternating(hopper({m64n64_ping_pong, m64n64_ping_pong, m64n64_ping_pong, m64n64_ping_pong, 1}), 1, 300, 24);
  return shapes(count);
}
// As many tokens as a tile has rows, and fewer, and more.
LOCAS_TEST(hopper_few, "glu_ffn of sm90 with tiles of 64 rows") {
  using enum TileKind;
  const HopperTiles tiles[] = {{m64n128_ping_pong, m64n128_ping_pong, m64n128_ping_pong, m64n128_ping_pong, 1},
                               {m64n64_ping_pong, m64n64_ping_pong, m64n64_ping_pong, m64n64_ping_pong, 4},
                               {m128n64, m128n128, m128n64, m128n128_ping_pong, 1}};
  const int64_t tokens[] = {1, 17, 63, 64, 65};
  Random random(18);
  int cases = 0;
  for_each_seed([&] {
    for (int i = 0; i < 2; ++i, ++cases) {
      const int64_t count = tokens[cases / 2 % 5];
      alternating_case(hopper(tiles[cases % 3]), random, count, count, cases);
    }
  });
  return shapes(cases);
}
LOCAS_TEST(hopper_plan, "glu_ffn of sm90, planned") { return run_each(cuda::sm90::table, 17, 400, 16); }

LOCAS_TEST(hopper_sizes, "glu_ffn of sm90 with long sums") {
  using enum TileKind;
  Random random(17);
  int seed = 0;
  for_each_seed([&] {
    const TileKind input = seed++ % 2 == 0 ? m128n128_ping_pong : m64n64_ping_pong;
    const FfnKernels kernels = hopper({m128n192, m128n128, m128n64, input, 2});
    exact_case<bf16>({100, 72, 72, 130, Activation::relu, true}, kernels, random);
    rounded_case<bf16>({140, 200, 136, 65, Activation::silu, false}, cuda::sm90::table, random);
  });
  return "2 shapes, 10 seeds";
}

// A memory larger than a tile, and a depth that is cut into slices.
LOCAS_TEST(sizes, "glu_ffn with long sums") {
  Random random(5);
  for_each_seed([&] {
    exact_case<bf16>({33, 64, 520, 130, Activation::relu, true}, tiles(), random);
    rounded_case<bf16>({7, 264, 328, 65, Activation::silu, false}, tiles(), random);
  });
  return "2 shapes, 10 seeds";
}

LOCAS_TEST(importance, "neuron_importance") {
  Random random(6);
  for_each_seed([&] {
    const Shape s{
        random.integer(1, 200), 8 * random.integer(1, 16), 8 * random.integer(1, 24), 0, Activation::silu, true};
    Ffn<bf16> f(s, 1.0, [&](int64_t count, int64_t fan_in) {
      return random.normals<bf16>(count, 1.0 / std::sqrt(static_cast<double>(fan_in)));
    });
    simt::Buffer<float> mean("importance", s.m),
        workspace("workspace", cuda::sm80::table.neuron_importance_workspace(s.tokens, s.m));
    NeuronImportanceParams p{};
    p.weights = f.weights();
    p.x = f.tokens_by(f.x, s.d);
    p.importance = mean.data();
    p.workspace = workspace.data();
    p.activation = s.activation;
    p.dtype = DType::bf16;
    cuda::sm80::table.neuron_importance(p, kQueue);
    const auto means = [&](const Doubles& hidden) {
      std::vector<double> result(s.m, 0.0);
      for (int64_t row = 0; row < s.tokens; ++row)
        for (int64_t col = 0; col < s.m; ++col) result[col] += std::abs(hidden.at(row, col)) / s.tokens;
      return result;
    };
    expect_as_good_as("importance", mean.values(), means(expected(f, false).hidden), means(expected(f, true).hidden));
  });
  return "10 shapes, 10 seeds";
}

}  // namespace
}  // namespace locas::test
