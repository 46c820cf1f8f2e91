// Kernels over rows that are read once, held in registers and written once.
//
//      rows [rows, cols]    [ l0 | l1 | ... | l0 | l1 | ... ]    kLanes threads own a row. A thread holds kVectors times
//                                                                8 columns that lie kLanes * 8 apart, in 16-byte
//                                                                accesses; all loads are under way before the sums.
//
// Up to 256 columns a row belongs to 16 or 32 lanes of a warp, and a CTA has several rows; above, a CTA owns a row.
// Rows that are no whole vectors, or not aligned, and very wide ones go through a strided loop, several times.
//
// Sums have a fixed order: results repeat bit for bit.
#pragma once

#include "cuda/common/block_sum.cuh"
#include "cuda/common/elements.cuh"
#include "cuda/launch.cuh"
#include "cuda/ptx/convert.cuh"
#include "cuda/ptx/memory.cuh"
#include "cuda/ptx/thread.cuh"

namespace locas::cuda {

// What kLanes threads hold of a row, and where.
template <int kLanes, int kVectors>
struct Row {
  static constexpr int threads = kLanes < 128 ? 128 : kLanes, rows_per_block = threads / kLanes;
  struct Shared {
    WarpSums<float, threads / 32> sums[2];
  };
  using Values = float[kVectors][kVector];

  const int64_t index, cols;
  const bool exists;

  LOCAS_DEVICE Row(const Matrix& m)
      : index(static_cast<int64_t>(ptx::block_index()) * rows_per_block + ptx::thread_index() / kLanes), cols(m.cols),
        exists(index < m.rows) {}

  // Calls f(k, col) for each vector of this thread that the row has.
  template <class F>
  LOCAS_DEVICE void for_each_vector(F&& f) const {
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      const int64_t col = (k * kLanes + ptx::thread_index() % kLanes) * kVector;
      if (exists && col < cols) f(k, col);
    }
  }
  template <class T>
  LOCAS_DEVICE void load(const Matrix& m, Values& to) const {
    for_each_vector([&](int k, int64_t col) { load_piece(m.at<const T>(index, col), to[k]); });
  }
  template <class T>
  LOCAS_DEVICE void load(const void* vector, Values& to) const {
    for_each_vector([&](int k, int64_t col) { load_piece(static_cast<const T*>(vector) + col, to[k]); });
  }
  template <class T>
  LOCAS_DEVICE void store(const Values& from, const Matrix& m) const {
    for_each_vector([&](int k, int64_t col) { store_piece(from[k], m.at<T>(index, col)); });
  }
  // Over the row; the first and the second sum of a launch.
  template <int which = 0>
  static LOCAS_DEVICE float sum(float value, unsigned char* shared) {
    if constexpr (kLanes <= 32) return lane_sum<kLanes>(value);
    else return block_sum(value, reinterpret_cast<Shared*>(shared)->sums[which]);
  }
  LOCAS_DEVICE bool is_first_thread() const { return exists && ptx::thread_index() % kLanes == 0; }
};

// ---- Any width: a CTA owns a row, its threads stride over it -----------------------------------------------------
constexpr int kStridedThreads = 256;
struct StridedShared {
  WarpSums<float, kStridedThreads / 32> sums[2];
};
template <int which = 0>
LOCAS_DEVICE float strided_sum(float value, unsigned char* shared) {
  return block_sum(value, reinterpret_cast<StridedShared*>(shared)->sums[which]);
}

template <class F>
LOCAS_DEVICE void for_each_column(int64_t cols, F&& f) {
  for (int64_t col = ptx::thread_index(); col < cols; col += kStridedThreads) f(col);
}

template <class T>
LOCAS_DEVICE float load_float(const T* from) {
  return ptx::to_float(ptx::load(from));
}

// ---- Launches ----------------------------------------------------------------------------------------------------
template <template <class, int, int> class Kernel, class T, int kLanes, int kVectors>
void launch_rows(int64_t rows, Queue queue, const auto& p) {
  using Rows = Row<kLanes, kVectors>;
  launch<Kernel<T, kLanes, kVectors>>(divide_up(rows, Rows::rows_per_block), sizeof(typename Rows::Shared), queue, p);
}

// The instance that has room for a row, with few threads idle; AnyWidth where none has or `vectors` says no.
template <template <class, int, int> class Kernel, class AnyWidth, class T>
void launch_for_width(const Matrix& x, bool vectors, Queue queue, const auto& p) {
  const int64_t rows = x.rows, cols = x.cols;
  if (!vectors || cols % kVector != 0 || cols > 8192) launch<AnyWidth>(rows, sizeof(StridedShared), queue, p);
  else if (cols <= 128) launch_rows<Kernel, T, 16, 1>(rows, queue, p);
  else if (cols <= 256) launch_rows<Kernel, T, 32, 1>(rows, queue, p);
  else if (cols <= 1024) launch_rows<Kernel, T, 128, 1>(rows, queue, p);
  else if (cols <= 2048) launch_rows<Kernel, T, 256, 1>(rows, queue, p);
  else if (cols <= 4096) launch_rows<Kernel, T, 256, 2>(rows, queue, p);
  else launch_rows<Kernel, T, 512, 2>(rows, queue, p);
}

}  // namespace locas::cuda
