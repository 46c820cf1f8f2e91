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

// One AdamW step over rows of d elements, then every row longer than 1 is scaled back to length 1.
struct AdamwSlotsParams {
  float* slots;       // [rows, d] fp32 master, in place
  const float* grad;  // [rows, d]
  float* exp_avg;     // [rows, d] in place
  float* exp_avg_sq;  // [rows, d] in place
  void* compute;      // [rows, d] rounded copy of the new slots; may be null
  int64_t rows, d;
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
  float* slots;            // [rows, d] fp32 master, in place
  const float* grad;       // [rows, d]
  float* momentum_buffer;  // [rows, d] in place; null when momentum is 0
  void* compute;           // [rows, d]; may be null
  int64_t rows, d;
  DType compute_dtype;
  DeviceScalar learning_rate;
  float momentum, weight_decay;
  bool clip;
  DeviceScalar finite = {nullptr, DType::f32};  // data may be null
};

// Closed-form slots, one a token a layer: key = A / ||A||, value = epsilon * G / ||G|| with ||G|| over all layers of
// the token. Nothing is written unless all inputs, gradients and norms are finite.
struct WriteSlotsParams {
  const void *inputs, *gradients;  // A, G: [layers, tokens, d]
  float* slots;                    // [layers, 2, capacity, d] fp32 master: rows [start, start + tokens) are written
  void* compute;                   // [layers, 2, capacity, d] rounded copy of those rows; may be null
  const float* gradient_norms;     // ||G||: [tokens]; null: of `gradients`
  float* norms;                    // [tokens] out: ||G||, NaN for a token of which something is not finite
  double* workspace;               // workspace_size() doubles: each row's sum of squares, then whether all is finite
  int64_t layers, tokens, capacity, start, d;
  double epsilon;
  DType dtype, compute_dtype;

  // Rows are counted through the inputs [layers, tokens], then through the gradients.
  constexpr int64_t rows() const { return 2 * layers * tokens; }
  constexpr int64_t workspace_size() const { return rows() + 1; }
  constexpr bool is_value(int64_t row) const { return row >= layers * tokens; }
  // The row of inputs or gradients, and the row of the slots that it goes to.
  constexpr int64_t source_row(int64_t row) const { return is_value(row) ? row - layers * tokens : row; }
  constexpr int64_t slot_row(int64_t row) const {
    const int64_t source = source_row(row), layer = source / tokens, token = source % tokens;
    return (2 * layer + is_value(row)) * capacity + start + token;
  }
};

// One layer's slots' gradient that nobody has formed yet: dG = d_gate^T x, dK = d_key^T x, dV = hidden^T dy.
struct GradientFactors {
  Rows d_gate, d_key, hidden;  // [tokens, r]
  Rows x, dy;                  // [tokens, d]
};

// The gradient of all layers' slots as factors, for the update that forms each row in registers; bf16 or f16.
struct LayerFactors {
  static constexpr int kMostLayers = 32, kMostTokens = 64, kMostWidth = 8192;
  GradientFactors layers[kMostLayers];
  int count;
  int64_t tokens, r;
  float scale;  // multiplies the gradient
  DType dtype;
};

}  // namespace locas
