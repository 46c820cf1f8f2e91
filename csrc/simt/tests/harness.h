// What the kernel tests share: a list of test functions, random data, float64 comparison, the loop over seeds.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "cuda/launch.cuh"
#include "cuda/ptx/convert.cuh"
#include "cuda/ptx/types.cuh"
#include "simt/runner.h"

namespace locas::test {

constexpr cuda::Queue kQueue{0, nullptr};

// ---- The list of tests -----------------------------------------------------------------------------------------
// A test returns what it ran, such as "12 cases", and calls fail() where the kernel is wrong.
struct Test {
  const char* name;
  std::string (*run)();
};
std::vector<Test>& tests();

// LOCAS_TEST(adamw, "adamw_slots") { ...; return count + " cases"; }
#define LOCAS_TEST(function, name)                                                                   \
  static std::string function();                                                                     \
  static const bool function##_listed = (::locas::test::tests().push_back({name, &function}), true); \
  static std::string function()

[[noreturn, gnu::format(printf, 1, 2)]] void fail(const char* format, ...);

constexpr int kSeeds = 10;
// Runs the body once for every seed of the runner, so in ten orders of threads and copies.
void for_each_seed(const std::function<void()>& body);

// ---- Data ------------------------------------------------------------------------------------------------------
template <class T>
constexpr DType kDType = std::is_same_v<T, bf16>  ? DType::bf16
                         : std::is_same_v<T, f16> ? DType::f16
                                                  : DType::f32;
// One rounding to the storage type; for float, what a few operations and fast_exp (2e-7) add up to.
template <class T>
constexpr double kRounding = std::is_same_v<T, bf16>  ? 0x1p-8
                             : std::is_same_v<T, f16> ? 0x1p-11
                                                      : 0x1p-21;

class Random {
 public:
  explicit Random(uint64_t seed) : engine_(seed) {}
  double normal() { return normal_(engine_); }
  int64_t integer(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(engine_); }
  // [count] elements of N(0, scale^2), rounded to T.
  template <class T>
  std::vector<T> normals(size_t count, double scale = 1.0) {
    std::vector<T> values(count);
    for (T& value : values) value = ptx::from_float<T>(static_cast<float>(normal() * scale));
    return values;
  }

 private:
  std::mt19937_64 engine_;
  std::normal_distribution<double> normal_;
};

// A matrix in global memory whose rows lie `stride` elements apart. What lies between them must stay as it was.
template <class T>
class StridedBuffer {
 public:
  StridedBuffer(std::string name, int64_t rows, int64_t cols, int64_t stride, size_t offset = 0)
      : buffer_(std::move(name), rows * stride, offset), rows_(rows), cols_(cols), stride_(stride) {}
  StridedBuffer(std::string name, const std::vector<T>& values, int64_t rows, int64_t cols, int64_t stride,
                size_t offset = 0)
      : StridedBuffer(std::move(name), rows, cols, stride, offset) {
    for (int64_t i = 0; i < rows * cols; ++i) buffer_[i / cols * stride + i % cols] = values[i];
  }
  Matrix view() { return {buffer_.data(), rows_, cols_, stride_}; }
  // [rows * cols]; aborts if a kernel wrote between the rows.
  std::vector<T> values() const {
    std::vector<T> result;
    T poison;
    std::memset(&poison, 0xff, sizeof poison);
    for (int64_t i = 0; i < rows_ * stride_; ++i) {
      if (i % stride_ < cols_) result.push_back(buffer_[i]);
      else if (std::memcmp(&buffer_[i], &poison, sizeof poison) != 0) fail("row %td is overrun", i / stride_);
    }
    return result;
  }

 private:
  simt::Buffer<T> buffer_;
  int64_t rows_, cols_, stride_;
};

// A buffer as the contiguous rows that it holds.
template <class T>
Matrix rows_of(simt::Buffer<T>& buffer, int64_t rows, int64_t cols) {
  return {buffer.data(), rows, cols, cols};
}

// Draws shapes, new ones in every run; fail() prints the seed, and locas_simt_tests takes it to repeat a run.
Random& fresh();

template <class T>
double exact(T value) {
  return static_cast<double>(ptx::to_float(value));
}
inline double exact(double value) { return value; }
template <class T>
double round_to(double value) {
  return exact(ptx::from_float<T>(static_cast<float>(value)));
}
template <class T>
std::vector<double> exact(const std::vector<T>& values) {
  std::vector<double> result;
  for (const T& value : values) result.push_back(exact(value));
  return result;
}
template <class T>
std::vector<double> round_to(const std::vector<double>& values) {
  std::vector<double> result;
  for (const double value : values) result.push_back(round_to<T>(value));
  return result;
}

// ---- Comparison ------------------------------------------------------------------------------------------------
// Aborts unless our largest error against float64 is at most twice that of `peer`, the same computation rounded where
// torch rounds, plus one rounding of the largest value: of T, or of the type that the factors of a float sum have.
// Prints the worst position.
template <class T>
void expect_as_good_as(const std::string& what, const std::vector<T>& ours, const std::vector<double>& reference,
                       const std::vector<double>& peer, double rounding = kRounding<T>) {
  double peer_error = 0.0, largest = 0.0, worst = -1.0;
  size_t at = 0;
  if (ours.size() != reference.size() || peer.size() != reference.size())
    fail("%s: %zu elements, the reference has %zu, the peer %zu", what.c_str(), ours.size(), reference.size(),
         peer.size());
  for (size_t i = 0; i < ours.size(); ++i) {
    peer_error = std::max(peer_error, std::abs(peer[i] - reference[i]));
    largest = std::max(largest, std::abs(reference[i]));
    const double error = std::abs(exact(ours[i]) - reference[i]);
    if (!(error <= worst)) {  // NaN counts as the worst
      worst = error;
      at = i;
      if (std::isnan(error)) break;
    }
  }
  const double allowed = 2.0 * peer_error + rounding * largest;
  if (!(worst <= allowed))
    fail("%s: element %zu is %.9g instead of %.9g; allowed error %.3g", what.c_str(), at, exact(ours[at]),
         reference[at], allowed);
}

template <class T>
void expect_equal(const std::string& what, const std::vector<T>& ours, const std::vector<T>& expected) {
  if (ours.size() != expected.size())
    fail("%s: %zu elements instead of %zu", what.c_str(), ours.size(), expected.size());
  for (size_t i = 0; i < ours.size(); ++i)
    if (std::memcmp(&ours[i], &expected[i], sizeof(T)) != 0)
      fail("%s: element %zu is %.9g instead of exactly %.9g", what.c_str(), i, exact(ours[i]), exact(expected[i]));
}

}  // namespace locas::test
