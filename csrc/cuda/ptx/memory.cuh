// load, store: one access as wide as T (1, 2, 4, 8 or 16 bytes) of global or shared memory, aligned to its size.
// load_once: the same for global data that the grid reads once, such as weights: read-only path, not kept in L1.
// add: two neighbours in global memory, without waiting for what they were. One thread of the grid adds to an address: of
// several, their order would decide the rounding. From sm_90 on; subnormal floats count as 0.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/ptx/device.cuh"

namespace locas::ptx {

#ifdef __CUDACC__
template <int bytes>
struct Word;
// clang-format off
template <> struct Word<1> { using type = uint8_t; };
template <> struct Word<2> { using type = uint16_t; };
template <> struct Word<4> { using type = uint32_t; };
template <> struct Word<8> { using type = uint2; };
template <> struct Word<16> { using type = uint4; };
// clang-format on

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
        : "=r"(word.x), "=r"(word.y), "=r"(word.z), "=r"(word.w)
        : "l"(__cvta_generic_to_global(from)));
  else if constexpr (sizeof(T) == 8)
    asm("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];"
        : "=r"(word.x), "=r"(word.y)
        : "l"(__cvta_generic_to_global(from)));
  else if constexpr (sizeof(T) == 4)
    asm("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(word) : "l"(__cvta_generic_to_global(from)));
  else return load(from);
  return __builtin_bit_cast(T, word);
}
LOCAS_DEVICE void add(float* to, float first, float second) {
  asm volatile("red.global.add.v2.f32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(to)), "f"(first), "f"(second)
               : "memory");
}
// The address that PTX wants where an instruction takes shared memory.
LOCAS_DEVICE uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
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
inline void add(float* to, float first, float second) {
  simt::touch(to, 2 * sizeof(float), simt::Access::write, simt::Space::global);
  to[0] += first;
  to[1] += second;
}
#endif

}  // namespace locas::ptx
