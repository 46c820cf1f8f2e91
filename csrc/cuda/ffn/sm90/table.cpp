// What the sm90 family has no kernel of its own for, sm80's computes: it is compiled for sm_90 too.
#include "cuda/ffn/ffn_kernels.h"
#include "cuda/ffn/sm80/launchers.h"

namespace locas::cuda::sm90 {

const FfnKernels table = {.family = "sm90",
                          .glu_ffn_forward = sm80::glu_ffn_forward,
                          .glu_ffn_backward = sm80::glu_ffn_backward,
                          .neuron_importance = sm80::neuron_importance,
                          .glu_ffn_forward_workspace = sm80::glu_ffn_forward_workspace,
                          .glu_ffn_backward_workspace = sm80::glu_ffn_backward_workspace,
                          .neuron_importance_workspace = sm80::neuron_importance_workspace};

}  // namespace locas::cuda::sm90
