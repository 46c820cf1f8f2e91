// What `locas info` says about the CUDA side.
#include "cuda/launch.cuh"

#ifndef LOCAS_CUDA_ARCH_LIST
#error "CMakeLists.txt defines LOCAS_CUDA_ARCH_LIST"
#endif

namespace locas::cuda {

std::string compiled_architectures() { return LOCAS_CUDA_ARCH_LIST; }

std::vector<std::string> devices() {
  std::vector<std::string> lines;
  for (int i = 0; i < device_count(); ++i) {
    cudaDeviceProp properties;
    check(cudaGetDeviceProperties(&properties, i), "cudaGetDeviceProperties");
    lines.push_back(std::string(properties.name) + ", sm_" + std::to_string(properties.major * 10 + properties.minor));
  }
  return lines;
}

}  // namespace locas::cuda
