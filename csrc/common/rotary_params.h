// Launch parameters of the rotary position embedding, with the norm of every head before it where a host has one.
#pragma once

#include "common/types.h"

namespace locas {

// The largest head, in elements.
constexpr int kMostHeadSize = 512;

// How every head x [head_size] turns, in its first `rotated` elements; with h = rotated / 2:
//      halves         out[j] = x[j] cos[j] - x[j + h] sin[j],  out[j + h] = x[j + h] cos[j + h] + x[j] sin[j + h]
//      interleaved    out[2j] = x[2j] cos[j] - x[2j + 1] sin[j],  out[2j + 1] = x[2j + 1] cos[j] + x[2j] sin[j]
// for j < h. Each product is rounded to the wider of the storage type and the angles' type, and each sum to the storage
// type, as in transformers. The other elements are copied. With weights x is first normed as a row of rms_norm.
struct RotaryTurn {
  Matrix cos, sin;           // [rows, rotated]
  const void* query_weight;  // [head_size]; null: no norm
  const void* key_weight;    // [head_size]; null where query_weight is
  int head_size;
  float weight_offset, eps;
  bool interleaved;
  DType dtype, angle_dtype;  // angle_dtype: that of cos and sin, dtype or f32
};

// Without weights an output may be the same memory as its input.
struct RotaryForwardParams {
  Matrix query;               // [rows, query heads * head_size]
  Matrix key, value;          // [rows, key heads * head_size], value's data may be null: it is only copied
  Matrix query_out;           // like query
  Matrix key_out, value_out;  // like key, value
  RotaryTurn turn;
};

// From the gradients of query_out and key_out to those of query and key; the weights are frozen.
struct RotaryBackwardParams {
  Matrix d_query, d_key;        // of query_out and key_out
  Matrix query, key;            // the forward's input; data is null without weights
  Matrix query_grad, key_grad;  // out, like d_query and d_key; may be the same memory
  RotaryTurn turn;
};

// Calls f with the storage type of the heads and that of the angles as template arguments.
template <class F>
void with_rotary_types(const RotaryTurn& turn, F&& f) {
  with_type(turn.dtype, [&]<class T>() {
    if (turn.angle_dtype == turn.dtype) f.template operator()<T, T>();
    else f.template operator()<T, float>();
  });
}

}  // namespace locas
