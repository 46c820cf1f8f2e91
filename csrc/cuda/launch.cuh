// How a kernel is queued. A kernel is a struct:
//
//      struct Kernel {
//        using Params = ...;                                     // plain data, passed by value
//        static constexpr const char* name = "adamw_slots";      // in error messages and test output
//        static constexpr int threads = 128, min_blocks = 1;     // a block, and blocks a multiprocessor at least
//        static LOCAS_DEVICE void run(const Params& p, unsigned char* shared);
//      };
//
// launch<Kernel>(blocks, shared_bytes, queue, params) queues it on a GPU, or, compiled without nvcc, runs it on the
// SIMT runner. `shared` has shared_bytes bytes, aligned to 1024.
#pragma once

#include <atomic>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "cuda/api.h"
#include "cuda/ptx/device.cuh"

#ifdef __CUDACC__
#include <cuda_runtime.h>
#endif

namespace locas::cuda {

struct LaunchOptions {
  bool programmatic = false;  // may begin before the launch before it has ended; it waits itself (ptx/grid.cuh)
  bool cooperative = false;   // at most resident_blocks(), which may wait for each other (ptx/grid.cuh)
};

#ifdef __CUDACC__

inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess)
    throw std::runtime_error(std::string("CUDA error in ") + what + ": " + cudaGetErrorString(status));
}

// Makes a device current and the previous one again.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&previous_), "cudaGetDevice");
    if (device != previous_) check(cudaSetDevice(device), "cudaSetDevice");
    changed_ = device != previous_;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
  bool changed_ = false;
};

template <class Kernel>
__global__ void __launch_bounds__(Kernel::threads, Kernel::min_blocks)
    kernel(const __grid_constant__ typename Kernel::Params params) {
  extern __shared__ __align__(1024) unsigned char shared[];
  Kernel::run(params, shared);
}

// Whether the code that runs on this device was compiled for sm_90 or later: only there a kernel can wait.
template <class Kernel>
bool waits_itself(int device) {
  constexpr int kDevices = 64;
  static std::atomic<int> versions[kDevices];  // of the PTX; 0: not asked yet
  if (device >= kDevices) return false;
  if (versions[device] == 0) {
    cudaFuncAttributes attributes;
    check(cudaFuncGetAttributes(&attributes, kernel<Kernel>), Kernel::name);
    versions[device] = attributes.ptxVersion;
  }
  return versions[device] >= 90;
}

// Up to 48 KB of shared memory need no permission.
template <class Kernel>
void permit_shared_memory(size_t bytes) {
  if (bytes > 48 << 10)
    check(cudaFuncSetAttribute(kernel<Kernel>, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)),
          Kernel::name);
}

template <class Kernel>
void launch(int64_t blocks, size_t shared_bytes, Queue queue, const typename Kernel::Params& params,
            LaunchOptions options = {}) {
  if (blocks == 0) return;
  if (blocks < 0 || blocks > INT32_MAX)
    throw std::runtime_error(std::string(Kernel::name) + ": a grid of " + std::to_string(blocks) +
                             " blocks; at most 2^31 - 1");
  const DeviceGuard guard(queue.device);
  permit_shared_memory<Kernel>(shared_bytes);
  cudaLaunchAttribute attribute;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(Kernel::threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(queue.stream);
  config.attrs = &attribute;
  if (options.cooperative) {
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
    config.numAttrs = 1;
  } else if (options.programmatic && waits_itself<Kernel>(queue.device)) {
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    config.numAttrs = 1;
  }
  check(cudaLaunchKernelEx(&config, kernel<Kernel>, params), Kernel::name);
}

inline int device_attribute(cudaDeviceAttr attribute, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, attribute, device), "cudaDeviceGetAttribute");
  return value;
}

inline int multiprocessor_count(Queue queue) { return device_attribute(cudaDevAttrMultiProcessorCount, queue.device); }

// How many blocks the device holds at once, the most of a cooperative launch; 0 where it cannot hold any or has no
// cooperative launches.
template <class Kernel>
int64_t resident_blocks(size_t shared_bytes, Queue queue) {
  const auto most = static_cast<size_t>(device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, queue.device));
  if (shared_bytes > most || !device_attribute(cudaDevAttrCooperativeLaunch, queue.device)) return 0;
  const DeviceGuard guard(queue.device);
  permit_shared_memory<Kernel>(shared_bytes);
  int blocks = 0;
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel<Kernel>, Kernel::threads, shared_bytes),
        Kernel::name);
  return static_cast<int64_t>(blocks) * multiprocessor_count(queue);
}

// 10 times the major number plus the minor one.
inline int compute_capability(int device) {
  return 10 * device_attribute(cudaDevAttrComputeCapabilityMajor, device) +
         device_attribute(cudaDevAttrComputeCapabilityMinor, device);
}

// Of those that the driver shows; 0 without a driver.
inline int device_count() {
  int count = 0;
  if (cudaGetDeviceCount(&count) == cudaSuccess) return count;
  cudaGetLastError();  // no driver or no device is an answer here, not an error to keep
  return 0;
}

#else

template <class Kernel>
void launch(int64_t blocks, size_t shared_bytes, Queue, const typename Kernel::Params& params,
            LaunchOptions options = {}) {
  static_assert(std::is_trivially_copyable_v<typename Kernel::Params>);
  if (blocks == 0) return;
  simt::run_grid(
      Kernel::name, blocks, Kernel::threads, shared_bytes,
      [&params](unsigned char* shared) { Kernel::run(params, shared); },
      options.cooperative    ? simt::LaunchKind::cooperative
      : options.programmatic ? simt::LaunchKind::programmatic
                             : simt::LaunchKind::ordinary);
}

inline int multiprocessor_count(Queue) { return simt::kMultiprocessors; }
template <class Kernel>
int64_t resident_blocks(size_t, Queue) {
  return simt::most_resident_blocks();
}
inline int compute_capability(int) { return 90; }
inline int device_count() { return 1; }

#endif

}  // namespace locas::cuda
