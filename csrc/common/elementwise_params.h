// Launch parameters of the kernels between matrix products: activations, importance, loss and norms.
#pragma once

#include "common/types.h"

namespace locas {

// out = scale * act(gate) * up. A two-layer FFN has no up: its data is null then, and stands for ones.
struct GluActivationForwardParams {
  Rows gate, up;  // [rows, cols] pre-activations; up's data may be null
  Rows out;       // [rows, cols]
  int64_t rows, cols;
  float scale;
  Activation activation;
  DType dtype;
};

// From d_hidden, the gradient of scale * act(gate) * up, to the gradients of gate and up.
// d_hidden may be the same memory as d_gate: every element is read before it is written.
struct GluActivationBackwardParams {
  Rows d_hidden;      // [rows, cols]
  Rows gate, up;      // [rows, cols] saved pre-activations; up's data may be null, as in the forward
  Rows d_gate, d_up;  // [rows, cols] out; d_up's data is null where up's is
  Rows hidden;        // [rows, cols] out: scale * act(gate) * up once more; data may be null
  int64_t rows, cols;
  float scale;
  Activation activation;
  DType dtype;
};

// importance[j] = mean over rows of |act(gate[:, j]) * up[:, j]|
struct NeuronImportanceOfProductsParams {
  Rows gate, up;      // [rows, cols]
  float* importance;  // [cols]
  int64_t rows, cols;
  Activation activation;
  DType dtype;
};

// nll[t] = log(sum_j exp(logits[t, j])) - logits[t, targets[t]], and its gradient softmax(logits[t]) - onehot.
struct TokenNllParams {
  Rows logits;             // [rows, cols]
  Rows d_logits;           // [rows, cols] out; data may be null
  const int64_t* targets;  // [rows], each in [0, cols)
  float* nll;              // [rows] out
  int64_t rows, cols;
  DType dtype;
};

// out = weight * round(x / rms), rms = sqrt(mean(x^2) + eps) per row, rounded to the storage type in between as
// transformers' RMS norms do.
struct RmsNormParams {
  Rows x;              // [rows, cols]
  const void* weight;  // [cols]
  Rows out;            // [rows, cols]
  float* inverse_rms;  // [rows] out; may be null
  int64_t rows, cols;
  float eps;
  DType dtype;
};

// dx from d_out; the weight is frozen.
struct RmsNormBackwardParams {
  Rows d_out;                // [rows, cols]
  Rows x;                    // [rows, cols]
  const void* weight;        // [cols]
  const float* inverse_rms;  // [rows]
  Rows dx;                   // [rows, cols] out
  int64_t rows, cols;
  DType dtype;
};

}  // namespace locas
