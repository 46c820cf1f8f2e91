// The CUDA side as plain functions: what the bindings call, and all they know of CUDA.
#pragma once

#include <string>
#include <vector>

#include "../params.h"

namespace locas::cuda {

// Where a launch goes. The current device is restored when the launch has been queued.
struct Queue {
  int device;
  void* stream;  // cudaStream_t
};

void glu_forward(const GluForwardParams&, Queue);
void glu_backward(const GluBackwardParams&, Queue);
void importance(const ImportanceParams&, Queue);
void cross_entropy(const CrossEntropyParams&, Queue);
void adamw(const AdamWParams&, Queue);
void sgd(const SgdParams&, Queue);

// The FFN with memory as fused kernels. Tiles: K1 and K2, any number of tokens; decode: D1 and D2, at most
// kMostDecodeTokens. ffn_forward picks one of them.
constexpr int64_t kMostDecodeTokens = 64;
void ffn_forward(const FfnForwardParams&, Queue);
void ffn_forward_tiles(const FfnForwardParams&, Queue);
void ffn_forward_decode(const FfnForwardParams&, Queue);
void ffn_backward(const FfnBackwardParams&, Queue);
void neuron_importance(const NeuronImportanceParams&, Queue);
// Floats of workspace that they need.
int64_t ffn_forward_workspace(int64_t tokens, const FfnWeights&);
int64_t ffn_backward_workspace(int64_t tokens, const FfnWeights&);
int64_t neuron_importance_workspace(int64_t tokens, int64_t m);

// "80, 90a": what this build was compiled for.
std::string compiled_architectures();
// One line a device that the driver shows; empty without a driver.
std::vector<std::string> devices();

}  // namespace locas::cuda
