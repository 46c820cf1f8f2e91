// The sm90 family: many tokens by TMA and wgmma. What it has no kernel of its own for, sm80's computes, which is compiled
// for sm_90 too.
#include <algorithm>

#include "cuda/ffn/ffn_kernels.h"
#include "cuda/ffn/sm80/launchers.h"
#include "cuda/ffn/sm90/launchers.h"

namespace locas::cuda::sm90 {
namespace {

constexpr int64_t kMostDecodeTokens = 16;  // above, tiles take less; sm80's own bound is higher
static_assert(kMostDecodeTokens <= sm80::kMostDecodeTokens);

// Whether a tensor map can describe the matrix: its rows do not overlap and lie less than 2^40 bytes apart.
bool has_tensor_map(const Matrix& m) {
  return m.data == nullptr || (m.stride >= m.cols && m.stride < int64_t{1} << 39);
}

bool have_tensor_maps(const GluFfnForwardParams& p) {
  const FfnWeights& w = p.weights;
  const Matrix matrices[] = {w.gate, w.up, w.down, w.memory_gate, w.memory_key, w.memory_value,
                             p.x,    p.y,  p.gate, p.up,          p.hidden};
  return std::all_of(std::begin(matrices), std::end(matrices), has_tensor_map);
}

void forward(const GluFfnForwardParams& p, Queue queue) {
  if (p.tokens() <= kMostDecodeTokens) sm80::glu_ffn_forward_decode(p, queue);
  else if (have_tensor_maps(p)) glu_ffn_forward_tiles(p, queue);
  else sm80::glu_ffn_forward_tiles(p, queue);
}

bool have_tensor_maps(const GluFfnBackwardParams& p) {
  const FfnWeights& w = p.weights;
  const Matrix matrices[] = {w.gate, w.up,   w.down, w.memory_gate, w.memory_key, w.memory_value,  p.dy,
                             p.x,    p.gate, p.up,   p.d_gate,      p.d_up,       p.memory_hidden, p.dx};
  return std::all_of(std::begin(matrices), std::end(matrices), has_tensor_map);
}

void backward(const GluFfnBackwardParams& p, Queue queue) {
  if (p.tokens() > kMostDecodeTokens && have_tensor_maps(p)) glu_ffn_backward_tiles(p, queue);
  else sm80::glu_ffn_backward(p, queue);
}

int64_t backward_workspace(int64_t tokens, const FfnSizes& sizes) {
  const int64_t of_sm80 = sm80::glu_ffn_backward_workspace(tokens, sizes);
  return tokens <= kMostDecodeTokens ? of_sm80 : std::max(glu_ffn_backward_workspace(tokens, sizes), of_sm80);
}

int64_t forward_workspace(int64_t tokens, const FfnSizes& sizes) {
  if (tokens <= kMostDecodeTokens) return 0;
  return std::max(glu_ffn_forward_workspace(tokens, sizes), sm80::glu_ffn_tiles_workspace(tokens, sizes));
}

}  // namespace

const FfnKernels table = {.family = "sm90",
                          .glu_ffn_forward = forward,
                          .glu_ffn_backward = backward,
                          .neuron_importance = sm80::neuron_importance,
                          .glu_ffn_forward_workspace = forward_workspace,
                          .glu_ffn_backward_workspace = backward_workspace,
                          .neuron_importance_workspace = sm80::neuron_importance_workspace};

}  // namespace locas::cuda::sm90
