// Products of a warpgroup: four warps that do everything here together.
//
// wgmma: sums [64, n] += A [64, 16] B [16, n] on the tensor cores, T = bf16 or f16, both operands in shared memory with a
// swizzle of 128 bytes, as bulk_tensor_load writes a box of 64 columns. With accumulate = false the sums begin at 0.
// Thread t's register i is the sum of row t / 32 * 16 + t % 32 / 4 + i / 2 % 2 * 8 and column i / 4 * 8 + t % 4 * 2 + i % 2.
//
// It runs in the background. wgmma_fence stands before the first of a batch, wgmma_commit behind the last;
// wgmma_wait<n> returns when at most n batches are under way. Until then nobody may touch the sums, nor write to the
// operands.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/ptx/device.cuh"
#include "cuda/ptx/memory.cuh"
#include "cuda/ptx/types.cuh"

#ifndef __CUDACC__
#include "simt/wgmma.h"
#endif

namespace locas::ptx {

// How an operand lies in shared memory. k: rows (of A) or columns (of B) of 64 k, 128 bytes each. mn: 64 rows of 64
// neighbours along m or n, one row a k; the next 64 neighbours follow behind.
enum class Major { k, mn };

// What wgmma reads its operand by. An atom is 8 rows of 128 bytes. K-major: atoms follow each other along m or n.
// MN-major: along k, and `slab_bytes` is the distance to the next 64 along m or n.
template <Major major>
LOCAS_DEVICE uint64_t operand_descriptor(const void* operand, int slab_bytes = 8192) {
  constexpr uint64_t kAtomBytes = 1024, kSwizzle128 = 1;
  const uint64_t leading = major == Major::k ? 16 : slab_bytes;  // unused where K-major
#ifdef __CUDACC__
  const uint32_t address = shared_address(operand);
#else
  const uint32_t address = simt::shared_offset(operand);
#endif
  return (address & 0x3ffff) >> 4 | leading >> 4 << 16 | kAtomBytes >> 4 << 32 | kSwizzle128 << 62;
}

// From the descriptor of one k16 to that of the next.
template <Major major>
constexpr uint64_t kNextK16 = (major == Major::k ? 32 : 2048) >> 4;

#ifdef __CUDACC__
LOCAS_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
LOCAS_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int pending>
LOCAS_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}
// The compiler moves no use of the sums across this line.
template <int count>
LOCAS_DEVICE void hold(float (&sums)[count]) {
#pragma unroll
  for (int i = 0; i < count; ++i) asm volatile("" : "+f"(sums[i])::"memory");
}

// clang-format off
#define LOCAS_SUMS_8(i) "+f"(sums[i]), "+f"(sums[i + 1]), "+f"(sums[i + 2]), "+f"(sums[i + 3]), "+f"(sums[i + 4]), \
    "+f"(sums[i + 5]), "+f"(sums[i + 6]), "+f"(sums[i + 7])
#define LOCAS_SUMS_16(i) LOCAS_SUMS_8(i), LOCAS_SUMS_8(i + 8)
#define LOCAS_SUMS_32(i) LOCAS_SUMS_16(i), LOCAS_SUMS_16(i + 16)
#define LOCAS_SUMS_64(i) LOCAS_SUMS_32(i), LOCAS_SUMS_32(i + 32)
#define LOCAS_NAMES_32 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15" ", " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define LOCAS_NAMES_48 LOCAS_NAMES_32 ", " \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define LOCAS_NAMES_64 LOCAS_NAMES_48 ", " \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define LOCAS_NAMES_96 LOCAS_NAMES_64 ", " \
    "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79" ", " \
    "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define LOCAS_NAMES_128 LOCAS_NAMES_96 ", " \
    "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111" ", " \
    "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define LOCAS_WGMMA_OF(n, type, names, a_at, b_at, accumulate_at, a_major_at, b_major_at, ...)                  \
  asm volatile("{\n.reg .pred accumulate;\nsetp.ne.b32 accumulate, " accumulate_at ", 0;\n"                  \
               "wgmma.mma_async.sync.aligned.m64n" n "k16.f32." type "." type " {" names "}, " a_at ", " b_at  \
               ", accumulate, 1, 1, " a_major_at ", " b_major_at ";\n}"                                       \
               : __VA_ARGS__                                                                                  \
               : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)), "n"(a_mn), "n"(b_mn))
#define LOCAS_WGMMA(n, ...)                                        \
  if constexpr (is_bf16) LOCAS_WGMMA_OF(n, "bf16", __VA_ARGS__);   \
  else LOCAS_WGMMA_OF(n, "f16", __VA_ARGS__)

template <class T, int n, Major a_major, Major b_major>
LOCAS_DEVICE void wgmma(float (&sums)[n / 2], uint64_t a, uint64_t b, bool accumulate) {
  constexpr int a_mn = a_major == Major::mn, b_mn = b_major == Major::mn;
  constexpr bool is_bf16 = std::is_same_v<T, bf16>;
  if constexpr (n == 64) {
    LOCAS_WGMMA("64", LOCAS_NAMES_32, "%32", "%33", "%34", "%35", "%36", LOCAS_SUMS_32(0));
  } else if constexpr (n == 96) {
    LOCAS_WGMMA("96", LOCAS_NAMES_48, "%48", "%49", "%50", "%51", "%52", LOCAS_SUMS_32(0), LOCAS_SUMS_16(32));
  } else if constexpr (n == 128) {
    LOCAS_WGMMA("128", LOCAS_NAMES_64, "%64", "%65", "%66", "%67", "%68", LOCAS_SUMS_64(0));
  } else if constexpr (n == 192) {
    LOCAS_WGMMA("192", LOCAS_NAMES_96, "%96", "%97", "%98", "%99", "%100", LOCAS_SUMS_64(0), LOCAS_SUMS_32(64));
  } else if constexpr (n == 256) {
    LOCAS_WGMMA("256", LOCAS_NAMES_128, "%128", "%129", "%130", "%131", "%132", LOCAS_SUMS_64(0), LOCAS_SUMS_64(64));
  } else {
    static_assert(n == 64, "no instance of this width");
  }
}
#undef LOCAS_WGMMA
#undef LOCAS_WGMMA_OF
#undef LOCAS_NAMES_32
#undef LOCAS_NAMES_48
#undef LOCAS_NAMES_64
#undef LOCAS_NAMES_96
#undef LOCAS_NAMES_128
#undef LOCAS_SUMS_64
#undef LOCAS_SUMS_32
#undef LOCAS_SUMS_16
#undef LOCAS_SUMS_8
// clang-format on
#else
inline void wgmma_fence() { simt::wgmma_fence(); }
inline void wgmma_commit() { simt::wgmma_commit(); }
template <int pending>
void wgmma_wait() {
  simt::wgmma_wait(pending);
}
template <int count>
void hold(float (&)[count]) {}
template <class T, int n, Major a_major, Major b_major>
void wgmma(float (&sums)[n / 2], uint64_t a, uint64_t b, bool accumulate) {
  simt::wgmma({std::is_same_v<T, bf16> ? simt::Half::bf16 : simt::Half::f16, n, a, b, a_major == Major::mn,
               b_major == Major::mn, accumulate, sums});
}
#endif

}  // namespace locas::ptx
