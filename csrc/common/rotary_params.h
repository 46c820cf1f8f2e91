// Launch parameters of the rotary position embedding, with the norm of every head before it where a host has one.
#pragma once

#include "common/types.h"

namespace locas {

// The largest head, in elements.
constexpr int kMostHeadSize = 512;

// A head x [head_size] turns in its first `rotated` elements, the columns of cos and sin; with h = rotated / 2:
//      j < h     out[j] = x[j] cos[j] - x[j + h] sin[j],  out[j + h] = x[j + h] cos[j + h] + x[j] sin[j + h]
// each product and each sum rounded to the storage type, as in transformers. The other elements are copied.
// With weights x is first normed as a row of rms_norm.
// Without weights an output may be the same memory as its input.
struct RotaryForwardParams {
  Matrix query;               // [rows, query heads * head_size]
  Matrix key, value;          // [rows, key heads * head_size], value's data may be null: it is only copied
  Matrix cos, sin;            // [rows, rotated]
  const void* query_weight;   // [head_size]; null: no norm
  const void* key_weight;     // [head_size]; null where query_weight is
  Matrix query_out;           // like query
  Matrix key_out, value_out;  // like key, value
  int head_size;
  float weight_offset, eps;
  DType dtype;
};

// From the gradients of query_out and key_out to those of query and key; the weights are frozen.
struct RotaryBackwardParams {
  Matrix d_query, d_key;        // of query_out and key_out
  Matrix query, key;            // the forward's input; data is null without weights
  Matrix cos, sin;              // [rows, rotated]
  const void* query_weight;     // [head_size]; null: no norm
  const void* key_weight;       // [head_size]
  Matrix query_grad, key_grad;  // out, like d_query and d_key; may be the same memory
  int head_size;
  float weight_offset, eps;
  DType dtype;
};

}  // namespace locas
