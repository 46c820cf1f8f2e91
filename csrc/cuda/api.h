// The CUDA side as plain functions: what the bindings call, and all they know of CUDA.
#pragma once

#include <string>
#include <vector>

#include "common/elementwise_params.h"
#include "common/ffn_params.h"
#include "common/norm_params.h"
#include "common/peer_params.h"
#include "common/rotary_params.h"
#include "common/slot_params.h"

namespace locas::cuda {

// Where a launch goes. The current device is restored when the launch has been queued.
struct Queue {
  int device;
  void* stream;  // cudaStream_t
};

void glu_activation_forward(const GluActivationForwardParams&, Queue);
void glu_activation_backward(const GluActivationBackwardParams&, Queue);
void neuron_importance_of_products(const NeuronImportanceOfProductsParams&, Queue);
void token_nll(const TokenNllParams&, Queue);
void rms_norm(const NormParams&, Queue);
void rms_norm_backward(const NormBackwardParams&, Queue);
void layer_norm(const NormParams&, Queue);
void layer_norm_backward(const NormBackwardParams&, Queue);
void peer_sum(const PeerSumParams&, Queue);
void rotary_forward(const RotaryForwardParams&, Queue);
void rotary_backward(const RotaryBackwardParams&, Queue);
void adamw_slots(const AdamwSlotsParams&, Queue);
void sgd_slots(const SgdSlotsParams&, Queue);
void write_slots(const WriteSlotsParams&, Queue);
// The same updates with the gradient formed on the way: slots [count, 3, r, d] of the layers in LayerFactors, `grad`
// unused.
void adamw_slots_from_factors(const AdamwSlotsParams&, const LayerFactors&, Queue);
void sgd_slots_from_factors(const SgdSlotsParams&, const LayerFactors&, Queue);

// The FFN with memory as fused kernels, of the family that the device takes (ffn/ffn_kernels.h).
void glu_ffn_forward(const GluFfnForwardParams&, Queue);
void glu_ffn_backward(const GluFfnBackwardParams&, Queue);
void neuron_importance(const NeuronImportanceParams&, Queue);
// Floats of workspace that they need on a device.
int64_t glu_ffn_forward_workspace(int64_t tokens, const FfnSizes&, int device);
int64_t glu_ffn_backward_workspace(int64_t tokens, const FfnSizes&, int device);
int64_t neuron_importance_workspace(int64_t tokens, int64_t m, int device);

// The family that each device takes, such as "sm80"; "" for one on which no kernel runs.
std::vector<std::string> families();
// From now on this family, 80 or 90; 0: the device's own. std::invalid_argument where a device cannot run it.
void use_family(int family);

// "80, 90a": what this build was compiled for.
std::string compiled_architectures();
// One line a device that the driver shows; empty without a driver.
std::vector<std::string> devices();

}  // namespace locas::cuda
