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

// The angles of a row as `rotate` takes them: one of each for every element that turns.
struct Turn {
  Head cos, sin;
  int rotated;
  bool interleaved;
};

// back: those of the transpose, which gives an element's partner what the element gave it.
template <class Angle>
void load_turn(const RotaryTurn& p, int64_t row, bool back, Turn& turn) {
  turn.rotated = static_cast<int>(p.cos.cols);
  turn.interleaved = p.interleaved;
  const int half = turn.rotated / 2;
  Head sin;
  if (p.interleaved) {  // the second half of the columns is not read
    Head cos;
    load_block(p.cos.at<Angle>(row, 0), cos.at, half);
    load_block(p.sin.at<Angle>(row, 0), sin.at, half);
    for (int i = 0; i < half; ++i) {
      turn.cos.at[2 * i] = turn.cos.at[2 * i + 1] = cos.at[i];
      turn.sin.at[2 * i] = turn.sin.at[2 * i + 1] = back ? -sin.at[i] : sin.at[i];
    }
    return;
  }
  load_block(p.cos.at<Angle>(row, 0), turn.cos.at, turn.rotated);
  load_block(p.sin.at<Angle>(row, 0), sin.at, turn.rotated);
  for (int i = 0; i < turn.rotated; ++i) turn.sin.at[i] = back ? -sin.at[i < half ? half + i : i - half] : sin.at[i];
}

// x = round(along + across), of which each is rounded to the angles' type before. The sum stands in a loop of its own: in
// one with the products the compiler would fuse them, and float32 would round less often than torch does.
template <class Angle>
void rotate(Head& x, const Turn& turn) {
  const int n = turn.rotated, half = n / 2;
  Head along, across;
#pragma omp simd
  for (int i = 0; i < n; ++i) along.at[i] = x.at[i] * turn.cos.at[i];
  if (turn.interleaved) {
#pragma omp simd
    for (int i = 0; i < half; ++i) {
      across.at[2 * i] = -x.at[2 * i + 1] * turn.sin.at[2 * i];
      across.at[2 * i + 1] = x.at[2 * i] * turn.sin.at[2 * i + 1];
    }
  } else {
#pragma omp simd
    for (int i = 0; i < half; ++i) across.at[i] = -x.at[half + i] * turn.sin.at[i];
#pragma omp simd
    for (int i = half; i < n; ++i) across.at[i] = x.at[i - half] * turn.sin.at[i];
  }
  round_block<Angle>(along.at, n);
  round_block<Angle>(across.at, n);
#pragma omp simd
  for (int i = 0; i < n; ++i) x.at[i] = along.at[i] + across.at[i];
}

inline float inverse_rms(const Head& x, int size, float eps) {
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int i = 0; i < size; ++i) sum += x.at[i] * x.at[i];
  return 1.0f / std::sqrt(sum / size + eps);
}

template <class T, class Angle>
struct Forward {
  const RotaryForwardParams& p;

  void heads(const Matrix& from, const Matrix& to, const void* weight, const Turn& turn, int64_t row) const {
    const int size = p.turn.head_size;
    Head x, weights, normed;
    if (weight) load_block(static_cast<const T*>(weight), weights.at, size);
    for (int64_t col = 0; col < from.cols; col += size) {
      load_block(from.at<T>(row, col), x.at, size);
      if (weight) {
        const float inverse = inverse_rms(x, size, p.turn.eps);
        normalize_block<T>(x.at, weights.at, inverse, p.turn.weight_offset, normed.at, size);
        round_block<T>(normed.at, size);
      }
      Head& turning = weight ? normed : x;
      rotate<Angle>(turning, turn);
      store_block(turning.at, to.at<T>(row, col), size);
    }
  }

  void row(int64_t row) const {
    Turn turn;
    load_turn<Angle>(p.turn, row, false, turn);
    heads(p.query, p.query_out, p.turn.query_weight, turn, row);
    heads(p.key, p.key_out, p.turn.key_weight, turn, row);
    if (p.value.data) std::copy_n(p.value.at<T>(row, 0), p.value.cols, p.value_out.at<T>(row, 0));
  }
};

template <class T, class Angle>
struct Backward {
  const RotaryBackwardParams& p;

  // d: the gradient of the normed head; becomes that of x
  void norm_backward(Head& d, const Head& x, const Head& weight) const {
    const int size = p.turn.head_size;
    const float offset = p.turn.weight_offset, inverse = inverse_rms(x, size, p.turn.eps);
    float dot = 0.0f;
#pragma omp simd reduction(+ : dot)
    for (int i = 0; i < size; ++i) dot += d.at[i] * (offset + weight.at[i]) * x.at[i];
    const float shift = dot * inverse * inverse / size;
#pragma omp simd
    for (int i = 0; i < size; ++i) d.at[i] = inverse * (d.at[i] * (offset + weight.at[i]) - x.at[i] * shift);
  }

  void heads(const Matrix& d_out, const Matrix& x, const Matrix& grad, const void* weight, const Turn& turn,
             int64_t row) const {
    const int size = p.turn.head_size;
    Head d, x_head, weights;
    if (weight) load_block(static_cast<const T*>(weight), weights.at, size);
    for (int64_t col = 0; col < d_out.cols; col += size) {
      load_block(d_out.at<T>(row, col), d.at, size);
      rotate<Angle>(d, turn);
      if (weight) {
        load_block(x.at<T>(row, col), x_head.at, size);
        norm_backward(d, x_head, weights);
      }
      store_block(d.at, grad.at<T>(row, col), size);
    }
  }

  void row(int64_t row) const {
    Turn turn;
    load_turn<Angle>(p.turn, row, true, turn);
    heads(p.d_query, p.query, p.query_grad, p.turn.query_weight, turn, row);
    heads(p.d_key, p.key, p.key_grad, p.turn.key_weight, turn, row);
  }
};

template <class Rows>
void for_each_row(const Rows& rows, int64_t count, int64_t cols) {
#pragma omp parallel for schedule(static) if (count * cols >= kParallelElements)
  for (int64_t row = 0; row < count; ++row) rows.row(row);
}

}  // namespace

void rotary_forward(const RotaryForwardParams& p) {
  with_rotary_types(p.turn, [&]<class T, class Angle>() {
    for_each_row(Forward<T, Angle>{p}, p.query.rows, p.query.cols + p.key.cols);
  });
}

void rotary_backward(const RotaryBackwardParams& p) {
  with_rotary_types(p.turn, [&]<class T, class Angle>() {
    for_each_row(Backward<T, Angle>{p}, p.d_query.rows, p.d_query.cols + p.d_key.cols);
  });
}

}  // namespace locas::cpu::LOCAS_ISA
