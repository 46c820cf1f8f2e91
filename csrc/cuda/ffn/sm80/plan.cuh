// What a launch of the sm80 family looks like: decode or tiles, which tile, how many slices of K, how much workspace.
// All of it is decided here, from the shape alone, so that results repeat bit for bit on every device that has room for
// the cooperative kernel; the numbers are for the 132 multiprocessors of an H100.
#pragma once

#include <algorithm>

#include "cuda/ffn/sm80/gemm_tile.cuh"
#include "cuda/ffn/sm80/launchers.h"

namespace locas::cuda::sm80 {

#ifdef __CUDACC__
constexpr int kMultiprocessors = 132;
constexpr int kLeastDepth = 256;  // of a slice
#else
constexpr int kMultiprocessors = 3;  // small tests meet every tile and slices
constexpr int kLeastDepth = 64;
#endif
constexpr int kMostSplits = 16;

enum class TileKind { large, medium, small, lone, narrow };

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

// The first product of a pass: its K is never cut, as its epilogue needs whole sums.
inline TileKind hidden_kind(int64_t tokens, int64_t columns) {
  const TileKind kind = tile_kind(tokens, columns);
  const bool alone = divide_up(tokens, 64) * divide_up(columns, 64) <= kMultiprocessors;
  return kind == TileKind::small && alone ? TileKind::lone : kind;
}

// Two products: [tokens, n] with a heavy epilogue, then [tokens, d] over K = n, or 2 n in the backward, in slices.
struct Plan {
  TileKind hidden, sum;
  int splits;         // of the second one's K
  int64_t workspace;  // floats: its slices
};

inline Plan planned(TileKind hidden, TileKind sum, int64_t tokens, int64_t d, int64_t depth) {
  const int splits = split_count(sum, tokens, d, depth);
  return {hidden, sum, splits, splits > 1 ? splits * tokens * d : 0};
}

// The forward's tiles. It has no narrow ones: the hidden kernel's neurons come in pairs of halves.
inline Plan forward_plan(int64_t tokens, const FfnSizes& s) {
  const auto wide = [](TileKind kind) { return kind == TileKind::narrow ? TileKind::small : kind; };
  const int64_t neurons = s.m + s.padded_r();
  return planned(wide(hidden_kind(tokens, 2 * neurons)), wide(tile_kind(tokens, s.d, kMostSplits)), tokens, s.d,
                 neurons);
}

inline Plan backward_plan(int64_t tokens, const FfnSizes& s) {
  return planned(hidden_kind(tokens, s.m), tile_kind(tokens, s.d, kMostSplits), tokens, s.d, 2 * (s.m + s.padded_r()));
}

// On an H100 decode took half of the tiles' time at 1 token. At 64 it took 0.89 of it for d = 1024 and 1.25 for d = 2048,
// each on a GPU of its own and over eager.
inline bool is_decode(int64_t tokens) { return tokens <= kMostDecodeTokens; }

// Whether the backward is one cooperative kernel, on a device that has room for it. On an H200 it took 0.87 of the tiles'
// time for 16 tokens and d = 1024 and 0.71 for d = 2048; for 32 tokens 1.19 and 1.13.
inline bool is_cooperative_backward(int64_t tokens) { return tokens <= 16; }

// Of decode's first product: CTAs that are on a multiprocessor at once, and strips of 8 neurons that a CTA takes: so many
// that all CTAs run at once, as a second wave of them would leave multiprocessors idle.
constexpr int decode_hidden_residents(int64_t tokens) { return tokens <= 8 ? 3 : tokens <= 32 ? 2 : 1; }
inline int decode_hidden_groups(int64_t tokens, int64_t neurons) {
  const int fewest = tokens <= 8 ? 1 : tokens <= 32 ? 2 : 3;
  const bool at_once = divide_up(neurons, 8 * fewest) <= decode_hidden_residents(tokens) * kMultiprocessors;
  return std::min(3, at_once ? fewest : fewest + 1);
}

// Groups of 16 channels that a CTA of decode's second product takes for more than 32 tokens, which each CTA reads whole:
// two, unless that leaves multiprocessors idle. Of fewer tokens it takes one.
inline int decode_down_groups(int64_t d) { return 8 * d >= 3 * 32 * kMultiprocessors ? 2 : 1; }

// Ranges of K that the input's gradient is cut into where it is one kernel, so that all multiprocessors have a part of it.
inline int decode_input_splits(int64_t d) {
  return std::max<int>(1, static_cast<int>(kMultiprocessors / divide_up(d, 64)));
}

constexpr int kImportanceRows = 64;  // of the small tile: importance is asked for once per memory

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
template <class T, class F>
void with_hidden_tile(TileKind kind, F&& f) {
  if (kind == TileKind::lone) return f.template operator()<LoneTile<T>>();
  with_tile<T>(kind, f);
}

}  // namespace locas::cuda::sm80
