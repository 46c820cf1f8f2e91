// A formula that the CPU and the GPU compile from one source.
#pragma once

#ifdef __CUDACC__
#define LOCAS_INLINE __host__ __device__ __forceinline__
#else
#define LOCAS_INLINE inline __attribute__((always_inline))
#endif
