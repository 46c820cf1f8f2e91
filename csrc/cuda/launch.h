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

// "80, 90a": what this build was compiled for.
std::string compiled_architectures();
// One line a device that the driver shows; empty without a driver.
std::vector<std::string> devices();

}  // namespace locas::cuda
