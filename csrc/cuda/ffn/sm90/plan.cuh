// Which tile and how many slices of K a product gets on Hopper. Decided from the shape alone, so that results repeat bit
// for bit; the numbers are for the 132 multiprocessors of an H100.
//
// The estimate counts waves: what a unit takes is its K-blocks at the speed of the tensor cores, and its epilogue, which
// ping-pong hides behind the next unit's multiplications but for the last one. csrc/simt/tests/plan_test.cpp has the
// measurements that it follows.
#pragma once

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <stdexcept>
#include <string>
#include <utility>

#include "common/ffn_params.h"
#include "cuda/ffn/sm90/pipeline.cuh"

namespace locas::cuda::sm90 {

// What a plan is for.
struct Target {
  int multiprocessors;
  int least_blocks;  // K-blocks of a slice, at least
  int clusters;      // of four CTAs, at one time
};
constexpr Target kH100{132, 8, 30};
#ifdef __CUDACC__
constexpr Target kTarget = kH100;
#else
constexpr Target kTarget{3, 1, 1};  // small tests meet several units per CTA, and slices
#endif

// By number in kTiles.
enum class TileKind {
  m128n192,
  m128n192_ping_pong,
  m128n128,
  m128n128_ping_pong,
  m128n64,
  m128n128_4_slices,
};
constexpr int kTileKinds = 6;
struct TileShape {
  int m, n;
  Schedule schedule;
  double slowness;  // of its multiplications: small tiles load more, and their loads come late more often
  int slices = 1;   // of K, in a cluster
};
constexpr TileShape kTiles[kTileKinds] = {
    {128, 192, Schedule::cooperative, 1.0},  {128, 192, Schedule::ping_pong, 1.0},
    {128, 128, Schedule::cooperative, 1.06}, {128, 128, Schedule::ping_pong, 1.03},
    {128, 64, Schedule::cooperative, 1.5},   {128, 128, Schedule::cooperative, 1.06, 4}};
constexpr const TileShape& shape_of(TileKind kind) { return kTiles[static_cast<int>(kind)]; }

// The tiles that a product is compiled for: each is the fastest somewhere.
constexpr TileKind kHiddenTiles[] = {TileKind::m128n192_ping_pong, TileKind::m128n128_ping_pong, TileKind::m128n192,
                                     TileKind::m128n128, TileKind::m128n64};
constexpr TileKind kDownTiles[] = {TileKind::m128n128, TileKind::m128n128_ping_pong, TileKind::m128n64,
                                   TileKind::m128n128_4_slices};
constexpr TileKind kHiddenGradTiles[] = {TileKind::m128n192, TileKind::m128n128_ping_pong, TileKind::m128n128,
                                         TileKind::m128n64};
constexpr TileKind kInputGradTiles[] = {TileKind::m128n128, TileKind::m128n128_ping_pong, TileKind::m128n64,
                                        TileKind::m128n128_4_slices};

// What SlicedSums has in shared memory (epilogue.cuh).
constexpr int received_bytes(const TileShape& tile) { return tile.m * tile.n * 4 / tile.slices * (tile.slices - 1); }

// Shared memory for the stages, beside what the epilogue has.
constexpr int kSharedBytes = 226 * 1024;
constexpr int output_stage_bytes(const TileShape& tile) { return kSharedBytes - 8 * 3 * 1024 - received_bytes(tile); }

// K3's ring of pieces of gate and up, 64 rows of so many columns each: no more than a tile has (backward.cu).
constexpr int kGateUpCols = 64;
constexpr int gate_up_pieces(int m, int n) { return std::min(4, m / 64 * (n / kGateUpCols)); }
constexpr int hidden_grad_stage_bytes(const TileShape& tile) {
  return kSharedBytes - gate_up_pieces(tile.m, tile.n) * 2 * 64 * kGateUpCols * 2;
}

// As many stages as fit.
template <class T, TileKind kind, int (*stage_bytes)(const TileShape&)>
using TileOf = Tile<T, shape_of(kind).m, shape_of(kind).n,
                    stage_bytes(shape_of(kind)) / ((shape_of(kind).m + (shape_of(kind).n + 63) / 64 * 64) * 128),
                    shape_of(kind).schedule, shape_of(kind).slices>;

struct Plan {
  TileKind kind;
  int splits;
};

// Units of one kind, and the K-blocks of each.
struct Units {
  int64_t count, blocks;
};

// What the busiest of `ctas` CTAs does, where units of a product and of the slots' gradients share a grid: the product's
// go to all in turn, the slots' to those that have one less, or to all where that ends sooner.
struct Turn {
  int64_t units, blocks;
  int slots_from;  // the first CTA that takes units of the slots
};
inline Turn longest_turn(const Units& product, const Units& slots, int ctas) {
  const int64_t each = ctas > 0 ? product.count / ctas : 0;
  const int busy = ctas > 0 ? static_cast<int>(product.count % ctas) : 0;
  const int64_t most = each + (busy > 0);
  if (slots.count == 0) return {most, most * product.blocks, 0};
  const int64_t of_idle = divide_up(slots.count, ctas - busy), of_all = divide_up(slots.count, ctas);
  const int64_t idle_blocks = each * product.blocks + of_idle * slots.blocks, busy_blocks = most * product.blocks;
  const int64_t all_blocks = busy_blocks + of_all * slots.blocks;
  if (idle_blocks > all_blocks) return {most + of_all, all_blocks, 0};
  return idle_blocks > busy_blocks ? Turn{each + of_idle, idle_blocks, busy} : Turn{most, busy_blocks, busy};
}

// A product of some tiles.
struct Product {
  Units tiles;
  double sums_a_clock;  // that a warpgroup's epilogue puts out
  Units slots{0, 0};
};

// Clock cycles. What slices cost: by launch, the floats that are written, read and added; in a cluster, those that one CTA
// sends the others, and CTAs that begin when others have ended.
inline double estimate(const TileShape& tile, const Product& product, int splits, double added, const Target& target) {
  constexpr double kFlopsAClock = 4096, kSlicedSumsAClock = 1.5, kLaunch = 5000, kReadAClock = 1200;
  constexpr double kSentAClock = 12, kNextCluster = 8000;
  const bool ping_pong = tile.schedule == Schedule::ping_pong;
  const double block = tile.slowness * 2.0 * tile.m * tile.n * kBlockK / kFlopsAClock;
  const int slices = splits * tile.slices;
  const Units units{product.tiles.count * slices, divide_up(product.tiles.blocks, slices)};
  const int ctas = tile.slices > 1 ? target.clusters * tile.slices : target.multiprocessors;
  const Turn turn = longest_turn(units, product.slots, ctas);
  const double sums = tile.m * tile.n / (ping_pong ? 1.0 : 2.0) / tile.slices;
  const double epilogue = sums / (splits > 1 ? kSlicedSumsAClock : product.sums_a_clock);
  const double by_launch = splits > 1 ? kLaunch + splits * added / kReadAClock : 0.0;
  const int64_t clusters = divide_up(units.count, ctas);  // one behind the other
  const double in_cluster =
      clusters * received_bytes(tile) / kSentAClock + (tile.slices > 1 ? clusters - 1 : 0) * kNextCluster;
  return turn.blocks * block + (ping_pong ? 1 : turn.units) * epilogue + by_launch + in_cluster;
}

// The best of some tiles and of 1 to `most_splits` slices. product(tile): what it comes to with a tile; `added`: bytes of
// a slice.
template <int count, class F>
Plan best_plan(const TileKind (&kinds)[count], F&& product, int most_splits, double added, const Target& target) {
  Plan best{kinds[0], 1};
  double least = -1.0;
  for (int splits = 1; splits <= most_splits; splits *= 2)
    for (const TileKind kind : kinds) {
      const TileShape& tile = shape_of(kind);
      if (tile.slices > 1 && splits > 1) continue;
      const Product of_tile = product(tile);
      const int slices = splits * tile.slices;
      if (slices > 1 && of_tile.tiles.blocks < slices * target.least_blocks) continue;
      const double clocks = estimate(tile, of_tile, splits, added, target);
      if (least >= 0.0 && clocks >= least) continue;
      least = clocks;
      best = {kind, splits};
    }
  return best;
}

constexpr int kMostSplits = 4;
constexpr double kSumsAClock = 4.3, kHiddenGradSumsAClock = 3.0;  // of the epilogues of a warpgroup

// K1: a tile has n / 2 neurons, host and memory apart.
inline Plan hidden_plan(int64_t tokens, const FfnSizes& sizes, const Target& target = kTarget) {
  const auto product = [&](const TileShape& tile) {
    const int64_t neurons = tile.n / 2;
    const int64_t tiles_n = divide_up(sizes.m, neurons) + divide_up(sizes.padded_r(), neurons);
    return Product{{divide_up(tokens, tile.m) * tiles_n, divide_up(sizes.d, kBlockK)}, kSumsAClock};
  };
  return best_plan(kHiddenTiles, product, 1, 0.0, target);
}

// K2: K is cut into slices where the tiles alone would leave multiprocessors idle.
inline Plan down_plan(int64_t tokens, const FfnSizes& sizes, const Target& target = kTarget) {
  const int64_t blocks = divide_up(sizes.m, kBlockK) + divide_up(sizes.r, kBlockK);
  const auto product = [&](const TileShape& tile) {
    return Product{{divide_up(tokens, tile.m) * divide_up(sizes.d, tile.n), blocks}, kSumsAClock};
  };
  return best_plan(kDownTiles, product, kMostSplits, tokens * sizes.d * 4.0, target);
}

// K3: host and memory apart.
inline Plan hidden_grad_plan(int64_t tokens, const FfnSizes& sizes, const Target& target = kTarget) {
  const auto product = [&](const TileShape& tile) {
    const int64_t tiles_n = divide_up(sizes.m, tile.n) + divide_up(sizes.padded_r(), tile.n);
    return Product{{divide_up(tokens, tile.m) * tiles_n, divide_up(sizes.d, kBlockK)}, kHiddenGradSumsAClock};
  };
  return best_plan(kHiddenGradTiles, product, 1, 0.0, target);
}

// What a unit of the slots takes beside its K-blocks, in K-blocks: it reads the floats that its sums are added to.
constexpr int slots_epilogue_blocks(int m, int n) { return 6000 * 4096 / (2 * m * n * kBlockK); }

// K4: dx in slices like K2, and the slots' gradients beside it.
inline Plan input_grad_plan(int64_t tokens, const FfnSizes& sizes, const Target& target = kTarget) {
  const int64_t slot_blocks = divide_up(sizes.r, kBlockK);
  const int64_t blocks = 2 * (divide_up(sizes.m, kBlockK) + slot_blocks);
  const auto product = [&](const TileShape& tile) {
    const int64_t tiles_n = divide_up(sizes.d, tile.n);
    return Product{{divide_up(tokens, tile.m) * tiles_n, blocks},
                   kSumsAClock,
                   {(slot_blocks + divide_up(slot_blocks, 2)) * tiles_n,
                    divide_up(tokens, kBlockK) + slots_epilogue_blocks(tile.m, tile.n)}};
  };
  return best_plan(kInputGradTiles, product, kMostSplits, tokens * sizes.d * 4.0, target);
}

// Calls f with the tile type, one of `kinds`.
template <class T, const auto& kinds, int (*stage_bytes)(const TileShape&), class F, size_t... index>
void with_tile_of(TileKind kind, F& f, std::index_sequence<index...>) {
  const auto called = [&]<TileKind candidate>() {
    if (candidate != kind) return false;
    f.template operator()<TileOf<T, candidate, stage_bytes>>();
    return true;
  };
  if (!(called.template operator()<kinds[index]>() || ...))
    throw std::invalid_argument("no instance of this product has tile " + std::to_string(static_cast<int>(kind)));
}
template <class T, const auto& kinds, int (*stage_bytes)(const TileShape&), class F>
void with_tile(TileKind kind, F&& f) {
  with_tile_of<T, kinds, stage_bytes>(kind, f, std::make_index_sequence<std::size(kinds)>());
}

}  // namespace locas::cuda::sm90
