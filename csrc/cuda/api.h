// The CUDA side as plain functions: what the bindings call, and all they know of CUDA.
#pragma once

#include <string>
#include <vector>

#include "common/elementwise_params.h"
#include "common/ffn_params.h"
#include "common/slot_params.h"

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
void write_slots(const WriteSlotsParams&, Queue);
// The same updates with the gradient formed on the way: slots [count, 3, r, d] of the layers in LayerFactors, `grad`
// unused.
void adamw_from_factors(const AdamWParams&, const LayerFactors&, Queue);
void sgd_from_factors(const SgdParams&, const LayerFactors&, Queue);

// The FFN with memory as fused kernels. Tiles: K1 and K2, any number of tokens; decode: D1 and D2, at most
// kMostDecodeTokens. ffn_forward picks one of them.
// On an H100 D1 and D2 are up to 2.0 times as fast as the tiles at 1 token, as fast at 32 and slower above.
constexpr int64_t kMostDecodeTokens = 32;
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
