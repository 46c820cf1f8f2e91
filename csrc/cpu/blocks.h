// What the CPU kernels share: rows go through in blocks of kBlock floats that stay in the first-level cache; plain
// loops over a block are what the compiler vectorises.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "common/types.h"
#include "cpu/half.h"

namespace locas::cpu::LOCAS_ISA {

constexpr int kBlock = 256;
// Below this many elements a second thread costs more than it saves.
constexpr int64_t kParallelElements = 1 << 15;

// A block of T seen as floats: in place for float, through a small buffer for the half types.
template <class T>
struct Block {
  alignas(64) float buffer[std::is_same_v<T, float> ? 1 : kBlock];

  const float* load(const T* from, int n) {
    if constexpr (std::is_same_v<T, float>) {
      return from;
    } else {
      load_block(from, buffer, n);
      return buffer;
    }
  }
  float* begin_store(T* to) {
    if constexpr (std::is_same_v<T, float>) return to;
    else return buffer;
  }
  void end_store(T* to, int n) {
    if constexpr (!std::is_same_v<T, float>) store_block(buffer, to, n);
  }
};

// Calls f(first column, columns) for every block of a row.
template <class F>
void for_each_block_of_row(int64_t cols, F&& f) {
  for (int64_t col = 0; col < cols; col += kBlock) f(col, static_cast<int>(std::min<int64_t>(kBlock, cols - col)));
}

// Calls f(row, first column, columns) for every block, over the threads when there is enough to do.
template <class F>
void for_each_block(int64_t rows, int64_t cols, F&& f) {
  const int64_t blocks = (cols + kBlock - 1) / kBlock;
#pragma omp parallel for collapse(2) schedule(static) if (rows * cols >= kParallelElements)
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t block = 0; block < blocks; ++block)
      f(row, block * kBlock, static_cast<int>(std::min<int64_t>(kBlock, cols - block * kBlock)));
}

}  // namespace locas::cpu::LOCAS_ISA
