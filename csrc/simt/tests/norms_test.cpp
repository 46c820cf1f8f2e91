// rms_norm, layer_norm and their backwards against their formulas in float64. The peer is what transformers, torch and
// autograd compute: in float, rounded to the storage type where the host's norm rounds, and again behind the addition of
// d_sum.
#include "simt/tests/harness.h"

namespace locas::test {
namespace {

struct Case {
  int64_t rows, cols, stride;
  bool residual = false;       // and in the backward d_sum
  float weight_offset = 0.0f;  // of rms_norm
  bool bias = true;            // of layer_norm
  size_t offset = 0;           // elements before each matrix
};

constexpr float kEps = 1e-5f;

template <class T>
struct Data {
  std::vector<T> x, residual, weight, bias, d_out, d_sum, sum;

  Data(const Case& c, bool centres) {
    Random random(c.rows * 10000 + c.cols);
    const int64_t count = c.rows * c.cols;
    x = random.normals<T>(count, 2.0);
    if (centres)
      for (T& value : x) value = ptx::from_float<T>(ptx::to_float(value) + 5.0f);  // a mean that counts
    residual = random.normals<T>(count, 3.0);
    weight = random.normals<T>(c.cols);
    bias = random.normals<T>(c.cols);
    d_out = random.normals<T>(count);
    d_sum = random.normals<T>(count);
    sum = x;
    if (!c.residual) return;
    for (int64_t i = 0; i < count; ++i) sum[i] = ptx::from_float<T>(ptx::to_float(residual[i]) + ptx::to_float(x[i]));
  }
};

// What `Real` gives, rounded to T in between where the host does so and `rounds` says so.
template <class Real, class T>
struct Norms {
  std::vector<double> mean, inverse, out, dx;

  Norms(const Case& c, bool centres, const Data<T>& data, bool rounds) {
    const auto r = [&](Real value) { return rounds ? static_cast<Real>(round_to<T>(value)) : value; };
    const bool llama = !centres && c.weight_offset == 0.0f;
    const auto rounded_by_llama = [&](Real value) { return llama ? r(value) : value; };
    const Real count = static_cast<Real>(c.cols);
    for (int64_t row = 0; row < c.rows; ++row) {
      const auto at = [&](const std::vector<T>& m, int64_t i) { return static_cast<Real>(exact(m[row * c.cols + i])); };
      const auto weight = [&](int64_t i) {
        return (centres ? 0 : c.weight_offset) + static_cast<Real>(exact(data.weight[i]));
      };
      const auto weighted = [&](int64_t i) { return rounded_by_llama(at(data.d_out, i) * weight(i)); };
      Real middle = 0, squares = 0, shift = 0, dot = 0;
      for (int64_t i = 0; centres && i < c.cols; ++i) middle += at(data.sum, i) / count;
      const auto centred = [&](int64_t i) { return at(data.sum, i) - middle; };
      for (int64_t i = 0; i < c.cols; ++i) {
        squares += centred(i) * centred(i);
        shift += centres ? weighted(i) / count : 0;
        dot += weighted(i) * centred(i);
      }
      mean.push_back(middle);
      inverse.push_back(1 / std::sqrt(squares / count + kEps));
      const Real factor = static_cast<Real>(inverse.back()), slope = dot * factor * factor / count;
      for (int64_t i = 0; i < c.cols; ++i) {
        const Real bias = centres && c.bias ? static_cast<Real>(exact(data.bias[i])) : 0;
        out.push_back(r(weight(i) * rounded_by_llama(centred(i) * factor) + bias));
        const Real back = r(factor * (weighted(i) - shift - centred(i) * slope));
        dx.push_back(c.residual ? r(back + at(data.d_sum, i)) : back);
      }
    }
  }
};

template <class T>
void check(const Case& c, bool centres) {
  const Data<T> data(c, centres);
  const Norms<double, T> truth(c, centres, data, false);
  const Norms<float, T> peer(c, centres, data, true);
  for_each_seed([&] {
    const auto input = [&](const char* name, const std::vector<T>& values) {
      return StridedBuffer<T>(name, values, c.rows, c.cols, c.stride, c.offset);
    };
    const auto output = [&](const char* name) { return StridedBuffer<T>(name, c.rows, c.cols, c.stride, c.offset); };
    auto x = input("x", data.x), residual = input("residual", data.residual), sum = output("sum"), out = output("out");
    simt::Buffer<T> weight("weight", data.weight, c.offset), bias("bias", data.bias, c.offset);
    simt::Buffer<float> mean("mean", c.rows), inverse("inverse", c.rows);
    const Matrix none;
    const auto forward = [&](bool saves) {
      const NormParams p{x.view(),
                         c.residual ? residual.view() : none,
                         weight.data(),
                         centres && c.bias ? bias.data() : nullptr,
                         c.residual ? sum.view() : none,
                         out.view(),
                         saves && centres ? mean.data() : nullptr,
                         saves ? inverse.data() : nullptr,
                         c.weight_offset,
                         kEps,
                         kDType<T>};
      (centres ? cuda::layer_norm : cuda::rms_norm)(p, kQueue);
    };
    forward(true);
    expect_as_good_as("out", out.values(), truth.out, peer.out);
    expect_as_good_as("inverse", inverse.values(), truth.inverse, peer.inverse);
    if (centres) expect_as_good_as("mean", mean.values(), truth.mean, peer.mean);
    if (c.residual) expect_equal("sum", sum.values(), data.sum);
    const auto first = out.values();
    forward(false);
    expect_equal("out without statistics", out.values(), first);

    auto d_out = input("d_out", data.d_out), d_sum = input("d_sum", data.d_sum), dx = output("dx");
    const NormBackwardParams p{
        d_out.view(),   c.residual ? sum.view() : x.view(), weight.data(), centres ? mean.data() : nullptr,
        inverse.data(), c.residual ? d_sum.view() : none,   dx.view(),     c.weight_offset,
        kDType<T>};
    (centres ? cuda::layer_norm_backward : cuda::rms_norm_backward)(p, kQueue);
    expect_as_good_as("dx", dx.values(), truth.dx, peer.dx);
  });
}

std::string check_all(std::vector<Case> cases, bool centres) {
  for (int i = 0; i < 4; ++i) {
    const int64_t cols = fresh().integer(centres ? 2 : 1, 300), pieces = 8 * fresh().integer(1, 400);
    cases.push_back({fresh().integer(1, 20), cols, cols + fresh().integer(0, 9), i % 2 == 0, i / 2 * 1.0f, i / 2 == 0});
    cases.push_back({fresh().integer(1, 5), pieces, pieces + 8 * fresh().integer(0, 2), i % 2 == 0, i / 2 * 1.0f});
  }
  for (const Case& c : cases) {
    check<bf16>(c, centres);
    check<f16>(c, centres);
    check<float>(c, centres);
  }
  return std::to_string(3 * cases.size()) + " cases, 10 seeds";
}

LOCAS_TEST(rms_norms, "rms_norm, rms_norm_backward") {
  return check_all(
      {
          {5, 64, 64},
          {9, 128, 136, true, 1.0f},
          {19, 8, 8, true},
          {6, 160, 160, true},
          {3, 256, 264, false},
          {4, 576, 576, true},
          {2, 1024, 1024, false},
          {3, 1536, 1544, true, 1.0f},
          {2, 2560, 2560, true},
          {2, 4104, 4104, true},
          {1, 8208, 8208, true},
          {3, 13, 13, true},
          {4, 33, 40, true},
          {2, 700, 701, true, 1.0f},
          {3, 64, 64, true, 0, true, 1},
          {1, 1, 1},
      },
      false);
}

LOCAS_TEST(layer_norms, "layer_norm, layer_norm_backward") {
  return check_all(
      {
          {5, 64, 64},
          {9, 128, 136, true},
          {19, 8, 8, true, 0, false},
          {6, 160, 160, true},
          {4, 768, 768, true},
          {2, 1536, 1544},
          {2, 2560, 2560, true},
          {2, 4104, 4104, true, 0, false},
          {3, 13, 13, true},
          {4, 33, 40, true},
          {3, 64, 64, true, 0, true, 1},
      },
      true);
}

}  // namespace
}  // namespace locas::test
