// The launchers of the family that every GPU from sm_80 on runs: mma.sync on operands that cp.async brings.
#pragma once

#include "cuda/api.h"

namespace locas::cuda::sm80 {

// forward.cu. Tiles: any number of tokens; decode: at most kMostDecodeTokens, and no workspace.
// glu_ffn_forward picks one of them (plan.cuh).
constexpr int64_t kMostDecodeTokens = 64;
void glu_ffn_forward(const GluFfnForwardParams&, Queue);
void glu_ffn_forward_tiles(const GluFfnForwardParams&, Queue);
void glu_ffn_forward_decode(const GluFfnForwardParams&, Queue);
// decode_backward.cu: the backward with dx as one kernel, for at most 16 tokens; false, and nothing is launched, where the
// device cannot hold all its blocks at once.
bool glu_ffn_backward_decode_cooperative(const GluFfnBackwardParams&, Queue);
int64_t glu_ffn_forward_workspace(int64_t tokens, const FfnSizes&);
int64_t glu_ffn_tiles_workspace(int64_t tokens, const FfnSizes&);

void neuron_importance(const NeuronImportanceParams&, Queue);
int64_t neuron_importance_workspace(int64_t tokens, int64_t m);

// backward.cu
void glu_ffn_backward(const GluFfnBackwardParams&, Queue);
int64_t glu_ffn_backward_workspace(int64_t tokens, const FfnSizes&);

}  // namespace locas::cuda::sm80
