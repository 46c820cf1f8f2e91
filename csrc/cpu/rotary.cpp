// The rotary position embedding on the CPU, with the norm of every head where a host has one: a row belongs to one
// thread, a head is worked on as floats in the first-level cache.
#include <algorithm>
#include <cmath>

#include "common/rotary_params.h"
#include "cpu/blocks.h"
#include "cpu/rms_norm.h"
#include "cpu/table.h"

namespace locas::cpu::LOCAS_ISA {
namespace {

struct alignas(64) Head {
  float at[kMostHeadSize];
};

// The angles of a row; `rotated` numbers each.
struct Turn {
  Head cos, sin;
  int rotated;
};

template <class T>
void load_turn(const Matrix& cos, const Matrix& sin, int64_t row, Turn& turn) {
  turn.rotated = static_cast<int>(cos.cols);
  load_block(cos.at<T>(row, 0), turn.cos.at, turn.rotated);
  load_block(sin.at<T>(row, 0), turn.sin.at, turn.rotated);
}

// x = round(along + across), each of them rounded before. The sum stands in a loop of its own: in one with the
// products the compiler would fuse them, and float32 would round less often than torch does.
template <class T>
void add_products(Head& along, Head& across, Head& x, int n) {
  round_block<T>(along.at, n);
  round_block<T>(across.at, n);
#pragma omp simd
  for (int i = 0; i < n; ++i) x.at[i] = along.at[i] + across.at[i];
}

template <class T>
void rotate(Head& x, const Turn& turn) {
  const int n = turn.rotated, half = n / 2;
  Head along, across;
#pragma omp simd
  for (int i = 0; i < n; ++i) along.at[i] = x.at[i] * turn.cos.at[i];
#pragma omp simd
  for (int i = 0; i < half; ++i) across.at[i] = -x.at[half + i] * turn.sin.at[i];
#pragma omp simd
  for (int i = half; i < n; ++i) across.at[i] = x.at[i - half] * turn.sin.at[i];
  add_products<T>(along, across, x, n);
}

// The transpose of `rotate`.
template <class T>
void rotate_back(Head& d, const Turn& turn) {
  const int n = turn.rotated, half = n / 2;
  Head along, across;
#pragma omp simd
  for (int i = 0; i < n; ++i) along.at[i] = d.at[i] * turn.cos.at[i];
#pragma omp simd
  for (int i = 0; i < half; ++i) across.at[i] = d.at[half + i] * turn.sin.at[half + i];
#pragma omp simd
  for (int i = half; i < n; ++i) across.at[i] = -d.at[i - half] * turn.sin.at[i - half];
  add_products<T>(along, across, d, n);
}

inline float inverse_rms(const Head& x, int size, float eps) {
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int i = 0; i < size; ++i) sum += x.at[i] * x.at[i];
  return 1.0f / std::sqrt(sum / size + eps);
}

template <class T>
struct Forward {
  const RotaryForwardParams& p;

  void heads(const Matrix& from, const Matrix& to, const void* weight, const Turn& turn, int64_t row) const {
    Head x, weights, normed;
    if (weight) load_block(static_cast<const T*>(weight), weights.at, p.head_size);
    for (int64_t col = 0; col < from.cols; col += p.head_size) {
      load_block(from.at<T>(row, col), x.at, p.head_size);
      if (weight) {
        const float inverse = inverse_rms(x, p.head_size, p.eps);
        normalize_block<T>(x.at, weights.at, inverse, p.weight_offset, normed.at, p.head_size);
        round_block<T>(normed.at, p.head_size);
        rotate<T>(normed, turn);
      } else {
        rotate<T>(x, turn);
      }
      store_block(weight ? normed.at : x.at, to.at<T>(row, col), p.head_size);
    }
  }

  void row(int64_t row) const {
    Turn turn;
    load_turn<T>(p.cos, p.sin, row, turn);
    heads(p.query, p.query_out, p.query_weight, turn, row);
    heads(p.key, p.key_out, p.key_weight, turn, row);
    if (p.value.data) std::copy_n(p.value.at<T>(row, 0), p.value.cols, p.value_out.at<T>(row, 0));
  }
};

template <class T>
struct Backward {
  const RotaryBackwardParams& p;

  // d: the gradient of the normed head; becomes that of x
  void norm_backward(Head& d, const Head& x, const Head& weight) const {
    const float inverse = inverse_rms(x, p.head_size, p.eps);
    float dot = 0.0f;
#pragma omp simd reduction(+ : dot)
    for (int i = 0; i < p.head_size; ++i) dot += d.at[i] * (p.weight_offset + weight.at[i]) * x.at[i];
    const float shift = dot * inverse * inverse / p.head_size;
#pragma omp simd
    for (int i = 0; i < p.head_size; ++i)
      d.at[i] = inverse * (d.at[i] * (p.weight_offset + weight.at[i]) - x.at[i] * shift);
  }

  void heads(const Matrix& d_out, const Matrix& x, const Matrix& grad, const void* weight, const Turn& turn,
             int64_t row) const {
    Head d, x_head, weights;
    if (weight) load_block(static_cast<const T*>(weight), weights.at, p.head_size);
    for (int64_t col = 0; col < d_out.cols; col += p.head_size) {
      load_block(d_out.at<T>(row, col), d.at, p.head_size);
      rotate_back<T>(d, turn);
      if (weight) {
        load_block(x.at<T>(row, col), x_head.at, p.head_size);
        norm_backward(d, x_head, weights);
      }
      store_block(d.at, grad.at<T>(row, col), p.head_size);
    }
  }

  void row(int64_t row) const {
    Turn turn;
    load_turn<T>(p.cos, p.sin, row, turn);
    heads(p.d_query, p.query, p.query_grad, p.query_weight, turn, row);
    heads(p.d_key, p.key, p.key_grad, p.key_weight, turn, row);
  }
};

template <class Rows>
void for_each_row(const Rows& rows, int64_t count, int64_t cols) {
#pragma omp parallel for schedule(static) if (count * cols >= kParallelElements)
  for (int64_t row = 0; row < count; ++row) rows.row(row);
}

}  // namespace

void rotary_forward(const RotaryForwardParams& p) {
  with_type(p.dtype, [&]<class T>() { for_each_row(Forward<T>{p}, p.query.rows, p.query.cols + p.key.cols); });
}

void rotary_backward(const RotaryBackwardParams& p) {
  with_type(p.dtype, [&]<class T>() { for_each_row(Backward<T>{p}, p.d_query.rows, p.d_query.cols + p.d_key.cols); });
}

}  // namespace locas::cpu::LOCAS_ISA
