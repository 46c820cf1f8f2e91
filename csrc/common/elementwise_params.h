// Launch parameters of the kernels between matrix products: activations, importance and loss.
#pragma once

#include "common/types.h"

namespace locas {

// out = scale * act(gate) * up. A two-layer FFN has no up: its data is null then, and stands for ones.
struct GluActivationForwardParams {
  Matrix gate, up;  // [rows, cols] pre-activations; up's data may be null
  Matrix out;       // [rows, cols]
  float scale;
  Activation activation;
  ActivationParams params;
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
  ActivationParams params;
  DType dtype;
};

// importance[j] = mean over rows of |act(gate[:, j]) * up[:, j]|
struct NeuronImportanceOfProductsParams {
  Matrix gate, up;    // [rows, cols]
  float* importance;  // [cols] out
  Activation activation;
  ActivationParams params;
  DType dtype;
};

// With z = logit_scale * logits, and soft_cap * tanh(z / soft_cap) in its place where soft_cap > 0:
// nll[t] = log(sum_j exp(z[t, j])) - z[t, targets[t]], and its gradient softmax(z[t]) - onehot, times dz / dlogits.
struct TokenNllParams {
  Matrix logits;           // [rows, cols]
  Matrix d_logits;         // [rows, cols] out; data may be null, or the same memory as the logits'
  const int64_t* targets;  // [rows], each in [0, cols)
  float* nll;              // [rows] out
  float soft_cap, logit_scale;
  DType dtype;
};

}  // namespace locas
