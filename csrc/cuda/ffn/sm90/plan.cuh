// Which tile and how many slices of K a product gets on Hopper. Decided from the shape alone, so that results repeat bit
// for bit; the numbers are for the 132 multiprocessors of an H100.
//
// The estimate counts waves: what a wave takes is its K-blocks at the speed of the tensor cores, or of the L2 cache
// where a tile is too small to hide it, and the stores that nothing hides.
#pragma once

#include <cstdint>

#include "common/ffn_params.h"
#include "cuda/ffn/sm90/pipeline.cuh"

namespace locas::cuda::sm90 {

#ifdef __CUDACC__
constexpr int kMultiprocessors = 132;
constexpr int kLeastBlocks = 8;  // K-blocks of a slice
#else
constexpr int kMultiprocessors = 3;  // small tests meet several units a CTA, and slices
constexpr int kLeastBlocks = 1;
#endif

// The instances, by number in TileShape kTiles[].
enum class TileKind { m128n256, m256n128, m128n192, m128n192_ping_pong, m128n128, m128n128_ping_pong };
constexpr int kTileKinds = 6;
struct TileShape {
  int m, n;
  Schedule schedule;
};
constexpr TileShape kTiles[kTileKinds] = {{128, 256, Schedule::cooperative}, {256, 128, Schedule::cooperative},
                                          {128, 192, Schedule::cooperative}, {128, 192, Schedule::ping_pong},
                                          {128, 128, Schedule::cooperative}, {128, 128, Schedule::ping_pong}};

// As many stages as fit beside the slabs of the stores.
template <class T, TileKind kind>
using TileOf = Tile<T, kTiles[static_cast<int>(kind)].m, kTiles[static_cast<int>(kind)].n,
                    200 * 1024 / ((kTiles[static_cast<int>(kind)].m + kTiles[static_cast<int>(kind)].n) * 128),
                    kTiles[static_cast<int>(kind)].schedule>;

struct Plan {
  TileKind kind;
  int splits;
};

// Clock cycles of the product [rows, columns] over `blocks` K-blocks, stores of `stored` bytes a tile included.
inline double estimate(const TileShape& tile, int64_t tiles, int64_t blocks, int splits, int64_t stored) {
  constexpr double kFlopsAClock = 4096, kBytesAClock = 40, kStoredAClock = 12;  // of a multiprocessor
  const double multiply = 2.0 * tile.m * tile.n * kBlockK / kFlopsAClock;
  const double load = (tile.m + tile.n) * kBlockK * 2.0 / kBytesAClock;
  const int64_t waves = divide_up(tiles * splits, kMultiprocessors);
  const double stores = stored / kStoredAClock;
  const double wave = divide_up(blocks, splits) * (multiply > load ? multiply : load);
  return tile.schedule == Schedule::ping_pong ? waves * wave + stores : waves * (wave + stores);
}

// K1: a tile has n / 2 neurons, host and memory apart.
inline Plan hidden_plan(int64_t tokens, const FfnSizes& sizes) {
  Plan best{TileKind::m128n256, 1};
  double least = 0;
  for (int kind = 0; kind < kTileKinds; ++kind) {
    const TileShape& tile = kTiles[kind];
    const int64_t neurons = tile.n / 2;
    const int64_t tiles =
        divide_up(tokens, tile.m) * (divide_up(sizes.m, neurons) + divide_up(sizes.padded_r(), neurons));
    const double clocks = estimate(tile, tiles, divide_up(sizes.d, kBlockK), 1, int64_t{tile.m} * neurons * 2);
    if (kind == 0 || clocks < least) {
      least = clocks;
      best.kind = static_cast<TileKind>(kind);
    }
  }
  return best;
}

// K2: K is cut into slices where the tiles alone would leave multiprocessors idle.
inline Plan down_plan(int64_t tokens, const FfnSizes& sizes) {
  const int64_t blocks = divide_up(sizes.m, kBlockK) + divide_up(sizes.r, kBlockK);
  Plan best{TileKind::m128n256, 1};
  double least = -1;
  for (int splits = 1; splits <= 8 && blocks >= splits * kLeastBlocks; splits *= 2)
    for (int kind = 0; kind < kTileKinds; ++kind) {
      const TileShape& tile = kTiles[kind];
      const int64_t tiles = divide_up(tokens, tile.m) * divide_up(sizes.d, tile.n);
      // Slices are written as float and read by one more kernel.
      constexpr double kLaunch = 4000, kReadAClock = 1200;
      const double add = splits > 1 ? kLaunch + splits * tokens * sizes.d * 4 / kReadAClock : 0;
      const double clocks =
          estimate(tile, tiles, blocks, splits, int64_t{tile.m} * tile.n * (splits > 1 ? 4 : 2)) + add;
      if (least < 0 || clocks < least) {
        least = clocks;
        best = {static_cast<TileKind>(kind), splits};
      }
    }
  return best;
}

// Calls f with the tile type.
template <class T, class F>
void with_tile(TileKind kind, F&& f) {
  switch (kind) {
    case TileKind::m128n256: return f.template operator()<TileOf<T, TileKind::m128n256>>();
    case TileKind::m256n128: return f.template operator()<TileOf<T, TileKind::m256n128>>();
    case TileKind::m128n192: return f.template operator()<TileOf<T, TileKind::m128n192>>();
    case TileKind::m128n192_ping_pong: return f.template operator()<TileOf<T, TileKind::m128n192_ping_pong>>();
    case TileKind::m128n128: return f.template operator()<TileOf<T, TileKind::m128n128>>();
    default: return f.template operator()<TileOf<T, TileKind::m128n128_ping_pong>>();
  }
}

}  // namespace locas::cuda::sm90
