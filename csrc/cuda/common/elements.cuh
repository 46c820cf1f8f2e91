// Storage types and vectors of them: what the kernels share.
#pragma once

#include <cstdint>

#include "common/ffn_params.h"
#include "common/types.h"
#include "cuda/ptx/convert.cuh"
#include "cuda/ptx/memory.cuh"
#include "cuda/ptx/types.cuh"

namespace locas::cuda {

constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// As it comes back from memory.
template <class T>
LOCAS_DEVICE float rounded(float x) {
  return ptx::to_float(ptx::from_float<T>(x));
}

// Neighbouring elements that move in one access.
template <class T, int count>
struct alignas(count * sizeof(T)) Elements {
  T at[count];
};

// What a thread of an elementwise kernel takes: one 16-byte access for the half types and two for float.
constexpr int kVector = 8;

// Loads `count` (1..kVector) elements; whole aligned vectors in 16-byte pieces.
template <class T>
LOCAS_DEVICE void load_vector(const T* from, float (&to)[kVector], int count, bool aligned) {
  constexpr int kPiece = 16 / sizeof(T);
  if (count == kVector && aligned) {
#pragma unroll
    for (int i = 0; i < kVector; i += kPiece) {
      const auto piece = ptx::load(reinterpret_cast<const Elements<T, kPiece>*>(from + i));
#pragma unroll
      for (int j = 0; j < kPiece; ++j) to[i + j] = ptx::to_float(piece.at[j]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kVector; ++i) to[i] = i < count ? ptx::to_float(ptx::load(from + i)) : 0.0f;
  }
}

template <class T>
LOCAS_DEVICE void store_vector(const float (&from)[kVector], T* to, int count, bool aligned) {
  constexpr int kPiece = 16 / sizeof(T);
  if (count == kVector && aligned) {
#pragma unroll
    for (int i = 0; i < kVector; i += kPiece) {
      Elements<T, kPiece> piece;
#pragma unroll
      for (int j = 0; j < kPiece; ++j) piece.at[j] = ptx::from_float<T>(from[i + j]);
      ptx::store(reinterpret_cast<Elements<T, kPiece>*>(to + i), piece);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kVector; ++i)
      if (i < count) ptx::store(to + i, ptx::from_float<T>(from[i]));
  }
}

constexpr int kPiece = kVector;  // 16 bytes of a half type
static_assert(kPiece == kPieceElements, "r is padded to it");

// Eight neighbouring elements, 16-byte aligned, of global or shared memory.
template <class T>
LOCAS_DEVICE void load_piece(const T* from, float (&to)[kPiece]) {
  load_vector(from, to, kPiece, true);
}
template <class T>
LOCAS_DEVICE void store_piece(const float (&from)[kPiece], T* to) {
  store_vector(from, to, kPiece, true);
}

// Whether every row of m takes 16-byte accesses; a matrix that is not there does.
template <class T>
bool is_aligned(const Matrix& m) {
  return m.data == nullptr || (reinterpret_cast<uintptr_t>(m.data) % 16 == 0 && m.stride * sizeof(T) % 16 == 0);
}

// The same of a vector, such as a norm's weight.
inline bool is_aligned(const void* vector) { return reinterpret_cast<uintptr_t>(vector) % 16 == 0; }

// with_type for the fused kernels, which take the half types only.
template <class F>
auto with_half_type(DType dtype, F&& f) {
  if (dtype == DType::bf16) return f.template operator()<bf16>();
  return f.template operator()<f16>();
}

}  // namespace locas::cuda
