// Which tile and how many slices of K a product gets. Decided from the shape alone, so that results repeat bit for bit
// on every device; the numbers are for the 132 multiprocessors of an H100.
#pragma once

#include "cuda/ffn/sm80/gemm_tile.cuh"

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

}  // namespace locas::cuda
