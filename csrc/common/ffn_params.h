// Launch parameters of the whole FFN with memory.
#pragma once

#include "common/types.h"

namespace locas {

// A host FFN in Hugging Face layout and one layer's slots, all of GluFfnForwardParams::dtype.
struct FfnWeights {
  Rows gate, up;                                // [m, d]
  Rows down;                                    // [d, m]
  const void *gate_bias, *up_bias, *down_bias;  // [m], [m], [d]; may be null
  Rows memory_gate, memory_key, memory_value;   // [r, d]
  int64_t d, m, r;

  // r rounded up to 8: the memory's columns [m, m + padded_r()) stand behind the host's in the buffers below.
  constexpr int64_t padded_r() const { return (r + 7) / 8 * 8; }
};

// y = [act(x W_gate^T) * (x W_up^T)] W_down^T + scale * [act(x G^T) * (x K^T)] V, the fused kernels; bf16 and f16.
// d and m are multiples of 8, every pointer and row stride of 16 bytes.
struct GluFfnForwardParams {
  FfnWeights weights;
  Rows x;            // [tokens, d]
  Rows hidden;       // [tokens, m + padded_r] out; the memory's part holds scale * act(gate) * key
  Rows gate, up;     // [tokens, m + padded_r] out, pre-activations for the backward; data may be null
  Rows y;            // [tokens, d] out
  float* workspace;  // glu_ffn_forward_workspace() floats
  int64_t tokens;
  float scale;
  Activation activation;
  DType dtype;
};

struct GluFfnBackwardParams {
  FfnWeights weights;
  Rows dy, x;          // [tokens, d]
  Rows gate, up;       // [tokens, m + padded_r] as the forward saved them
  Rows d_gate, d_up;   // [tokens, m + padded_r] out; without dx only the memory's columns are written
  Rows memory_hidden;  // [tokens, padded_r] out: the memory's part of `hidden` once more
  Rows dx;             // [tokens, d] out; data may be null
  float* slots_grad;   // [3, r, d] is added to; may be null
  float* workspace;    // glu_ffn_backward_workspace() floats
  int64_t tokens;
  float scale;
  Activation activation;
  DType dtype;
};

// The same FFN on the CPU (csrc/cpu/ffn.cpp), f32 and bf16. `saved` is for the backward: [2][tokens rounded up to 16]
// [saved_m + r] pre-activations, in an order of its own; saved_m is m, or 0 where no dx will be asked for.
struct CpuGluFfnForwardParams {
  FfnWeights weights;  // bf16: d and m are even
  Rows x;              // [tokens, d]
  Rows y;              // [tokens, d] out
  void* saved;         // out; may be null
  int64_t tokens, saved_m;
  float scale;
  Activation activation;
  DType dtype;
};

struct CpuGluFfnBackwardParams {
  FfnWeights weights;
  Rows dy, x;  // [tokens, d]
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

}  // namespace locas
