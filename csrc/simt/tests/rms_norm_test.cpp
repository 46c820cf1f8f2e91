// rms_norm and rms_norm_backward against their formulas in float64. The peer is what transformers and autograd compute:
// in float, rounded to the storage type where Llama's or Gemma's norm rounds.
#include "simt/tests/harness.h"

namespace locas::test {
namespace {

struct Case {
  int64_t rows, cols, stride;
  bool residual = false;  // and in the backward d_sum
  float weight_offset = 0.0f;
  size_t offset = 0;  // elements before each matrix
};

template <class T>
struct Data {
  std::vector<T> x, residual, weight, d_out, d_sum, sum;

  explicit Data(const Case& c) {
    Random random(c.rows * 10000 + c.cols);
    const int64_t count = c.rows * c.cols;
    x = random.normals<T>(count, 2.0);
    residual = random.normals<T>(count, 3.0);
    weight = random.normals<T>(c.cols);
    d_out = random.normals<T>(count);
    d_sum = random.normals<T>(count);
    sum = x;
    if (!c.residual) return;
    for (int64_t i = 0; i < count; ++i) sum[i] = ptx::from_float<T>(ptx::to_float(residual[i]) + ptx::to_float(x[i]));
  }
};

constexpr float kEps = 1e-5f;

// What `Real` gives, rounded to T in between where transformers does so and `rounds` says so.
template <class Real, class T>
struct Norms {
  std::vector<double> inverse_rms, out, dx;

  Norms(const Case& c, const Data<T>& data, bool rounds) : out(c.rows * c.cols), dx(c.rows * c.cols) {
    const auto r = [&](Real value) { return rounds ? static_cast<Real>(round_to<T>(value)) : value; };
    const bool llama = c.weight_offset == 0.0f;
    for (int64_t row = 0; row < c.rows; ++row) {
      const int64_t first = row * c.cols;
      const auto at = [&](const std::vector<T>& m, int64_t i) { return static_cast<Real>(exact(m[first + i])); };
      const auto weight = [&](int64_t i) { return c.weight_offset + static_cast<Real>(exact(data.weight[i])); };
      const auto weighted = [&](int64_t i) {
        return llama ? r(at(data.d_out, i) * weight(i)) : at(data.d_out, i) * weight(i);
      };
      Real squares = 0, dot = 0;
      for (int64_t i = 0; i < c.cols; ++i) {
        squares += at(data.sum, i) * at(data.sum, i);
        dot += weighted(i) * at(data.sum, i);
      }
      const Real inverse = 1 / std::sqrt(squares / c.cols + kEps);
      inverse_rms.push_back(inverse);
      for (int64_t i = 0; i < c.cols; ++i) {
        const Real normed = at(data.sum, i) * inverse;
        out[first + i] = r(weight(i) * (llama ? r(normed) : normed));
        const Real back = r(inverse * (weighted(i) - at(data.sum, i) * dot * inverse * inverse / c.cols));
        dx[first + i] = c.residual ? r(back + at(data.d_sum, i)) : back;
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
    simt::Buffer<T> weight("weight", data.weight, c.offset);
    simt::Buffer<float> inverse_rms("inverse_rms", c.rows);
    const Matrix none;
    const auto forward = [&](float* inverse) {
      cuda::rms_norm({x.view(), c.residual ? residual.view() : none, weight.data(), c.residual ? sum.view() : none,
                      out.view(), inverse, c.weight_offset, kEps, kDType<T>},
                     kQueue);
    };
    forward(inverse_rms.data());
    expect_as_good_as("out", out.values(), truth.out, peer.out);
    expect_as_good_as("inverse_rms", inverse_rms.values(), truth.inverse_rms, peer.inverse_rms);
    if (c.residual) expect_equal("sum", sum.values(), data.sum);
    const auto first = out.values();
    forward(nullptr);
    expect_equal("out without inverse_rms", out.values(), first);

    auto d_out = input("d_out", data.d_out), d_sum = input("d_sum", data.d_sum), dx = output("dx");
    cuda::rms_norm_backward({d_out.view(), c.residual ? sum.view() : x.view(), weight.data(), inverse_rms.data(),
                             c.residual ? d_sum.view() : none, dx.view(), c.weight_offset, kDType<T>},
                            kQueue);
    expect_as_good_as("dx", dx.values(), truth.dx, peer.dx);
  });
}

LOCAS_TEST(rms_norms, "rms_norm, rms_norm_backward") {
  std::vector<Case> cases = {
      {5, 64, 64},           {9, 128, 136, true, 1.0f}, {19, 8, 8, true},        {6, 160, 160, true},
      {3, 256, 264, false},  {4, 576, 576, true},       {2, 1024, 1024, false},  {3, 1536, 1544, true, 1.0f},
      {2, 2560, 2560, true}, {2, 4104, 4104, true},     {1, 8208, 8208, true},   {3, 13, 13, true},
      {4, 33, 40, true},     {2, 700, 701, true, 1.0f}, {3, 64, 64, true, 0, 1}, {1, 1, 1},
  };
  for (int i = 0; i < 4; ++i) {
    const int64_t cols = fresh().integer(1, 300), pieces = 8 * fresh().integer(1, 400);
    cases.push_back({fresh().integer(1, 20), cols, cols + fresh().integer(0, 9), i % 2 == 0, i / 2 * 1.0f});
    cases.push_back({fresh().integer(1, 5), pieces, pieces + 8 * fresh().integer(0, 2), i % 2 == 0, i / 2 * 1.0f});
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
