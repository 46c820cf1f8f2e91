// Launch parameters of the whole FFN with memory.
#pragma once

#include "common/types.h"

namespace locas {

// Elements of a half type in 16 bytes, what the fused CUDA kernels move at once: d and m are multiples of it, and r is
// rounded up to it in their buffers.
constexpr int64_t kPieceElements = 8;
// Tokens in a vector of the CPU's fused kernels: what they save is rounded up to it.
constexpr int64_t kCpuTokenMultiple = 16;

// What a product's tiles and workspace follow from: hidden size, host neurons, slots.
struct FfnSizes {
  int64_t d, m, r;

  // The memory's columns [m, m + padded_r()) stand behind the host's in the buffers below.
  LOCAS_INLINE constexpr int64_t padded_r() const { return (r + kPieceElements - 1) / kPieceElements * kPieceElements; }
};

// A host FFN in Hugging Face layout and one layer's slots, all of one dtype.
struct FfnWeights {
  Matrix gate, up;                               // [m, d]
  Matrix down;                                   // [d, m]
  const void *gate_bias, *up_bias, *down_bias;   // [m], [m], [d]; may be null
  Matrix memory_gate, memory_key, memory_value;  // [r, d]

  LOCAS_INLINE constexpr int64_t d() const { return gate.cols; }
  LOCAS_INLINE constexpr int64_t m() const { return gate.rows; }
  LOCAS_INLINE constexpr int64_t r() const { return memory_value.rows; }
  LOCAS_INLINE constexpr FfnSizes sizes() const { return {d(), m(), r()}; }
  LOCAS_INLINE constexpr int64_t padded_r() const { return sizes().padded_r(); }
};

// y = [act(x W_gate^T) * (x W_up^T)] W_down^T + scale * [act(x G^T) * (x K^T)] V, the fused kernels; bf16 and f16.
// d and m are multiples of 8, every pointer and row stride of 16 bytes.
struct GluFfnForwardParams {
  FfnWeights weights;
  Matrix x;          // [tokens, d]
  Matrix hidden;     // [tokens, m + padded_r] out; the memory's part holds scale * act(gate) * key
  Matrix gate, up;   // [tokens, m + padded_r] out, pre-activations for the backward; data may be null
  Matrix y;          // [tokens, d] out
  float* workspace;  // [cuda::glu_ffn_forward_workspace()]; null if that is 0
  float scale;
  Activation activation;
  DType dtype;

  LOCAS_INLINE constexpr int64_t tokens() const { return x.rows; }
};

struct GluFfnBackwardParams {
  FfnWeights weights;
  Matrix dy, x;          // [tokens, d]
  Matrix gate, up;       // [tokens, m + padded_r] as the forward saved them
  Matrix d_gate, d_up;   // [tokens, m + padded_r] out; without dx only the memory's columns are written
  Matrix memory_hidden;  // [tokens, padded_r] out: the memory's part of `hidden` once more
  Matrix dx;             // [tokens, d] out; data may be null
  Matrix slots_grad;     // float32 [3 r, d], gate rows, key rows, value rows: is added to; contiguous; data may be null
  float* workspace;      // [cuda::glu_ffn_backward_workspace()]; null if that is 0 or there is no dx
  float scale;
  Activation activation;
  DType dtype;

  LOCAS_INLINE constexpr int64_t tokens() const { return x.rows; }
};

// The same FFN on the CPU (csrc/cpu/ffn.cpp), f32 and bf16. `saved` is for the backward: pre-activations in an order of
// its own; saved_m is m, or 0 where no dx will be asked for.
struct CpuGluFfnForwardParams {
  FfnWeights weights;  // bf16: d and m are even
  Matrix x;            // [tokens, d]
  Matrix y;            // [tokens, d] out
  void* saved;         // [2, tokens rounded up to kCpuTokenMultiple, saved_m + r] out; may be null
  int64_t saved_m;
  float scale;
  Activation activation;
  DType dtype;
};

struct CpuGluFfnBackwardParams {
  FfnWeights weights;
  Matrix dy, x;       // [tokens, d]
  const void* saved;  // [2, tokens rounded up to kCpuTokenMultiple, saved_m + r] as the forward saved it
  Matrix dx;          // [tokens, d] out; data may be null
  Matrix slots_grad;  // float32 [3 r, d], gate rows, key rows, value rows: is added to; contiguous
  int64_t saved_m;
  float scale;
  Activation activation;
  DType dtype;
};

// importance[j] = mean over the tokens of |act(x W_gate^T) * (x W_up^T)|[:, j] without writing the [tokens, m] between.
struct NeuronImportanceParams {
  FfnWeights weights;  // gate, up and their biases; no slots
  Matrix x;            // [tokens, d]
  float* importance;   // [m] out
  float* workspace;    // [cuda::neuron_importance_workspace()]
  Activation activation;
  DType dtype;

  LOCAS_INLINE constexpr int64_t tokens() const { return x.rows; }
};

}  // namespace locas
