// Matrices of a warp.
//
// ldmatrix_x4: four 8 x 8 matrices of 16-bit elements from shared memory. `row` of lane 8 i + j is row j of matrix i,
// 16 bytes, aligned. Lane l receives elements (l / 4, 2 (l % 4)) and the next one of matrix i in r[i]; _trans: of its
// transpose.
//
// stmatrix_x4: the way back, not transposed. movmatrix_trans: of one matrix in registers the transpose.
//
// mma_m16n8k16: c [16, 8] += a [16, 16] b [16, 8], T = bf16 or f16, sums in float. With row = l / 4, col = 2 (l % 4),
// each register two neighbours (low half first): a = (row, col), (row + 8, col), (row, col + 8), (row + 8, col + 8);
// b0, b1 = (k = col, n = row), (k = col + 8, n = row), neighbours along k; c = (row, col), (row, col + 1),
// (row + 8, col), (row + 8, col + 1). So ldmatrix of a row-major a, and of a b stored [n, k] ("_trans" of [k, n]), fit.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/ptx/device.cuh"
#include "cuda/ptx/memory.cuh"
#include "cuda/ptx/types.cuh"

#ifndef __CUDACC__
#include "simt/warp.h"
#endif

namespace locas::ptx {

#ifdef __CUDACC__
LOCAS_DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
LOCAS_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
LOCAS_DEVICE void stmatrix_x4(void* row, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)), "r"(r[0]),
               "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}
LOCAS_DEVICE uint32_t movmatrix_trans(uint32_t r) {
  uint32_t transposed;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(r));
  return transposed;
}
template <class T>
LOCAS_DEVICE void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<T, bf16>)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
#else
inline void ldmatrix_x4(uint32_t (&r)[4], const void* row) { simt::ldmatrix(r, row, false); }
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) { simt::ldmatrix(r, row, true); }
inline void stmatrix_x4(void* row, const uint32_t (&r)[4]) { simt::stmatrix(row, r); }
inline uint32_t movmatrix_trans(uint32_t r) { return simt::movmatrix_trans(r); }
template <class T>
void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  simt::mma_m16n8k16(std::is_same_v<T, bf16> ? simt::Half::bf16 : simt::Half::f16, c, a, b0, b1);
}
#endif

}  // namespace locas::ptx
