// Picks the family of FFN kernels by the GPU: the twin of cpu/dispatch.cpp.
#include <atomic>

#include "cuda/ffn/ffn_kernels.h"
#include "cuda/launch.cuh"
#include "cuda/tensor_map.cuh"

namespace locas::cuda {
namespace {

// Whether this build and this driver have the sm90 family.
bool has_sm90() {
#ifdef LOCAS_CUDA_SM90
  return has_tensor_maps();
#else
  return false;
#endif
}

std::atomic<int> asked_family{0};

const FfnKernels* table_of(int family) {
#ifdef LOCAS_CUDA_SM90
  if (family == 90) return &sm90::table;
#endif
  return family == 0 ? nullptr : &sm80::table;
}

const FfnKernels& ffn_kernels(int device) {
  const int capability = compute_capability(device);
  const FfnKernels* table = table_of(family_of(capability, has_sm90(), asked_family));
  if (table == nullptr)
    throw std::runtime_error("the fused CUDA kernels need compute capability 8.0 or newer; device " +
                             std::to_string(device) + " has " + std::to_string(capability / 10) + "." +
                             std::to_string(capability % 10));
  return *table;
}

}  // namespace

void use_family(int family) {
  for (int device = 0; device < device_count(); ++device)
    family_of(compute_capability(device), has_sm90(), family);  // throws where it cannot run
  asked_family = family;
}

std::vector<std::string> families() {
  std::vector<std::string> names;
  for (int device = 0; device < device_count(); ++device) {
    const FfnKernels* table = table_of(family_of(compute_capability(device), has_sm90(), asked_family));
    names.push_back(table == nullptr ? "" : table->family);
  }
  return names;
}

void glu_ffn_forward(const GluFfnForwardParams& p, Queue queue) { ffn_kernels(queue.device).glu_ffn_forward(p, queue); }
void glu_ffn_backward(const GluFfnBackwardParams& p, Queue queue) {
  ffn_kernels(queue.device).glu_ffn_backward(p, queue);
}
void neuron_importance(const NeuronImportanceParams& p, Queue queue) {
  ffn_kernels(queue.device).neuron_importance(p, queue);
}

int64_t glu_ffn_forward_workspace(int64_t tokens, const FfnSizes& sizes, int device) {
  return ffn_kernels(device).glu_ffn_forward_workspace(tokens, sizes);
}
int64_t glu_ffn_backward_workspace(int64_t tokens, const FfnSizes& sizes, int device) {
  return ffn_kernels(device).glu_ffn_backward_workspace(tokens, sizes);
}
int64_t neuron_importance_workspace(int64_t tokens, int64_t m, int device) {
  return ffn_kernels(device).neuron_importance_workspace(tokens, m);
}

}  // namespace locas::cuda
