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

// out = scale * act(gate) * up. A two-layer FFN has no up: its data is null then, and stands for ones.
struct GluForwardParams {
  Rows gate, up;  // [rows, cols] pre-activations; up's data may be null
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
  Rows gate, up;       // [rows, cols] saved pre-activations; up's data may be null, as in the forward
  Rows d_gate, d_up;   // [rows, cols] out; d_up's data is null where up's is
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

// A host FFN in Hugging Face layout and one layer's slots, all of FfnForwardParams::dtype.
struct FfnWeights {
  Rows gate, up;                                 // [m, d]
  Rows down;                                     // [d, m]
  const void *gate_bias, *up_bias, *down_bias;   // [m], [m], [d]; may be null
  Rows memory_gate, memory_key, memory_value;    // [r, d]
  int64_t d, m, r;

  // r rounded up to 8: the memory's columns [m, m + padded_r()) stand behind the host's in the buffers below.
  constexpr int64_t padded_r() const { return (r + 7) / 8 * 8; }
};

// y = [act(x W_gate^T) * (x W_up^T)] W_down^T + scale * [act(x G^T) * (x K^T)] V, the fused kernels; bf16 and f16.
// d and m are multiples of 8, every pointer and row stride of 16 bytes.
struct FfnForwardParams {
  FfnWeights weights;
  Rows x;              // [tokens, d]
  Rows hidden;         // [tokens, m + padded_r] out; the memory's part holds scale * act(gate) * key
  Rows gate, up;       // [tokens, m + padded_r] out, pre-activations for the backward; data may be null
  Rows y;              // [tokens, d] out
  float* workspace;    // ffn_workspace() floats
  int64_t tokens;
  float scale;
  Activation activation;
  DType dtype;
};

struct FfnBackwardParams {
  FfnWeights weights;
  Rows dy, x;            // [tokens, d]
  Rows gate, up;         // [tokens, m + padded_r] as the forward saved them
  Rows d_gate, d_up;     // [tokens, m + padded_r] out; without dx only the memory's columns are written
  Rows memory_hidden;    // [tokens, padded_r] out: the memory's part of `hidden` once more
  Rows dx;               // [tokens, d] out; data may be null
  float* slots_grad;     // [3, r, d] is added to; may be null
  float* workspace;      // ffn_workspace() floats
  int64_t tokens;
  float scale;
  Activation activation;
  DType dtype;
};

// The same FFN on the CPU (csrc/cpu/ffn.cpp), f32 and bf16. `saved` is for the backward: [2][tokens rounded up to 16]
// [saved_m + r] pre-activations, in an order of its own; saved_m is m, or 0 where no dx will be asked for.
struct CpuFfnForwardParams {
  FfnWeights weights;  // bf16: d and m are even
  Rows x;              // [tokens, d]
  Rows y;              // [tokens, d] out
  void* saved;         // out; may be null
  int64_t tokens, saved_m;
  float scale;
  Activation activation;
  DType dtype;
};

struct CpuFfnBackwardParams {
  FfnWeights weights;
  Rows dy, x;         // [tokens, d]
  const void* saved;
  Rows dx;            // [tokens, d] out; data may be null
  float* slots_grad;  // [3, r, d] is added to
  int64_t tokens, saved_m;
  float scale;
  Activation activation;
  DType dtype;
};

// importance[j] = mean over the tokens of |act(x W_gate^T) * (x W_up^T)|[:, j] without writing the [tokens, m] between.
struct NeuronImportanceParams {
  FfnWeights weights;  // gate, up and their biases; r = 0
  Rows x;              // [tokens, d]
  float* importance;   // [m] out
  float* workspace;    // neuron_importance_workspace() floats
  int64_t tokens;
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
// rate, the number of this update (counted from 1), and whether the gradient is finite. Where `finite` is given and 0,
// the update writes nothing.
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
