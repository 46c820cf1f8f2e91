// Launch parameters of every kernel: plain data, no CUDA, no Python.
//
// The bindings fill these structs and check them once; the CPU and the CUDA side read the same ones.
// A shape stands after every pointer. "Rows" are matrices whose last dimension is contiguous and whose rows
// lie `stride` elements apart.
#pragma once

#include <cstdint>

namespace locas {

enum class DType : int32_t { f32, bf16, f16, f64, i64 };

enum class Activation : int32_t { silu, gelu_tanh, gelu, relu };

// A matrix of `GluParams::rows` x `cols` elements of `GluParams::dtype`.
struct Rows {
  void* data;      // [rows, cols]
  int64_t stride;  // elements from one row to the next
};

// out = scale * act(gate) * up
struct GluForwardParams {
  Rows gate, up;  // [rows, cols] pre-activations
  Rows out;       // [rows, cols]
  int64_t rows, cols;
  float scale;
  Activation activation;
  DType dtype;
};

// From d_hidden, the gradient of scale * act(gate) * up, to the gradients of gate and up.
// d_hidden may be the same memory as d_gate: every element is read before it is written.
struct GluBackwardParams {
  Rows d_hidden;       // [rows, cols]
  Rows gate, up;       // [rows, cols] saved pre-activations
  Rows d_gate, d_up;   // [rows, cols] out
  Rows hidden;         // [rows, cols] out: scale * act(gate) * up once more; data may be null
  int64_t rows, cols;
  float scale;
  Activation activation;
  DType dtype;
};

// importance[j] = mean over rows of |act(gate[:, j]) * up[:, j]|
struct ImportanceParams {
  Rows gate, up;      // [rows, cols]
  float* importance;  // [cols]
  int64_t rows, cols;
  Activation activation;
  DType dtype;
};

// nll[t] = log(sum_j exp(logits[t, j])) - logits[t, targets[t]], and its gradient softmax(logits[t]) - onehot.
struct CrossEntropyParams {
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

// What changes from update to update lies on the slots' device, so that a captured graph can be replayed: the learning
// rate, the number of this update (counted from 1), and whether the gradient is finite. Where `finite` is given and 0, the
// update writes nothing.
struct DeviceScalar {
  const void* data;  // one element
  DType dtype;       // f32, f64 or i64
};

// One AdamW step over rows of d elements, then every row longer than 1 is scaled back to length 1.
struct AdamWParams {
  float* slots;              // [rows, d] fp32 master, in place
  const float* grad;         // [rows, d]
  float* exp_avg;            // [rows, d] in place
  float* exp_avg_sq;         // [rows, d] in place
  void* compute;             // [rows, d] rounded copy of the new slots; may be null
  int64_t rows, d;
  DType compute_dtype;
  DeviceScalar step, learning_rate;
  double beta1, beta2;          // double: 1 - beta2 loses half its digits in float
  float log_beta1, log_beta2;  // their natural logarithms
  float eps, weight_decay;
  bool clip;
  DeviceScalar finite = {nullptr, DType::f32};  // data may be null
};

// One SGD step (momentum_buffer = momentum * momentum_buffer + grad), then the same clip.
struct SgdParams {
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

}  // namespace locas
