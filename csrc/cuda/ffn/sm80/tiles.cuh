// Which tile and how many slices of K a product gets. Decided from the shape alone, so that results repeat bit for bit
// on every device; the numbers are for the 132 multiprocessors of an H100.
#pragma once

#include "cuda/ffn/sm80/gemm_tile.cuh"
#include "cuda/ptx/thread.cuh"
#include "cuda/ptx/types.cuh"

namespace locas::cuda {

#ifdef __CUDACC__
constexpr int kMultiprocessors = 132;
constexpr int kLeastDepth = 256;  // of a slice
#else
constexpr int kMultiprocessors = 3;  // small tests meet every tile and slices
constexpr int kLeastDepth = 64;
#endif
constexpr int kMostSplits = 16;

enum class TileKind { large, medium, small, narrow };

// The tile of a product [tokens, columns]; most_splits: how many slices its K may be cut into.
inline TileKind tile_kind(int64_t tokens, int64_t columns, int most_splits = 1) {
  const auto fills = [&](int64_t rows, int64_t cols) {
    return divide_up(tokens, rows) * divide_up(columns, cols) * most_splits >= kMultiprocessors;
  };
  if (tokens <= 16) return TileKind::narrow;
  if (tokens > 64 && divide_up(tokens, 128) * divide_up(columns, 128) >= kMultiprocessors) return TileKind::large;
  return fills(64, 128) ? TileKind::medium : TileKind::small;
}

// Slices of K for a product whose tiles alone would leave multiprocessors idle.
inline int split_count(TileKind kind, int64_t tokens, int64_t columns, int64_t depth) {
  if (kind == TileKind::large) return 1;
  const int64_t tiles =
      divide_up(tokens, kind == TileKind::narrow ? 16 : 64) * divide_up(columns, kind == TileKind::medium ? 128 : 64);
  int splits = 1;
  while (splits < kMostSplits && tiles * splits < 3 * kMultiprocessors / 2 && depth / (2 * splits) >= kLeastDepth)
    splits *= 2;
  return splits;
}

// Calls f with the tile type.
template <class T, class F>
void with_tile(TileKind kind, F&& f) {
  switch (kind) {
    case TileKind::large: return f.template operator()<LargeTile<T>>();
    case TileKind::medium: return f.template operator()<MediumTile<T>>();
    case TileKind::small: return f.template operator()<SmallTile<T>>();
    default: return f.template operator()<NarrowTile<T>>();
  }
}

// Calls f with the storage type.
template <class F>
void with_half_type(DType dtype, F&& f) {
  if (dtype == DType::bf16) return f.template operator()<bf16>();
  return f.template operator()<f16>();
}

// The sum of K slices, in their order, plus a bias; a thread owns 8 neighbouring columns of a row.
struct SliceParams {
  const float* slices;  // [splits, rows, cols]
  int splits;
  const void* bias;  // [cols]; may be null
  Rows out;          // [rows, cols]
  int64_t rows, cols;
};

template <class T>
struct AddSlices {
  using Params = SliceParams;
  static constexpr const char* name = "add_slices";
  static constexpr int threads = 256, min_blocks = 1;

  static int64_t blocks(const Params& p) { return divide_up(p.rows * (p.cols / kPiece), threads); }

  static LOCAS_DEVICE void run(const Params& p, unsigned char*) {
    const int64_t index = static_cast<int64_t>(ptx::block_index()) * threads + ptx::thread_index();
    const int64_t pieces = p.cols / kPiece, row = index / pieces, col = index % pieces * kPiece;
    if (row >= p.rows) return;
    float sum[kPiece] = {};
    if (p.bias) load_piece(static_cast<const T*>(p.bias) + col, sum);
    for (int split = 0; split < p.splits; ++split) {
      float slice[kPiece];
      load_piece(p.slices + (split * p.rows + row) * p.cols + col, slice);
#pragma unroll
      for (int i = 0; i < kPiece; ++i) sum[i] += slice[i];
    }
    store_piece(sum, static_cast<T*>(p.out.data) + row * p.out.stride + col);
  }
};

}  // namespace locas::cuda
