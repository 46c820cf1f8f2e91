// rotary_forward and rotary_backward, with angles in the heads' type and in float32, against the formulas in float64; without norms bit for bit against what
// transformers computes, each product and each sum rounded to the storage type. With norms the peer is that too.
#include "simt/tests/harness.h"

namespace locas::test {
namespace {

struct Case {
  int64_t rows, size, rotated, queries, keys;  // heads
  bool normed = false;
  float weight_offset = 0.0f;
  bool value = true;
  int64_t gap = 0;    // elements between the rows of every matrix
  size_t offset = 0;  // elements before each matrix
  bool interleaved = false;
};

constexpr float kEps = 1e-5f;

// One head as `Real` computes it, rounded to T where transformers does so and `rounds` says so; products to Angle.
template <class Real, class T, class Angle>
class HeadReference {
 public:
  using Numbers = std::vector<Real>;

  HeadReference(const Case& c, bool rounds) : c_(c), rounds_(rounds) {}

  Numbers forward(Numbers x, const Numbers& weight, const Numbers& cos, const Numbers& sin) const {
    if (c_.normed) {
      const Real inverse = inverse_rms(x);
      for (int64_t i = 0; i < c_.size; ++i) {
        const Real normed = x[i] * inverse;
        x[i] = r((c_.weight_offset + weight[i]) * (c_.weight_offset == 0 ? r(normed) : normed));
      }
    }
    Numbers y = x;
    for_each_pair([&](int64_t low, int64_t high, int64_t angle_low, int64_t angle_high) {
      y[low] = r(a(x[low] * cos[angle_low]) - a(x[high] * sin[angle_low]));
      y[high] = r(a(x[high] * cos[angle_high]) + a(x[low] * sin[angle_high]));
    });
    return y;
  }

  Numbers backward(Numbers d, const Numbers& x, const Numbers& weight, const Numbers& cos, const Numbers& sin) const {
    const Numbers d_out = d;
    for_each_pair([&](int64_t low, int64_t high, int64_t angle_low, int64_t angle_high) {
      d[low] = r(a(d_out[low] * cos[angle_low]) + a(d_out[high] * sin[angle_high]));
      d[high] = r(a(d_out[high] * cos[angle_high]) - a(d_out[low] * sin[angle_low]));
    });
    if (!c_.normed) return d;
    Real dot = 0;
    for (int64_t i = 0; i < c_.size; ++i) {
      d[i] *= c_.weight_offset + weight[i];
      if (c_.weight_offset == 0) d[i] = r(d[i]);
      dot += d[i] * x[i];
    }
    const Real inverse = inverse_rms(x);
    for (int64_t i = 0; i < c_.size; ++i) d[i] = r(inverse * (d[i] - x[i] * dot * inverse * inverse / c_.size));
    return d;
  }

 private:
  Real r(Real value) const { return rounds_ ? static_cast<Real>(round_to<T>(value)) : value; }
  Real a(Real value) const { return rounds_ ? static_cast<Real>(round_to<Angle>(value)) : value; }
  template <class F>
  void for_each_pair(F&& f) const {
    const int64_t half = c_.rotated / 2;
    for (int64_t j = 0; j < half; ++j) {
      if (c_.interleaved) f(2 * j, 2 * j + 1, j, j);
      else f(j, j + half, j, j + half);
    }
  }
  Real inverse_rms(const Numbers& x) const {
    Real squares = 0;
    for (const Real value : x) squares += value * value;
    return 1 / std::sqrt(squares / c_.size + kEps);
  }
  const Case& c_;
  const bool rounds_;
};

template <class T, class Angle>
struct Data {
  std::vector<T> x[2], d_out[2], weight[2], value;  // of query and key
  std::vector<Angle> cos, sin;

  explicit Data(const Case& c) {
    Random random(c.rows * 100000 + c.size * 100 + c.rotated);
    for (int i = 0; i < 2; ++i) {
      const int64_t cols = (i == 0 ? c.queries : c.keys) * c.size;
      x[i] = random.normals<T>(c.rows * cols, 2.0);
      d_out[i] = random.normals<T>(c.rows * cols);
      weight[i] = random.normals<T>(c.size);
    }
    value = random.normals<T>(c.rows * c.keys * c.size);
    for (int64_t i = 0; i < c.rows * c.rotated; ++i) {  // the halves differ: a swapped column would show
      const double angle = random.normal();
      cos.push_back(ptx::from_float<Angle>(static_cast<float>(std::cos(angle))));
      sin.push_back(ptx::from_float<Angle>(static_cast<float>(std::sin(angle))));
    }
  }
};

template <class Real, class T, class Angle>
struct Turned {
  std::vector<double> out[2], grad[2];

  Turned(const Case& c, const Data<T, Angle>& data, bool rounds) {
    const HeadReference<Real, T, Angle> reference(c, rounds);
    const auto part = [](const auto& values, int64_t first, int64_t count) {
      std::vector<Real> result;
      for (int64_t i = 0; i < count; ++i) result.push_back(static_cast<Real>(exact(values[first + i])));
      return result;
    };
    for (int i = 0; i < 2; ++i) {
      const auto weight = part(data.weight[i], 0, c.size);
      const int64_t heads = i == 0 ? c.queries : c.keys;
      for (int64_t row = 0; row < c.rows; ++row) {
        const auto cos = part(data.cos, row * c.rotated, c.rotated), sin = part(data.sin, row * c.rotated, c.rotated);
        for (int64_t head = 0; head < heads; ++head) {
          const int64_t first = (row * heads + head) * c.size;
          const auto x = part(data.x[i], first, c.size);
          for (const Real y : reference.forward(x, weight, cos, sin)) out[i].push_back(y);
          for (const Real d : reference.backward(part(data.d_out[i], first, c.size), x, weight, cos, sin))
            grad[i].push_back(d);
        }
      }
    }
  }
};

template <class T, class Angle>
RotaryTurn turn_of(const Case& c, const Matrix& cos, const Matrix& sin, const T* query_weight, const T* key_weight) {
  const int size = static_cast<int>(c.size);
  return {cos,
          sin,
          c.normed ? query_weight : nullptr,
          c.normed ? key_weight : nullptr,
          size,
          c.weight_offset,
          kEps,
          c.interleaved,
          kDType<T>,
          kDType<Angle>};
}

template <class T, class Angle = T>
void check(const Case& c) {
  const Data<T, Angle> data(c);
  const Turned<double, T, Angle> truth(c, data, false);
  const Turned<float, T, Angle> peer(c, data, true);
  for_each_seed([&] {
    const int64_t query_cols = c.queries * c.size, key_cols = c.keys * c.size;
    const auto input = [&]<class Value>(const char* name, const std::vector<Value>& values, int64_t cols) {
      return StridedBuffer<Value>(name, values, c.rows, cols, cols + c.gap, c.offset);
    };
    const auto output = [&](const char* name, int64_t cols) {
      return StridedBuffer<T>(name, c.rows, cols, cols + c.gap, c.offset);
    };
    const auto expect = [&](const char* name, const std::vector<T>& ours, const std::vector<double>& reference,
                            const std::vector<double>& as_torch) {
      expect_as_good_as(name, ours, reference, as_torch);
      for (size_t i = 0; !c.normed && i < ours.size(); ++i)
        if (exact(ours[i]) != as_torch[i]) fail("%s: element %zu is not torch's", name, i);
    };
    auto query = input("query", data.x[0], query_cols), key = input("key", data.x[1], key_cols),
         value = input("value", data.value, key_cols);
    auto cos = input("cos", data.cos, c.rotated), sin = input("sin", data.sin, c.rotated);
    auto query_out = output("query_out", query_cols), key_out = output("key_out", key_cols),
         value_out = output("value_out", key_cols);
    simt::Buffer<T> query_weight("query_weight", data.weight[0], c.offset),
        key_weight("key_weight", data.weight[1], c.offset);
    const RotaryTurn turn = turn_of<T, Angle>(c, cos.view(), sin.view(), query_weight.data(), key_weight.data());
    const Matrix none;
    const auto forward = [&](const Matrix& to_query, const Matrix& to_key) {
      cuda::rotary_forward({query.view(), key.view(), c.value ? value.view() : none, to_query, to_key,
                            c.value ? value_out.view() : none, turn},
                           kQueue);
    };
    forward(query_out.view(), key_out.view());
    expect("query_out", query_out.values(), truth.out[0], peer.out[0]);
    expect("key_out", key_out.values(), truth.out[1], peer.out[1]);
    if (c.value) expect_equal("value_out", value_out.values(), data.value);

    auto d_query = input("d_query", data.d_out[0], query_cols), d_key = input("d_key", data.d_out[1], key_cols);
    auto query_grad = output("query_grad", query_cols), key_grad = output("key_grad", key_cols);
    const auto backward = [&](const Matrix& to_query, const Matrix& to_key) {
      cuda::rotary_backward({d_query.view(), d_key.view(), c.normed ? query.view() : none, c.normed ? key.view() : none,
                             to_query, to_key, turn},
                            kQueue);
    };
    backward(query_grad.view(), key_grad.view());
    expect("query_grad", query_grad.values(), truth.grad[0], peer.grad[0]);
    expect("key_grad", key_grad.values(), truth.grad[1], peer.grad[1]);

    backward(d_query.view(), d_key.view());
    expect_equal("query_grad in place", d_query.values(), query_grad.values());
    expect_equal("key_grad in place", d_key.values(), key_grad.values());
    if (c.normed) return;
    forward(query.view(), key.view());
    expect_equal("query_out in place", query.values(), query_out.values());
    expect_equal("key_out in place", key.values(), key_out.values());
  });
}

LOCAS_TEST(rotary, "rotary_forward, rotary_backward") {
  std::vector<Case> cases = {
      {5, 64, 64, 9, 3},
      {3, 64, 64, 3, 3, true},
      {2, 128, 128, 16, 8, true},
      {3, 128, 64, 5, 1, false, 0.0f, false, 8},
      {2, 256, 256, 4, 1, true, 1.0f},
      {2, 512, 512, 2, 1, true, 1.0f, false},
      {4, 80, 32, 3, 2, true, 0.0f, true, 16},
      {3, 96, 96, 3, 1},
      {3, 80, 20, 3, 1},
      {3, 80, 20, 3, 1, true},
      {2, 64, 64, 2, 1, true, 1.0f, true, 3},
      {2, 64, 64, 2, 1, false, 0.0f, true, 0, 1},
      {4, 7, 4, 2, 1, true},
      {2, 1, 0, 3, 2, true},
      {2, 16, 0, 3, 2},
  };
  for (const Case& c : std::vector<Case>(cases)) {
    cases.push_back(c);
    cases.back().interleaved = true;
  }
  for (int i = 0; i < 8; ++i) {
    const int64_t size = fresh().integer(2, 70), rotated = 2 * fresh().integer(1, size / 2),
                  heads = fresh().integer(1, 12);
    cases.push_back({fresh().integer(1, 9), size, rotated, heads, fresh().integer(1, heads), i % 2 == 0,
                     i / 2 % 2 * 1.0f, true, 0, 0, i >= 4});
    const int64_t pieces = fresh().integer(1, 8), turning = fresh().integer(1, pieces);
    cases.push_back(
        {fresh().integer(1, 9), 16 * pieces, 16 * turning, heads, 1, i % 2 == 0, i / 2 % 2 * 1.0f, true, 8, 0, i >= 4});
  }
  for (const Case& c : cases) {
    check<bf16>(c);
    check<f16>(c);
    check<float>(c);
    check<bf16, float>(c);
    check<f16, float>(c);
  }
  return std::to_string(5 * cases.size()) + " cases, 10 seeds";
}

}  // namespace
}  // namespace locas::test
