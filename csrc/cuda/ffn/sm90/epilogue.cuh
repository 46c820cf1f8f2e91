// The ways of a warpgroup's sums: to a matrix of a half type through shared memory and TMA, or to floats at once.
//
// A warp has 16 of the 64 rows of a row block. wgmma leaves in each lane pairs of neighbours, which ldmatrix and stmatrix
// take as they are: pair i of 32 columns belongs to row lane / 4 + i % 2 * 8 and column i / 2 * 8 + lane % 4 * 2.
#pragma once

#include "cuda/ffn/sm90/pipeline.cuh"
#include "cuda/ptx/convert.cuh"
#include "cuda/ptx/memory.cuh"
#include "cuda/ptx/mma.cuh"
#include "cuda/tensor_map.cuh"

namespace locas::cuda::sm90 {

// What a warp moves at a time: 16 rows of 64 or 128 bytes, their 16-byte pieces permuted as the swizzle of that span wants
// it. Of 64 bytes:
//
//      rows 0, 1   pieces 0 1 2 3          rows 4, 5   pieces 2 3 0 1          rows 8 to 15 as rows 0 to 7
//      rows 2, 3   pieces 1 0 3 2          rows 6, 7   pieces 3 2 1 0
template <class T, int kCols = 32>
struct alignas(1024) Slab {
  static_assert(kCols == 32 || kCols == 64);
  T at[16 * kCols];

  // What ldmatrix_x4 and stmatrix_x4 want of this lane for columns 16 * group to 16 * group + 15.
  LOCAS_DEVICE T* row(int group) {
    const int row = ptx::lane_index() % 16, piece = group * 2 + ptx::lane_index() / 16;
    return at + row * kCols + (piece ^ (kCols == 64 ? row % 8 : row / 2 % 4)) * kPiece;
  }
};
template <int cols>
constexpr Box slab_box{16, cols, 2 * cols};
constexpr int kSlabCols = 32;
constexpr Box kSlabBox = slab_box<kSlabCols>;

// A ring of slabs on their way out.
template <class T, int kSlabs>
struct Stores {
  struct Shared {
    Slab<T> slabs[kSlabs];
  };

  Shared& shared;
  int next = 0;

  // The same place of some matrices, always of as many: one wait and one fence for all. pairs_of(group, pairs) gives each
  // one's pairs of columns 16 * group to 16 * group + 15 of the slab.
  template <class PairsOf, class... Maps>
  LOCAS_DEVICE void store(int row, int col, PairsOf&& pairs_of, const Maps&... to) {
    constexpr int kCount = sizeof...(to);
    static_assert(kSlabs % kCount == 0);
    const int lane = ptx::lane_index();
    if (lane == 0) ptx::bulk_wait_read<kSlabs / kCount - 1>();
    ptx::sync_warp();
    Slab<T>* slabs = shared.slabs + next;
#pragma unroll
    for (int group = 0; group < kSlabCols / 16; ++group) {
      uint32_t pairs[kCount][4];
      pairs_of(group, pairs);
#pragma unroll
      for (int of = 0; of < kCount; ++of) ptx::stmatrix_x4(slabs[of].row(group), pairs[of]);
    }
    ptx::fence_async_shared();
    ptx::sync_warp();
    if (lane == 0) {
      (ptx::bulk_tensor_store(to, col, row, (slabs++)->at), ...);
      ptx::bulk_commit();
    }
    next = next + kCount == kSlabs ? 0 : next + kCount;
  }

  // Shared memory must outlive the stores that read it.
  LOCAS_DEVICE void finish() {
    if (ptx::lane_index() == 0) ptx::bulk_wait_read<0>();
  }
};

// The first row of this warp in a row block.
LOCAS_DEVICE int warp_row() { return ptx::warp_index() % 4 * 16; }

// Rounded sums, plus a bias that may be null, to a matrix of `cols` columns; the first sum belongs at (row, col).
template <class T, int kSlabs, int row_blocks, int registers>
LOCAS_DEVICE void store_rounded(Stores<T, kSlabs>& stores, const ptx::TensorMap& to,
                                const float (&sums)[row_blocks][registers], int row, int col, int cols, const T* bias) {
#pragma unroll
  for (int row_block = 0; row_block < row_blocks; ++row_block)
#pragma unroll
    for (int slab = 0; slab < 2 * registers; slab += kSlabCols) {
      if (col + slab >= cols) break;
      const auto pairs_of = [&](int group, uint32_t (&pairs)[1][4]) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int at = slab / 2 + 8 * group + 2 * i;
          const int lane_col = col + slab + 16 * group + i / 2 * 8 + ptx::lane_index() % 4 * 2;
          float first = sums[row_block][at], second = sums[row_block][at + 1];
          if (bias && lane_col < cols) {
            const auto pair = ptx::load(reinterpret_cast<const Elements<T, 2>*>(bias + lane_col));
            first += ptx::to_float(pair.at[0]);
            second += ptx::to_float(pair.at[1]);
          }
          pairs[0][i] = ptx::pack<T>(first, second);
        }
      };
      stores.store(row + row_block * 64 + warp_row(), col + slab, pairs_of, to);
    }
}

// The sums of a row block, stored as floats [rows, cols] or added to them; the first sum belongs at (row, col). one: 1, as
// a number that the compiler does not know: what reads a register of the sums itself makes ptxas serialise all wgmma
// (C7511).
template <bool adds, int count>
LOCAS_DEVICE void put_floats(float* floats, const float (&sums)[count], int64_t row, int64_t rows, int col, int cols,
                             float one) {
  const int first_col = col + ptx::lane_index() % 4 * 2;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t lane_row = row + warp_row() + half * 8 + ptx::lane_index() / 4;
    const int columns = lane_row < rows ? cols - first_col : 0;
    float* to = floats + lane_row * cols + first_col;
#pragma unroll
    for (int i = 0; i < 2 * count; i += 8) {
      const float first = one * sums[i / 2 + half * 2], second = one * sums[i / 2 + half * 2 + 1];
      if (i >= columns) continue;
      if constexpr (adds) ptx::add(to + i, first, second);
      else ptx::store(reinterpret_cast<Elements<float, 2>*>(to + i), {first, second});
    }
  }
}

}  // namespace locas::cuda::sm90
