// The choice of the device: each macro runs a kernel with the interpreter released.
#pragma once

#include <pybind11/pybind11.h>

#include <stdexcept>

#include "cpu/kernels.h"
#ifdef LOCAS_WITH_CUDA
#include "cuda/api.h"
#endif

// Runs the CPU or the CUDA kernel of one op.
#ifdef LOCAS_WITH_CUDA
#define LOCAS_DISPATCH(kernel, params, device_index, stream)                    \
  do {                                                                          \
    const pybind11::gil_scoped_release released;                                \
    if ((device_index) < 0) cpu::kernels().kernel(params);                      \
    else cuda::kernel(params, {device_index, reinterpret_cast<void*>(stream)}); \
  } while (0)
#else
#define LOCAS_DISPATCH(kernel, params, device_index, stream)                                  \
  do {                                                                                        \
    (void)(stream);                                                                           \
    if ((device_index) >= 0)                                                                  \
      throw std::runtime_error(#kernel                                                        \
                               ": this build has no CUDA kernels; rebuild with LOCAS_CUDA=1 " \
                               "where nvcc is found");                                        \
    const pybind11::gil_scoped_release released;                                              \
    cpu::kernels().kernel(params);                                                            \
  } while (0)
#endif

// Launches a kernel that exists on CUDA only, on the device of `like`.
#ifdef LOCAS_WITH_CUDA
#define LOCAS_LAUNCH_CUDA(kernel, like, stream, ...)                                               \
  do {                                                                                             \
    if ((like).device < 0)                                                                         \
      throw pybind11::value_error(#kernel ": the tensors are on the CPU; this kernel needs CUDA"); \
    const pybind11::gil_scoped_release released;                                                   \
    cuda::kernel(__VA_ARGS__, {(like).device, reinterpret_cast<void*>(stream)});                   \
  } while (0)
#else
#define LOCAS_LAUNCH_CUDA(kernel, like, stream, ...)                                        \
  do {                                                                                      \
    (void)(stream), (void)sizeof(__VA_ARGS__);                                              \
    throw std::runtime_error(#kernel                                                        \
                             ": this build has no CUDA kernels; rebuild with LOCAS_CUDA=1 " \
                             "where nvcc is found");                                        \
  } while (0)
#endif
