// layer_norm and layer_norm_backward against their formulas in float64. The peer is what torch computes: in float, rounded
// once, and again behind the addition of d_sum.
#include "simt/tests/harness.h"

namespace locas::test {
namespace {

struct Case {
  int64_t rows, cols, stride;
  bool residual = false;  // and in the backward d_sum
  bool bias = true;
  size_t offset = 0;  // elements before each matrix
};

template <class T>
struct Data {
  std::vector<T> x, residual, weight, bias, d_out, d_sum, sum;

  explicit Data(const Case& c) {
    Random random(c.rows * 10000 + c.cols + 1);
    const int64_t count = c.rows * c.cols;
    x = random.normals<T>(count, 2.0);
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

constexpr float kEps = 1e-5f;

template <class Real, class T>
struct Norms {
  std::vector<double> out, dx;

  Norms(const Case& c, const Data<T>& data, bool rounds) {
    const auto r = [&](Real value) { return rounds ? static_cast<Real>(round_to<T>(value)) : value; };
    for (int64_t row = 0; row < c.rows; ++row) {
      const auto at = [&](const std::vector<T>& m, int64_t i) { return static_cast<Real>(exact(m[row * c.cols + i])); };
      const auto weight = [&](int64_t i) { return static_cast<Real>(exact(data.weight[i])); };
      Real mean = 0, squares = 0, shift = 0, dot = 0;
      for (int64_t i = 0; i < c.cols; ++i) mean += at(data.sum, i) / c.cols;
      const auto centred = [&](int64_t i) { return at(data.sum, i) - mean; };
      for (int64_t i = 0; i < c.cols; ++i) {
        squares += centred(i) * centred(i);
        shift += at(data.d_out, i) * weight(i) / c.cols;
        dot += at(data.d_out, i) * weight(i) * centred(i) / c.cols;
      }
      const Real inverse = 1 / std::sqrt(squares / c.cols + kEps);
      for (int64_t i = 0; i < c.cols; ++i) {
        out.push_back(r(centred(i) * inverse * weight(i) + (c.bias ? static_cast<Real>(exact(data.bias[i])) : 0)));
        const Real back = r(inverse * (at(data.d_out, i) * weight(i) - shift - centred(i) * dot * inverse * inverse));
        dx.push_back(c.residual ? r(back + at(data.d_sum, i)) : back);
      }
    }
  }
};

template <class T>
void check(const Case& c) {
  const Data<T> data(c);
  const Norms<double, T> truth(c, data, false);
  const Norms<float, T> peer(c, data, true);
  for_each_seed([&] {
    const auto input = [&](const char* name, const std::vector<T>& values) {
      return StridedBuffer<T>(name, values, c.rows, c.cols, c.stride, c.offset);
    };
    const auto output = [&](const char* name) { return StridedBuffer<T>(name, c.rows, c.cols, c.stride, c.offset); };
    auto x = input("x", data.x), residual = input("residual", data.residual), sum = output("sum"), out = output("out");
    simt::Buffer<T> weight("weight", data.weight, c.offset), bias("bias", data.bias, c.offset);
    simt::Buffer<float> mean("mean", c.rows), inverse_std("inverse_std", c.rows);
    const Matrix none;
    const auto forward = [&](float* means, float* inverses) {
      cuda::layer_norm({x.view(), c.residual ? residual.view() : none, weight.data(), c.bias ? bias.data() : nullptr,
                        c.residual ? sum.view() : none, out.view(), means, inverses, kEps, kDType<T>},
                       kQueue);
    };
    forward(mean.data(), inverse_std.data());
    expect_as_good_as("out", out.values(), truth.out, peer.out);
    if (c.residual) expect_equal("sum", sum.values(), data.sum);
    const auto first = out.values();
    forward(nullptr, nullptr);
    expect_equal("out without statistics", out.values(), first);

    auto d_out = input("d_out", data.d_out), d_sum = input("d_sum", data.d_sum), dx = output("dx");
    cuda::layer_norm_backward({d_out.view(), c.residual ? sum.view() : x.view(), weight.data(), mean.data(),
                               inverse_std.data(), c.residual ? d_sum.view() : none, dx.view(), kDType<T>},
                              kQueue);
    expect_as_good_as("dx", dx.values(), truth.dx, peer.dx);
  });
}

LOCAS_TEST(layer_norms, "layer_norm, layer_norm_backward") {
  std::vector<Case> cases = {
      {5, 64, 64},         {9, 128, 136, true}, {19, 8, 8, true, false},    {6, 160, 160, true},
      {4, 768, 768, true}, {2, 1536, 1544},     {2, 2560, 2560, true},      {2, 4104, 4104, true, false},
      {3, 13, 13, true},   {4, 33, 40, true},   {3, 64, 64, true, true, 1},
  };
  for (int i = 0; i < 3; ++i) {
    const int64_t cols = fresh().integer(2, 300), pieces = 8 * fresh().integer(1, 400);
    cases.push_back({fresh().integer(1, 20), cols, cols + fresh().integer(0, 9), i % 2 == 0});
    cases.push_back({fresh().integer(1, 5), pieces, pieces + 8 * fresh().integer(0, 2), i % 2 == 0});
  }
  for (const Case& c : cases) {
    check<bf16>(c);
    check<f16>(c);
    check<float>(c);
  }
  return std::to_string(3 * cases.size()) + " cases, 10 seeds";
}

}  // namespace
}  // namespace locas::test
