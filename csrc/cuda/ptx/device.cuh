// This folder holds every GPU instruction that C++ has no word for, each twice: for the device as PTX or an intrinsic,
// for the host as a call of the SIMT runner (csrc/simt), which does the same and checks that it was allowed. Kernels
// are written in these functions and plain C++. docs/kernels.md says how.
#pragma once

#ifdef __CUDACC__
#define LOCAS_DEVICE __device__ __forceinline__
#else
#include "simt/runner.h"
#define LOCAS_DEVICE inline
#endif
