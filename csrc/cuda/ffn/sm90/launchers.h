// The Hopper family's launchers: those of cuda/api.h by the same parameters, and each product alone with a plan of the
// caller's, for measurements and tests.
#pragma once

#include "common/ffn_params.h"
#include "cuda/api.h"

namespace locas::cuda::sm90 {

// forward.cu
void glu_ffn_forward_tiles(const GluFfnForwardParams&, Queue);
int64_t glu_ffn_forward_workspace(int64_t tokens, const FfnSizes&);

// tile: an index into kTiles of plan.cuh. splits > 1 needs a workspace of splits * tokens * d floats, slot_splits > 1 of
// slot_splits * 3 * r * d more.
void glu_ffn_hidden(const GluFfnForwardParams&, int tile, Queue);
void glu_ffn_down(const GluFfnForwardParams&, int tile, int splits, Queue);

// backward.cu
void glu_ffn_backward_tiles(const GluFfnBackwardParams&, Queue);
int64_t glu_ffn_backward_workspace(int64_t tokens, const FfnSizes&);
void glu_ffn_hidden_grad(const GluFfnBackwardParams&, int tile, Queue);
void glu_ffn_input_and_slots_grad(const GluFfnBackwardParams&, int tile, int splits, int slot_splits, Queue);

}  // namespace locas::cuda::sm90
