// Launch parameters of the kernels between matrix products: activations, importance, loss and norms.
#pragma once

#include "common/types.h"

namespace locas {

// out = scale * act(gate) * up. A two-layer FFN has no up: its data is null then, and stands for ones.
struct GluActivationForwardParams {
  Matrix gate, up;  // [rows, cols] pre-activations; up's data may be null
  Matrix out;       // [rows, cols]
  float scale;
  Activation activation;
  DType dtype;
};

// From d_hidden, the gradient of scale * act(gate) * up, to the gradients of gate and up.
// d_hidden may be the same memory as d_gate: every element is read before it is written.
struct GluActivationBackwardParams {
  Matrix d_hidden;      // [rows, cols]
  Matrix gate, up;      // [rows, cols] saved pre-activations; up's data may be null, as in the forward
  Matrix d_gate, d_up;  // [rows, cols] out; d_up's data is null where up's is
  Matrix hidden;        // [rows, cols] out: scale * act(gate) * up once more; data may be null
  float scale;
  Activation activation;
  DType dtype;
};

// importance[j] = mean over rows of |act(gate[:, j]) * up[:, j]|
struct NeuronImportanceOfProductsParams {
  Matrix gate, up;    // [rows, cols]
  float* importance;  // [cols] out
  Activation activation;
  DType dtype;
};

// nll[t] = log(sum_j exp(logits[t, j])) - logits[t, targets[t]], and its gradient softmax(logits[t]) - onehot.
struct TokenNllParams {
  Matrix logits;           // [rows, cols]
  Matrix d_logits;         // [rows, cols] out; data may be null
  const int64_t* targets;  // [rows], each in [0, cols)
  float* nll;              // [rows] out
  DType dtype;
};

// out = weight * round(x / rms), rms = sqrt(mean(x^2) + eps) per row, rounded to the storage type in between as
// transformers' RMS norms do.
struct RmsNormParams {
  Matrix x;            // [rows, cols]
  const void* weight;  // [cols]
  Matrix out;          // [rows, cols]
  float* inverse_rms;  // [rows] out; may be null
  float eps;
  DType dtype;
};

// dx from d_out; the weight is frozen.
struct RmsNormBackwardParams {
  Matrix d_out;              // [rows, cols]
  Matrix x;                  // [rows, cols]
  const void* weight;        // [cols]
  const float* inverse_rms;  // [rows]
  Matrix dx;                 // [rows, cols] out
  DType dtype;
};

}  // namespace locas
