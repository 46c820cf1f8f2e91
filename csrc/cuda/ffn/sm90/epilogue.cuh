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

// The sums of a warp, added over the slices of a cluster in their order: slice i gets columns i * kCols on. It works once.
template <class Tile, int kSlices = Tile::kSlices>
struct SlicedSums {
  static constexpr int kCols = Tile::kN / kSlices, kRegisters = kCols / 2;
  static_assert(kCols % kSlabCols == 0);
  using Sums = float[Tile::kRowBlocks][kRegisters];
  using Vector = Elements<float, 4>;
  struct Shared {
    Vector received[kSlices - 1][Tile::kRowBlocks][kRegisters / 4][32];  // from the other slices
    uint64_t arrived;
  };

  Shared& shared;

  // Before the cluster's first barrier.
  LOCAS_DEVICE void initialise() {
    if (ptx::lane_index() != 0) return;
    ptx::mbarrier_init(&shared.arrived, 1);
    ptx::mbarrier_init_fence();
    ptx::mbarrier_arrive_expect(&shared.arrived, sizeof shared.received);
  }

  // one: 1, as in store_floats.
  LOCAS_DEVICE void add(const typename Tile::Sums& sums, float one, Sums& added) {
    const int own = ptx::cluster_rank(), lane = ptx::lane_index();
#pragma unroll
    for (int to = 0; to < kSlices; ++to) {
      if (to == own) continue;
#pragma unroll
      for (int row_block = 0; row_block < Tile::kRowBlocks; ++row_block)
#pragma unroll
        for (int i = 0; i < kRegisters; i += 4) {
          const float* from = sums[row_block] + to * kRegisters + i;
          ptx::store_async(to, &shared.received[own - (own > to)][row_block][i / 4][lane],
                           {one * from[0], one * from[1], one * from[2], one * from[3]}, &shared.arrived);
        }
    }
    ptx::mbarrier_wait_in_cluster(&shared.arrived, 0);
#pragma unroll
    for (int row_block = 0; row_block < Tile::kRowBlocks; ++row_block)
#pragma unroll
      for (int i = 0; i < kRegisters; i += 4) {
        float* sum = added[row_block] + i;
#pragma unroll
        for (int slice = 0; slice < kSlices; ++slice) {
          Vector term;
          if (slice == own) {
#pragma unroll
            for (int j = 0; j < 4; ++j) term.at[j] = sums[row_block][slice * kRegisters + i + j];
          } else {
            term = ptx::load(&shared.received[slice - (slice > own)][row_block][i / 4][lane]);
          }
#pragma unroll
          for (int j = 0; j < 4; ++j) sum[j] = slice == 0 ? term.at[j] : sum[j] + term.at[j];
        }
      }
  }
};

template <class Tile>
struct SlicedSums<Tile, 1> {
  struct Shared {};
};

// The pairs of a row block that this lane has of floats [rows, cols]; the first sum belongs at (row, col).
struct LanePairs {
  float* to;    // of the pair of the first 8 columns
  int columns;  // from there on

  // half: rows 0 to 7 of a warp's 16, or the others
  LOCAS_DEVICE LanePairs(float* floats, int64_t row, int64_t rows, int col, int cols, int half) {
    const int first_col = col + ptx::lane_index() % 4 * 2;
    const int64_t lane_row = row + warp_row() + half * 8 + ptx::lane_index() / 4;
    columns = lane_row < rows ? cols - first_col : 0;
    to = floats + lane_row * cols + first_col;
  }
  LOCAS_DEVICE Elements<float, 2>* at(int col) const { return reinterpret_cast<Elements<float, 2>*>(to + col); }
};

// The same sums as floats. one: 1, as a number that the compiler does not know: a store that reads a register of the sums
// itself makes ptxas serialise all wgmma (C7511).
template <class Tile>
LOCAS_DEVICE void store_floats(float* to, const typename Tile::Sums& sums, int64_t row, int64_t rows, int col, int cols,
                               float one) {
#pragma unroll
  for (int row_block = 0; row_block < Tile::kRowBlocks; ++row_block)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const LanePairs pairs(to, row + row_block * 64, rows, col, cols, half);
#pragma unroll
      for (int i = 0; i < Tile::kN; i += 8) {
        const float* sum = sums[row_block] + i / 2 + half * 2;
        if (i < pairs.columns) ptx::store(pairs.at(i), Elements<float, 2>{one * sum[0], one * sum[1]});
      }
    }
}

// The sums of a row block added to floats, 8 pairs at a time: one by one each would wait for its own load.
template <int count>
LOCAS_DEVICE void add_floats(const float (&sums)[count], float* floats, int64_t row, int64_t rows, int col, int cols) {
  constexpr int kPairs = 8;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const LanePairs pairs(floats, row, rows, col, cols, half);
#pragma unroll
    for (int first = 0; first < 2 * count; first += 8 * kPairs) {
      Elements<float, 2> before[kPairs];
#pragma unroll
      for (int i = 0; i < kPairs; ++i)
        if (first + 8 * i < pairs.columns) before[i] = ptx::load(pairs.at(first + 8 * i));
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
        const float* sum = sums + (first + 8 * i) / 2 + half * 2;
        if (first + 8 * i < pairs.columns)
          ptx::store(pairs.at(first + 8 * i), Elements<float, 2>{before[i].at[0] + sum[0], before[i].at[1] + sum[1]});
      }
    }
  }
}

}  // namespace locas::cuda::sm90
