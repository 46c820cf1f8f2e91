// The FFN's launchers of one architecture family, and which family a GPU takes.
//
//      compute capability     family   its code
//      8.0, 8.6, 8.7, 8.9     sm80     sm_80's, which every 8.x runs
//      9.0                    sm90     sm_90a's; sm80 in a build without it, or under a driver before CUDA 12
//      10.0, 12.0 and newer   sm80     PTX, which the driver compiles
//
// CMakeLists.txt builds a library for each family: sm80 for whatever architectures are asked for and always as PTX too,
// sm90 for 90a only, whose instructions no other GPU has.
#pragma once

#include <stdexcept>
#include <string>

#include "cuda/api.h"

namespace locas::cuda {

struct FfnKernels {
  const char* family;
  void (*glu_ffn_forward)(const GluFfnForwardParams&, Queue);
  void (*glu_ffn_backward)(const GluFfnBackwardParams&, Queue);
  void (*neuron_importance)(const NeuronImportanceParams&, Queue);
  // Floats of workspace that they need.
  int64_t (*glu_ffn_forward_workspace)(int64_t tokens, const FfnSizes&);
  int64_t (*glu_ffn_backward_workspace)(int64_t tokens, const FfnSizes&);
  int64_t (*neuron_importance_workspace)(int64_t tokens, int64_t m);
};

// ffn/sm80/table.cpp, ffn/sm90/table.cpp
namespace sm80 {
extern const FfnKernels table;
}
namespace sm90 {
extern const FfnKernels table;
}

constexpr int kLeastCapability = 80;  // 10 times the major number plus the minor one

// 80 or 90; 0 where no kernel runs. has_sm90: whether build and driver have that family. asked: 80, 90 or 0 (nobody
// did).
inline int family_of(int capability, bool has_sm90, int asked = 0) {
  if (capability < kLeastCapability) return 0;
  const bool takes_sm90 = capability == 90 && has_sm90;
  if (asked == 90 && !takes_sm90) {
    const std::string number = std::to_string(capability / 10) + "." + std::to_string(capability % 10);
    const std::string here = has_sm90 ? "this GPU has " + number
                                      : "the build is not for 90a (LOCAS_CUDA_ARCHS) or the driver older than CUDA 12";
    throw std::invalid_argument("LOCAS_CUDA_FAMILY is 90, whose kernels run on compute capability 9.0 only, and " +
                                here + "; expected 80");
  }
  if (asked != 0) return asked;
  return takes_sm90 ? 90 : 80;
}

}  // namespace locas::cuda
