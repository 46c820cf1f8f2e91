// Tensor maps of the matrices in launch parameters: what bulk_tensor_load and bulk_tensor_store move boxes by.
#pragma once

#include <stdexcept>
#include <string>
#include <type_traits>

#include "common/types.h"
#include "cuda/launch.cuh"
#include "cuda/ptx/bulk_tensor.cuh"
#include "cuda/ptx/types.cuh"

namespace locas::cuda {

struct Box {
  int rows, cols;  // the columns of a swizzled box fill the span of the swizzle
  int swizzle_bytes;
};

// Bytes of 128: what wgmma reads. A box of 64 columns of a half type.
constexpr Box operand_box(int rows) { return {rows, 64, 128}; }

#ifdef __CUDACC__

// cuTensorMapEncodeTiled, asked of the driver by its version, so that nothing links libcuda.
inline auto tensor_map_encoder() {
  static const auto encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found),
          "cudaGetDriverEntryPointByVersion");
    if (found != cudaDriverEntryPointSuccess || !function)
      throw std::runtime_error("the CUDA driver has no cuTensorMapEncodeTiled; it is older than CUDA 12.0");
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  }();
  return encode;
}

template <class T>
ptx::TensorMap tensor_map(const Matrix& matrix, Box box) {
  static_assert(sizeof(T) == 2);
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(matrix.cols), static_cast<cuuint64_t>(matrix.rows)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(matrix.stride) * sizeof(T)};
  const cuuint32_t box_sizes[] = {static_cast<cuuint32_t>(box.cols), static_cast<cuuint32_t>(box.rows)};
  const cuuint32_t steps[] = {1, 1};
  const auto swizzle = box.swizzle_bytes == 128  ? CU_TENSOR_MAP_SWIZZLE_128B
                       : box.swizzle_bytes == 64 ? CU_TENSOR_MAP_SWIZZLE_64B
                                                 : CU_TENSOR_MAP_SWIZZLE_NONE;
  alignas(64) ptx::TensorMap map;
  const CUresult result = tensor_map_encoder()(
      &map, std::is_same_v<T, bf16> ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2,
      matrix.data, sizes, strides, box_sizes, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS)
    throw std::runtime_error("no tensor map for a matrix of " + std::to_string(matrix.rows) + " x " +
                             std::to_string(matrix.cols) + ", rows " + std::to_string(matrix.stride) +
                             " elements apart: error " + std::to_string(result) + " of the CUDA driver");
  return map;
}

// Whether the driver can.
inline bool has_tensor_maps() {
  static const bool has = [] {
    try {
      return tensor_map_encoder() != nullptr;
    } catch (const std::runtime_error&) {
      return false;
    }
  }();
  return has;
}

#else

inline bool has_tensor_maps() { return true; }

template <class T>
ptx::TensorMap tensor_map(const Matrix& matrix, Box box) {
  return {matrix.data, matrix.rows, matrix.cols, matrix.stride, sizeof(T), box.rows, box.cols, box.swizzle_bytes};
}

#endif

// Of a matrix that may not be there: no box of it is moved then.
template <class T>
ptx::TensorMap map_or_none(const Matrix& matrix, Box box) {
  return matrix.data && matrix.rows > 0 && matrix.cols > 0 ? tensor_map<T>(matrix, box) : ptx::TensorMap{};
}

// Some columns of a matrix.
template <class T>
Matrix columns_of(const Matrix& matrix, int64_t first, int64_t count) {
  return {matrix.data ? static_cast<T*>(matrix.data) + first : nullptr, matrix.rows, count, matrix.stride};
}

}  // namespace locas::cuda
