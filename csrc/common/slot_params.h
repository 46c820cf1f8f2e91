// Launch parameters of what changes slots: updates by AdamW and SGD, and closed-form writing.
#pragma once

#include "common/types.h"

namespace locas {

// What changes from update to update lies on the slots' device, so that a captured graph can be replayed: the learning
// rate, the number of this update (counted from 1), and whether the gradient is finite. Where `finite` is given and 0,
// the update writes nothing.
struct DeviceScalar {
  const void* data;  // one element
  DType dtype;       // f32, f64 or i64
};

// One AdamW step over rows of d elements, then every row longer than 1 is scaled back to length 1. All matrices are
// contiguous.
struct AdamwSlotsParams {
  Matrix slots;                // float32 master [rows, d], in place
  Matrix grad;                 // float32 [rows, d]; data is null where the gradient comes as factors
  Matrix exp_avg, exp_avg_sq;  // float32 [rows, d], in place
  Matrix compute;              // [rows, d] rounded copy of the new slots; data may be null
  DType compute_dtype;
  DeviceScalar step, learning_rate;
  double beta1, beta2;         // double: 1 - beta2 loses half its digits in float
  float log_beta1, log_beta2;  // their natural logarithms
  float eps, weight_decay;
  bool clip;
  DeviceScalar finite = {nullptr, DType::f32};  // data may be null
};

// One SGD step (momentum_buffer = momentum * momentum_buffer + grad), then the same clip.
struct SgdSlotsParams {
  Matrix slots;            // float32 master [rows, d], in place
  Matrix grad;             // float32 [rows, d]; data is null where the gradient comes as factors
  Matrix momentum_buffer;  // float32 [rows, d], in place; data is null when momentum is 0
  Matrix compute;          // [rows, d] rounded copy of the new slots; data may be null
  DType compute_dtype;
  DeviceScalar learning_rate;
  float momentum, weight_decay;
  bool clip;
  DeviceScalar finite = {nullptr, DType::f32};  // data may be null
};

// Closed-form slots, one per token and layer: key = A / ||A||, value = epsilon * G / ||G|| with ||G|| over all layers
// of the token. Nothing is written unless all inputs, gradients and norms are finite. All matrices are contiguous.
struct WriteSlotsParams {
  Matrix inputs, gradients;     // A, G: [layers * tokens, d]
  Matrix slots;                 // float32 master [layers * 2 * capacity, d]: of each `capacity` rows those of
                                // [start, start + tokens) are written
  Matrix compute;               // [layers * 2 * capacity, d] rounded copy of those rows; data may be null
  const float* gradient_norms;  // [tokens] ||G||; null: of `gradients`
  float* norms;                 // [tokens] out: ||G||, NaN for a token of which something is not finite
  double* workspace;            // [workspace_size()]: each row's sum of squares, then whether all is finite
  int64_t layers, tokens, capacity, start;
  double epsilon;
  DType dtype, compute_dtype;

  LOCAS_INLINE constexpr int64_t d() const { return inputs.cols; }
  // Rows are counted through the inputs [layers, tokens], then through the gradients.
  LOCAS_INLINE constexpr int64_t rows() const { return 2 * layers * tokens; }
  static constexpr int64_t workspace_size(int64_t layers, int64_t tokens) { return 2 * layers * tokens + 1; }
  LOCAS_INLINE constexpr bool is_value(int64_t row) const { return row >= layers * tokens; }
  // The row of inputs or gradients, and the row of the slots that it goes to.
  LOCAS_INLINE constexpr int64_t source_row(int64_t row) const { return is_value(row) ? row - layers * tokens : row; }
  LOCAS_INLINE constexpr int64_t slot_row(int64_t row) const {
    const int64_t source = source_row(row), layer = source / tokens, token = source % tokens;
    return (2 * layer + is_value(row)) * capacity + start + token;
  }
};

// What the update can form the slots' gradient from.
constexpr int kMostFactorLayers = 32, kMostFactorTokens = 64, kMostFactorWidth = 8192;

// One layer's slots' gradient that nobody has formed yet: dG = d_gate^T x, dK = d_key^T x, dV = hidden^T dy.
struct SlotFactors {
  Matrix d_gate, d_key, hidden;  // [tokens, r]
  Matrix x, dy;                  // [tokens, d]
};

// The gradient of all layers' slots as factors, for the update that forms each row in registers; bf16 or f16.
struct LayerFactors {
  SlotFactors layers[kMostFactorLayers];
  int count;    // of layers, at least 1
  float scale;  // multiplies the gradient
  DType dtype;

  constexpr int64_t tokens() const { return layers[0].x.rows; }
  constexpr int64_t r() const { return layers[0].hidden.cols; }
};

}  // namespace locas
