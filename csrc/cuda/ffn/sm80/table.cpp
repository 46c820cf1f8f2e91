#include "cuda/ffn/ffn_kernels.h"
#include "cuda/ffn/sm80/launchers.h"

namespace locas::cuda::sm80 {

const FfnKernels table = {.family = "sm80",
                          .glu_ffn_forward = glu_ffn_forward,
                          .glu_ffn_backward = glu_ffn_backward,
                          .neuron_importance = neuron_importance,
                          .glu_ffn_forward_workspace = glu_ffn_forward_workspace,
                          .glu_ffn_backward_workspace = glu_ffn_backward_workspace,
                          .neuron_importance_workspace = neuron_importance_workspace};

}  // namespace locas::cuda::sm80
