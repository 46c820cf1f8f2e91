// Every GPU instruction that C++ has no word for, each twice: for the device as PTX or an intrinsic, for the host as a call
// of the SIMT runner (csrc/simt), which does the same and checks that it was allowed. The only file that sees either; kernels
// are written in these functions and plain C++. docs/kernels.md says how.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define LOCAS_DEVICE __device__ __forceinline__
#else
#include "simt/numbers.h"
#include "simt/runner.h"
#include "simt/warp.h"
#define LOCAS_DEVICE inline
#endif

namespace locas {

// Storage types: what lies in memory. All arithmetic is in float.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

struct alignas(16) Vec16 {
  uint32_t word[4];
};

namespace ptx {

// ---- Where this thread is. All grids and blocks are one-dimensional. ------------------------------------------
#ifdef __CUDACC__
LOCAS_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
LOCAS_DEVICE int block_index() { return static_cast<int>(blockIdx.x); }
LOCAS_DEVICE int block_count() { return static_cast<int>(gridDim.x); }
#else
inline int thread_index() { return simt::thread_index(); }
inline int block_index() { return simt::block_index(); }
inline int block_count() { return simt::block_count(); }
#endif
LOCAS_DEVICE int lane_index() { return thread_index() % 32; }
LOCAS_DEVICE int warp_index() { return thread_index() / 32; }

// ---- Memory ---------------------------------------------------------------------------------------------------
// load, store: one access as wide as T (1, 2, 4, 8 or 16 bytes) of global or shared memory, aligned to its size.
// load_once: the same for global data that the grid reads once, such as weights: read-only path, not kept in L1.
#ifdef __CUDACC__
template <int bytes>
struct Word;
template <> struct Word<1> { using type = uint8_t; };
template <> struct Word<2> { using type = uint16_t; };
template <> struct Word<4> { using type = uint32_t; };
template <> struct Word<8> { using type = uint2; };
template <> struct Word<16> { using type = uint4; };

template <class T>
LOCAS_DEVICE T load(const T* from) {
  return __builtin_bit_cast(T, *reinterpret_cast<const typename Word<sizeof(T)>::type*>(from));
}
template <class T>
LOCAS_DEVICE void store(T* to, T value) {
  using Type = typename Word<sizeof(T)>::type;
  *reinterpret_cast<Type*>(to) = __builtin_bit_cast(Type, value);
}
template <class T>
LOCAS_DEVICE T load_once(const T* from) {
  typename Word<sizeof(T)>::type word;
  if constexpr (sizeof(T) == 16)
    asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(word.x), "=r"(word.y), "=r"(word.z), "=r"(word.w) : "l"(__cvta_generic_to_global(from)));
  else if constexpr (sizeof(T) == 8)
    asm("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];"
                 : "=r"(word.x), "=r"(word.y) : "l"(__cvta_generic_to_global(from)));
  else if constexpr (sizeof(T) == 4)
    asm("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(word) : "l"(__cvta_generic_to_global(from)));
  else
    return load(from);
  return __builtin_bit_cast(T, word);
}
#else
template <class T>
T load(const T* from) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 16 && (sizeof(T) & (sizeof(T) - 1)) == 0);
  simt::touch(from, sizeof(T), simt::Access::read);
  return *from;
}
template <class T>
void store(T* to, T value) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 16 && (sizeof(T) & (sizeof(T) - 1)) == 0);
  simt::touch(to, sizeof(T), simt::Access::write);
  *to = value;
}
template <class T>
T load_once(const T* from) {
  simt::touch(from, sizeof(T), simt::Access::read_once, simt::Space::global);
  return *from;
}
#endif

// ---- Barriers -------------------------------------------------------------------------------------------------
// sync_threads_or: whether the predicate held in any thread of the block.
// named_barrier: the first `threads` threads, whole warps, that come to barrier 1 <= id < 16 wait for each other.
#ifdef __CUDACC__
LOCAS_DEVICE void sync_threads() { __syncthreads(); }
LOCAS_DEVICE bool sync_threads_or(bool predicate) { return __syncthreads_or(predicate) != 0; }
LOCAS_DEVICE void sync_warp() { __syncwarp(); }
LOCAS_DEVICE void named_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
#else
inline void sync_threads() { simt::sync_threads(); }
inline bool sync_threads_or(bool predicate) { return simt::sync_threads(predicate); }
inline void sync_warp() { simt::sync_warp(); }
inline void named_barrier(int id, int threads) { simt::barrier("named_barrier", id, threads); }
#endif

// ---- Shuffles: the value of another lane of the warp, by lane ^ mask or lane + delta ---------------------------
#ifdef __CUDACC__
LOCAS_DEVICE float shuffle_xor(float value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }
LOCAS_DEVICE double shuffle_xor(double value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }
LOCAS_DEVICE float shuffle_down(float value, int delta) { return __shfl_down_sync(0xffffffffu, value, delta); }
LOCAS_DEVICE float shuffle(float value, int lane) { return __shfl_sync(0xffffffffu, value, lane); }
#else
inline float shuffle(float value, int lane) { return simt::shuffle("shuffle", value, lane % 32); }
inline float shuffle_xor(float value, int mask) { return simt::shuffle("shuffle_xor", value, lane_index() ^ mask); }
inline double shuffle_xor(double value, int mask) { return simt::shuffle("shuffle_xor", value, lane_index() ^ mask); }
inline float shuffle_down(float value, int delta) {
  return simt::shuffle("shuffle_down", value, lane_index() + delta < 32 ? lane_index() + delta : lane_index());
}
#endif

// ---- cp.async: 16 bytes from global to shared memory, past the registers ---------------------------------------
// Zeros arrive where not valid, and global is not touched. A group is what a thread issued since its last commit; wait
// returns when at most `pending` of the thread's own groups are under way. Others see the bytes after a barrier.
#ifdef __CUDACC__
LOCAS_DEVICE uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}
LOCAS_DEVICE void cp_async_16(void* shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
               "l"(__cvta_generic_to_global(global)), "r"(valid ? 16 : 0) : "memory");
}
LOCAS_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int pending>
LOCAS_DEVICE void cp_async_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory"); }
#else
inline void cp_async_16(void* shared, const void* global, bool valid) { simt::copy_async(shared, global, valid); }
inline void cp_async_commit() { simt::commit_copies(); }
template <int pending>
void cp_async_wait() { simt::wait_for_copies(pending); }
#endif

// ---- Matrices -------------------------------------------------------------------------------------------------
// ldmatrix: 8 x 8 matrices of 16-bit elements from shared memory. `row` of lane 8 i + j is row j of matrix i, 16 bytes,
// aligned. Lane l receives elements (l / 4, 2 (l % 4)) and the next one of matrix i in r[i]; _trans: of its transpose.
// mma_m16n8k16: c [16, 8] += a [16, 16] b [16, 8], T = bf16 or f16, sums in float. With row = l / 4, col = 2 (l % 4), each
// register two neighbours (low half first): a = (row, col), (row + 8, col), (row, col + 8), (row + 8, col + 8);
// b0, b1 = (k = col, n = row), (k = col + 8, n = row), neighbours along k; c = (row, col), (row, col + 1), (row + 8, col),
// (row + 8, col + 1). So ldmatrix_x4 of a row-major a, and ldmatrix_x2 of a b stored [n, k] ("_trans" of [k, n]), fit.
#ifdef __CUDACC__
LOCAS_DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}
LOCAS_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}
LOCAS_DEVICE void ldmatrix_x2(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1]) : "r"(shared_address(row)) : "memory");
}
LOCAS_DEVICE void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1]) : "r"(shared_address(row)) : "memory");
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
inline void ldmatrix_x2(uint32_t (&r)[2], const void* row) { simt::ldmatrix(r, row, false); }
inline void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row) { simt::ldmatrix(r, row, true); }
template <class T>
void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  simt::mma_m16n8k16(std::is_same_v<T, bf16> ? simt::Half::bf16 : simt::Half::f16, c, a, b0, b1);
}
#endif

// ---- Numbers: rounded to nearest, ties to even; NaN stays NaN --------------------------------------------------
#ifdef __CUDACC__
LOCAS_DEVICE float to_float(bf16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
LOCAS_DEVICE float to_float(f16 x) { return __half2float(__ushort_as_half(x.bits)); }
template <class T>
LOCAS_DEVICE T from_float(float x) {
  if constexpr (std::is_same_v<T, bf16>) return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
  else if constexpr (std::is_same_v<T, f16>) return {__half_as_ushort(__float2half_rn(x))};
  else return x;
}
#else
inline float to_float(bf16 x) { return simt::bf16_to_float(x.bits); }
inline float to_float(f16 x) { return simt::f16_to_float(x.bits); }
template <class T>
T from_float(float x) {
  if constexpr (std::is_same_v<T, bf16>) return {simt::float_to_bf16(x)};
  else if constexpr (std::is_same_v<T, f16>) return {simt::float_to_f16(x)};
  else return x;
}
#endif
LOCAS_DEVICE float to_float(float x) { return x; }

// Two neighbouring elements in one register, as mma wants them.
template <class T>
LOCAS_DEVICE uint32_t pack(float low, float high) {
#ifdef __CUDACC__
  uint32_t both;
  if constexpr (std::is_same_v<T, bf16>) asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  else asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
#else
  return from_float<T>(low).bits | static_cast<uint32_t>(from_float<T>(high).bits) << 16;
#endif
}
template <class T>
LOCAS_DEVICE void unpack(uint32_t both, float& low, float& high) {
  low = to_float(T{static_cast<uint16_t>(both)});
  high = to_float(T{static_cast<uint16_t>(both >> 16)});
}

// ---- mbarrier and bulk copies (sm_90) ---------------------------------------------------------------------------
// An mbarrier counts the arrivals of a phase, and the bytes of copies announced by arrive_expect. wait(parity) returns when
// the phase of that parity is complete; the first phase has parity 0, so waiting for 1 on a fresh mbarrier returns at once.
// One thread initialises, calls fence_mbarrier_init, and a barrier tells the others.
// bulk_copy_to_shared: addresses and size are multiples of 16; its bytes count on the mbarrier.
#ifdef __CUDACC__
LOCAS_DEVICE void mbarrier_init(uint64_t* barrier, int count) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
}
LOCAS_DEVICE void mbarrier_arrive(uint64_t* barrier) {
  asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.shared.b64 state, [%0];\n}" ::"r"(shared_address(barrier)) : "memory");
}
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
LOCAS_DEVICE void fence_mbarrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
LOCAS_DEVICE void mbarrier_arrive_expect(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
}
LOCAS_DEVICE void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\nAGAIN:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra AGAIN;\n}" ::"r"(
          shared_address(barrier)), "r"(parity) : "memory");
}
LOCAS_DEVICE void bulk_copy_to_shared(void* shared, const void* global, uint32_t bytes, uint64_t* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(shared)), "l"(__cvta_generic_to_global(global)), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
}
#endif
#else
inline void mbarrier_init(uint64_t* barrier, int count) { simt::mbarrier_init(barrier, count); }
inline void mbarrier_arrive(uint64_t* barrier) { simt::mbarrier_arrive(barrier, 0); }
inline void fence_mbarrier_init() {}
inline void mbarrier_arrive_expect(uint64_t* barrier, uint32_t bytes) { simt::mbarrier_arrive(barrier, bytes); }
inline void mbarrier_wait(uint64_t* barrier, uint32_t parity) { simt::mbarrier_wait(barrier, parity); }
inline void bulk_copy_to_shared(void* shared, const void* global, uint32_t bytes, uint64_t* barrier) {
  simt::bulk_copy(shared, global, bytes, barrier);
}
#endif

// ---- Programmatic dependent launch (sm_90; before it a kernel starts when the one before it has ended) -----------
// grid_dependency_wait returns when the kernels before this one are complete and their writes visible;
// launch_dependents allows the next kernel to start.
#ifdef __CUDACC__
LOCAS_DEVICE void grid_dependency_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
LOCAS_DEVICE void launch_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
#else
inline void grid_dependency_wait() {}
inline void launch_dependents() {}
#endif

}  // namespace ptx
}  // namespace locas
