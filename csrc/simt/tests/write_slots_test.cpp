// write_slots: closed-form slots against the formula in float64, and that nothing is written where something is not
// finite.
#include <optional>

#include "simt/tests/harness.h"

namespace locas::test {
namespace {

struct Shape {
  int64_t layers, tokens, d, capacity, start;
  size_t offset = 0;  // elements before each buffer: 1 makes every row misaligned
};

struct Case {
  Shape shape;
  double input_scale = 1.0, gradient_scale = 1e-3;
  bool with_copy = true, with_norms = false;
  std::optional<float> planted = {};  // put in the middle of the inputs or, with_norms, of the given norms
};

// The rows by their definition, and the token's norms. Real: double is the truth, float what a plain program computes.
template <class Real>
struct Written {
  std::vector<Real> slots, norms;
};

template <class Real, class T>
Written<Real> write(const Shape& s, const std::vector<float>& before, const std::vector<T>& inputs,
                    const std::vector<T>& gradients, Real epsilon) {
  Written<Real> result{{before.begin(), before.end()}, {}};
  const auto square_sum = [&](const std::vector<T>& values, int64_t layer, int64_t token) {
    double sum = 0;
    for (int64_t i = 0; i < s.d; ++i) sum += std::pow(exact(values[(layer * s.tokens + token) * s.d + i]), 2);
    return sum;
  };
  for (int64_t token = 0; token < s.tokens; ++token) {
    double squares = 0;
    for (int64_t layer = 0; layer < s.layers; ++layer) squares += square_sum(gradients, layer, token);
    const Real norm = std::sqrt(squares);
    result.norms.push_back(norm);
    for (int64_t layer = 0; layer < s.layers; ++layer) {
      const Real length = std::sqrt(square_sum(inputs, layer, token));
      for (int64_t i = 0; i < s.d; ++i) {
        const int64_t from = (layer * s.tokens + token) * s.d + i;
        const int64_t key = ((2 * layer) * s.capacity + s.start + token) * s.d + i, value = key + s.capacity * s.d;
        result.slots[key] = length == 0 ? 0 : Real(exact(inputs[from])) / length;
        result.slots[value] = norm == 0 ? 0 : epsilon * Real(exact(gradients[from])) / norm;
      }
    }
  }
  return result;
}

// The other rows are as they were, and the copy holds the written rows, rounded, where there is one.
template <class Copy>
void expect_written_rows(const Case& c, const std::vector<float>& slots, const std::vector<float>& before,
                         const std::vector<Copy>& compute, std::vector<Copy> copy) {
  const Shape& s = c.shape;
  for (size_t i = 0; i < slots.size(); ++i) {
    const int64_t row = static_cast<int64_t>(i) / s.d % s.capacity;
    const bool written = row >= s.start && row < s.start + s.tokens;
    if (!written) expect_equal<float>("a row that is not written", {slots[i]}, {before[i]});
    else if (c.with_copy) copy[i] = ptx::from_float<Copy>(slots[i]);
  }
  expect_equal("compute", compute, copy);
}

template <class T, class Copy>
void check_writing(const Case& c) {
  const Shape& s = c.shape;
  Random random(s.d + s.tokens);
  const int64_t count = s.layers * s.tokens * s.d, slot_count = s.layers * 2 * s.capacity * s.d;
  auto inputs = random.normals<T>(count, c.input_scale), gradients = random.normals<T>(count, c.gradient_scale);
  if (s.tokens > 2) {  // a token without input in one layer, and one without any gradient
    std::fill_n(inputs.begin(), s.d, T{});
    for (int64_t layer = 0; layer < s.layers; ++layer)
      std::fill_n(gradients.begin() + (layer * s.tokens + 2) * s.d, s.d, T{});
  }
  const auto before = random.normals<float>(slot_count);
  const std::vector<Copy> copy_before = random.normals<Copy>(slot_count);
  const double epsilon = 0.05;
  const auto truth = write<double>(s, before, inputs, gradients, epsilon);
  const auto peer = write<float>(s, before, inputs, gradients, epsilon);
  std::vector<float> given = peer.norms;
  if (c.planted && c.with_norms) given[s.tokens / 2] = *c.planted;
  if (c.planted && !c.with_norms) inputs[count / 2] = ptx::from_float<T>(*c.planted);

  std::vector<float> first_run;
  for_each_seed([&] {
    simt::Buffer<T> input("inputs", inputs, s.offset), gradient("gradients", gradients, s.offset);
    simt::Buffer<float> slots("slots", before, s.offset), gradient_norms("gradient_norms", given);
    simt::Buffer<Copy> compute("compute", copy_before, s.offset);
    simt::Buffer<float> norms("norms", s.tokens);
    WriteSlotsParams p{};
    p.inputs = rows_of(input, s.layers * s.tokens, s.d);
    p.gradients = rows_of(gradient, s.layers * s.tokens, s.d);
    p.slots = rows_of(slots, slot_count / s.d, s.d);
    if (c.with_copy) p.compute = rows_of(compute, slot_count / s.d, s.d);
    p.gradient_norms = c.with_norms ? gradient_norms.data() : nullptr;
    p.norms = norms.data();
    p.layers = s.layers;
    p.tokens = s.tokens;
    p.capacity = s.capacity;
    p.start = s.start;
    p.epsilon = epsilon;
    p.dtype = kDType<T>;
    p.compute_dtype = kDType<Copy>;
    simt::Buffer<double> workspace("workspace", WriteSlotsParams::workspace_size(s.layers, s.tokens));
    p.workspace = workspace.data();
    cuda::write_slots(p, kQueue);

    if (c.planted) {
      const int64_t unfit = c.with_norms ? s.tokens / 2 : count / 2 / s.d % s.tokens;
      for (int64_t token = 0; token < s.tokens; ++token)
        if (std::isnan(norms[token]) != (token == unfit)) fail("norm %td is %g", token, norms[token]);
      expect_equal("slots where something is not finite", slots.values(), before);
      expect_equal("compute where something is not finite", compute.values(), copy_before);
      return;
    }
    expect_as_good_as("norms", norms.values(), truth.norms, exact(peer.norms));
    expect_as_good_as("slots", slots.values(), truth.slots, exact(peer.slots));
    expect_written_rows<Copy>(c, slots.values(), before, compute.values(), copy_before);
    if (first_run.empty()) first_run = slots.values();
    expect_equal("slots, repeated", slots.values(), first_run);
  });
}

LOCAS_TEST(write_slots, "write_slots") {
  const int64_t capacity = fresh().integer(1, 12), tokens = fresh().integer(1, capacity);
  const std::vector<Shape> shapes = {
      {2, 3, 40, 7, 2},
      {1, 1, 1, 1, 0},
      {3, 1, 13, 4, 3},
      {1, 2, 1032, 2, 0},
      {1, 1, 1029, 3, 1},
      {2, 5, 64, 9, 4, 1},
      {fresh().integer(1, 4), tokens, fresh().integer(1, 300), capacity, fresh().integer(0, capacity - tokens)}};
  for (const Shape& shape : shapes) {
    check_writing<bf16, bf16>({shape});
    check_writing<f16, f16>({.shape = shape, .input_scale = 1e4, .gradient_scale = 1e4});
    check_writing<float, float>({shape});
    check_writing<float, bf16>({.shape = shape, .with_norms = true});
    for (const bool with_norms : {false, true})
      for (const float planted : {NAN, INFINITY, -INFINITY})
        check_writing<bf16, bf16>({.shape = shape, .with_norms = with_norms, .planted = planted});
  }
  // Squares that no float holds.
  check_writing<float, f16>({.shape = {2, 4, 24, 4, 0}, .input_scale = 1e-30, .gradient_scale = 1e-30});
  check_writing<float, f16>({.shape = {2, 4, 24, 4, 0}, .input_scale = 1e30, .gradient_scale = 1e30});
  check_writing<bf16, f16>({.shape = {2, 4, 24, 4, 0}, .with_copy = false});
  // More tokens than the norms' block has threads.
  check_writing<bf16, bf16>({{1, 530, 2, 530, 0}});
  return std::to_string(10 * shapes.size() + 4) + " cases, 10 seeds";
}

}  // namespace
}  // namespace locas::test
