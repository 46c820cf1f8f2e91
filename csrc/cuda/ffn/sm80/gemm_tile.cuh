// The tile product that K1-K4 (forward.cu, backward.cu) share: sums[kM, kN] = A B, with mma.sync on operands that
// cp.async brings to shared memory.
//
//      shared memory: kStages stages, each with the A and the B tile of one K-block of 64
//
//        Major::k, as x or W_gate          Major::mn, as W_down read along its columns
//        mn [ 64 k, 128 bytes ]            k [ kM or kN elements ]
//           [        ...      ]              [        ...        ]
//
//      sums: warps form a kWarpsM x kWarpsN grid; each owns kWarpM x kWarpN of the tile in m16n8 fragments
//
// The 16-byte pieces of a row are permuted (`swizzled`), so that the 8 rows that one ldmatrix reads lie in 8 different
// groups of banks. Whatever lies outside a matrix reads as 0, so no size has to be a multiple of a tile's. After the
// product the sums go through shared memory: an epilogue thread then owns 8 neighbouring columns and 16-byte accesses.
#pragma once

#include "cuda/common/elements.cuh"
#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/copy_async.cuh"
#include "cuda/ptx/memory.cuh"
#include "cuda/ptx/mma.cuh"
#include "cuda/ptx/thread.cuh"

namespace locas::cuda::sm80 {

constexpr int kBlockK = 64;

enum class Major { k, mn };

// A row-major matrix in global memory, [mn, k] or [k, mn].
template <class T>
struct Operand {
  const T* data;
  int64_t stride;
  int rows, cols;
};

template <class T>
LOCAS_DEVICE Operand<T> operand(const Matrix& matrix, int64_t rows, int64_t cols, int64_t first_col = 0) {
  return {static_cast<const T*>(matrix.data) + first_col, matrix.stride, static_cast<int>(rows),
          static_cast<int>(cols)};
}

// Where 16-byte piece `piece` of row `row` lies in a tile of rows of kPieces pieces, in elements.
template <int kPieces>
LOCAS_DEVICE int swizzled(int row, int piece) {
  static_assert(kPieces % 8 == 0, "8 rows must spread over 8 groups of banks");
  return (row * kPieces + (piece ^ (row % 8))) * kPiece;
}

// Starts the copy of a tile: kMn x kBlockK of `from`, beginning at (mn, k).
template <class T, Major major, int kMn, int kThreads>
LOCAS_DEVICE void load_tile(T* tile, const Operand<T>& from, int mn, int k) {
  constexpr int kRows = major == Major::k ? kMn : kBlockK;
  constexpr int kPieces = (major == Major::k ? kBlockK : kMn) / kPiece;
  const int first_row = major == Major::k ? mn : k, first_col = major == Major::k ? k : mn;
#pragma unroll
  for (int i = ptx::thread_index(); i < kRows * kPieces; i += kThreads) {
    const int row = i / kPieces, piece = i % kPieces;
    const int from_row = first_row + row, from_col = first_col + piece * kPiece;
    const bool inside = from_row < from.rows && from_col < from.cols;
    ptx::cp_async_16(tile + swizzled<kPieces>(row, piece), from.data + (inside ? from_row * from.stride + from_col : 0),
                     inside);
  }
}

// The m16k16 fragment of A at (m, k) of its tile.
template <class T, Major major, int kM>
LOCAS_DEVICE void load_a(uint32_t (&a)[4], const T* tile, int m, int k) {
  const int lane = ptx::lane_index();
  if constexpr (major == Major::k)
    ptx::ldmatrix_x4(a, tile + swizzled<kBlockK / kPiece>(m + lane % 16, k / kPiece + lane / 16));
  else ptx::ldmatrix_x4_trans(a, tile + swizzled<kM / kPiece>(k + lane % 8 + lane / 16 * 8, m / kPiece + lane / 8 % 2));
}

// Two k16n8 fragments of B at (k, n) of its tile: columns n..n+7 in b[0], b[1], the next eight in b[2], b[3].
template <class T, Major major, int kN>
LOCAS_DEVICE void load_b(uint32_t (&b)[4], const T* tile, int n, int k) {
  const int lane = ptx::lane_index();
  if constexpr (major == Major::k)
    ptx::ldmatrix_x4(b, tile + swizzled<kBlockK / kPiece>(n + lane % 8 + lane / 16 * 8, k / kPiece + lane / 8 % 2));
  else ptx::ldmatrix_x4_trans(b, tile + swizzled<kN / kPiece>(k + lane % 16, n / kPiece + lane / 16));
}

template <class T_, int M, int N, int WarpsM, int WarpsN, int Stages>
struct Tile {
  using T = T_;
  static constexpr int kM = M, kN = N, kWarpsN = WarpsN, kStages = Stages;
  static constexpr int kThreads = 32 * WarpsM * WarpsN;
  static constexpr int kWarpM = M / WarpsM, kWarpN = N / WarpsN;
  static_assert(kWarpM % 16 == 0 && kWarpN % 16 == 0, "a warp's part must consist of m16 and pairs of n8 fragments");

  struct Stage {
    alignas(128) T a[kM * kBlockK];
    alignas(128) T b[kN * kBlockK];
  };
  // The sums take the place of the stages; rows are 8 floats longer so that a warp's stores meet every bank once.
  union Shared {
    Stage stages[kStages];
    float sums[kM][kN + 8];
  };
  using Sums = float[kWarpM / 16][kWarpN / 8][4];

  // sums += A B for one K-block.
  template <Major a_major, Major b_major>
  static LOCAS_DEVICE void multiply(Sums& sums, const Stage& stage) {
    const int warp = ptx::warp_index(), first_m = warp / kWarpsN * kWarpM, first_n = warp % kWarpsN * kWarpN;
#pragma unroll
    for (int k = 0; k < kBlockK; k += 16) {
      uint32_t a[kWarpM / 16][4];
#pragma unroll
      for (int i = 0; i < kWarpM / 16; ++i) load_a<T, a_major, kM>(a[i], stage.a, first_m + 16 * i, k);
#pragma unroll
      for (int j = 0; j < kWarpN / 16; ++j) {
        uint32_t b[4];
        load_b<T, b_major, kN>(b, stage.b, first_n + 16 * j, k);
#pragma unroll
        for (int i = 0; i < kWarpM / 16; ++i) {
          ptx::mma_m16n8k16<T>(sums[i][2 * j], a[i], b[0], b[1]);
          ptx::mma_m16n8k16<T>(sums[i][2 * j + 1], a[i], b[2], b[3]);
        }
      }
    }
  }

  // Goes over the K-blocks [first, last): load(block, stage) starts a block's copies, kStages - 1 blocks ahead of
  // multiply(block, stage), which uses them. At the end the sums of the whole tile lie in shared.sums, for all threads.
  template <class Load, class Multiply>
  static LOCAS_DEVICE void product(Shared& shared, int first, int last, Load&& load, Multiply&& multiply) {
    Sums sums = {};
#pragma unroll
    for (int ahead = 0; ahead < kStages - 1; ++ahead) {
      if (first + ahead < last) load(first + ahead, shared.stages[ahead]);
      ptx::cp_async_commit();
    }
    int stage = 0;
    for (int block = first; block < last; ++block) {
      ptx::cp_async_wait<kStages - 2>();
      ptx::sync_threads();  // the block is there for all, and all are done with the stage that is filled next
      const int ahead = block + kStages - 1;
      if (ahead < last) load(ahead, shared.stages[(stage + kStages - 1) % kStages]);
      ptx::cp_async_commit();
      multiply(block, sums, shared.stages[stage]);
      stage = (stage + 1) % kStages;
    }
    ptx::sync_threads();  // the stages give way to the sums

    const int warp = ptx::warp_index(), lane = ptx::lane_index();
    const int row = warp / kWarpsN * kWarpM + lane / 4, col = warp % kWarpsN * kWarpN + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < kWarpM / 16; ++i)
#pragma unroll
      for (int j = 0; j < kWarpN / 8; ++j)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          ptx::store(reinterpret_cast<Elements<float, 2>*>(&shared.sums[row + 16 * i + 8 * half][col + 8 * j]),
                     Elements<float, 2>{sums[i][j][2 * half], sums[i][j][2 * half + 1]});
    ptx::sync_threads();
  }

  // Calls f(row, col) for the first column of every 8 of a kM x kColumns part, a share of them in each thread.
  template <int kColumns, class F>
  static LOCAS_DEVICE void for_each_piece(F&& f) {
    constexpr int kPieces = kColumns / kPiece;
#pragma unroll 1
    for (int i = ptx::thread_index(); i < kM * kPieces; i += kThreads) f(i / kPieces, i % kPieces * kPiece);
  }
};

template <class T>
using LargeTile = Tile<T, 128, 128, 2, 2, 3>;
template <class T>
using MediumTile = Tile<T, 64, 128, 2, 2, 3>;
template <class T>
using SmallTile = Tile<T, 64, 64, 2, 2, 4>;
// The same by twice the warps, where a multiprocessor has no second CTA to fill the waits of the first.
template <class T>
using LoneTile = Tile<T, 64, 64, 2, 4, 4>;
// For a handful of tokens: many CTAs that each stream their share of the weights.
template <class T>
using NarrowTile = Tile<T, 16, 64, 1, 4, 6>;

// The tile of a grid that CTA `index` owns. Neighbouring CTAs go down kGroup tiles of the tokens before they go on
// along the weights, so that what runs at one time shares operands in the L2 cache.
struct TileIndex {
  int m, n;
};
LOCAS_DEVICE TileIndex tile_index(int64_t index, int tiles_m, int tiles_n) {
  constexpr int kGroup = 8;
  const int64_t group_tiles = static_cast<int64_t>(kGroup) * tiles_n;
  const int first_m = static_cast<int>(index / group_tiles) * kGroup;
  const int group_m = tiles_m - first_m < kGroup ? tiles_m - first_m : kGroup;
  const int within = static_cast<int>(index % group_tiles);
  return {first_m + within % group_m, within / group_m};
}

}  // namespace locas::cuda::sm80
