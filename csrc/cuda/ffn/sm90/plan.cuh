// Which tile and how many slices of K a product gets on Hopper. Decided from the shape alone, so that results repeat bit
// for bit; the numbers are for the 132 multiprocessors of an H100 or H200.
//
// The estimate counts waves: what a unit takes is its K-blocks at the speed of the tensor cores, and its epilogue, which
// ping-pong hides behind the next unit's multiplications but for the last one. It only compares tiles: what the memory's
// bandwidth adds is not in it. csrc/simt/tests/plan_test.cpp has the measurements that it follows.
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
};
constexpr Target kH100{132, 6};
#ifdef __CUDACC__
constexpr Target kTarget = kH100;
#else
constexpr Target kTarget{3, 1};  // small tests meet several units per CTA, and slices
#endif

constexpr int kFlopsAClock = 4096;  // of a multiprocessor's tensor cores

// By number in kTiles.
enum class TileKind {
  m128n192,
  m128n128,
  m128n128_ping_pong,
  m128n64,
  m64n128_ping_pong,
  m64n64_ping_pong,
};
constexpr int kTileKinds = 6;
struct TileShape {
  int m, n;
  Schedule schedule;
  double slowness;      // of its multiplications: small tiles load more, and their loads come late more often
  double slowdown = 0;  // more of it from a CTA's second unit on
};
constexpr TileShape kTiles[kTileKinds] = {
    {128, 192, Schedule::cooperative, 1.14}, {128, 128, Schedule::cooperative, 1.02},
    {128, 128, Schedule::ping_pong, 1.0},    {128, 64, Schedule::cooperative, 1.25},
    {64, 128, Schedule::ping_pong, 1.18},    {64, 64, Schedule::ping_pong, 1.26, 0.4}};
constexpr const TileShape& shape_of(TileKind kind) { return kTiles[static_cast<int>(kind)]; }

// The tiles that a product is compiled for: without one of them some measured shape takes over 3% longer.
constexpr TileKind kHiddenTiles[] = {TileKind::m128n128_ping_pong, TileKind::m128n192, TileKind::m128n64,
                                     TileKind::m64n128_ping_pong, TileKind::m64n64_ping_pong};
constexpr TileKind kDownTiles[] = {TileKind::m128n128_ping_pong, TileKind::m128n128, TileKind::m64n128_ping_pong,
                                   TileKind::m64n64_ping_pong};
constexpr TileKind kHiddenGradTiles[] = {TileKind::m128n128_ping_pong, TileKind::m128n64, TileKind::m64n128_ping_pong,
                                         TileKind::m64n64_ping_pong};
constexpr TileKind kInputGradTiles[] = {TileKind::m128n128_ping_pong, TileKind::m64n128_ping_pong,
                                        TileKind::m64n64_ping_pong};

// Shared memory for the stages, beside what the epilogue has.
constexpr int kSharedBytes = 226 * 1024;
constexpr int output_stage_bytes(const TileShape&) { return kSharedBytes - 8 * 3 * 1024; }

// K3's ring of pieces of gate and up, 64 rows of so many columns each: no more than a tile of each consumer has
// (backward.cu).
constexpr int kGateUpCols = 64;
constexpr int gate_up_pieces(int m, int n, Schedule schedule) {
  return std::min(4, m / 64 * (n / kGateUpCols) * (schedule == Schedule::ping_pong ? 2 : 1));
}
constexpr int hidden_grad_stage_bytes(const TileShape& tile) {
  return kSharedBytes - gate_up_pieces(tile.m, tile.n, tile.schedule) * 2 * 64 * kGateUpCols * 2;
}

// As many stages as fit.
template <class T, TileKind kind, int (*stage_bytes)(const TileShape&)>
using TileOf = Tile<T, shape_of(kind).m, shape_of(kind).n,
                    stage_bytes(shape_of(kind)) / ((shape_of(kind).m + (shape_of(kind).n + 63) / 64 * 64) * 128),
                    shape_of(kind).schedule>;

struct Plan {
  TileKind kind;
  int splits;           // of K
  int slot_splits = 1;  // of the tokens, K of the slots' gradients
  double clocks = 0;    // what it is estimated to take
};

// Units of one kind, and the K-blocks of each.
struct Units {
  int64_t count, blocks;
};

// Which CTA does what, where units of a product and of the slots' gradients share a grid: the product's go to all in turn.
// Of the slots', `ahead` go to the CTAs that have one of the product less, and those behind them to all in turn.
struct Turns {
  int busy;  // CTAs with one more of the product
  int64_t ahead;
  int64_t units, blocks;  // the most of the product that a CTA has; K-blocks in all of the last to end
};
inline Turns turns_of(const Units& product, const Units& slots, int ctas) {
  const int64_t each = ctas > 0 ? product.count / ctas : 0;
  const int busy = ctas > 0 ? static_cast<int>(product.count % ctas) : 0, others = ctas - busy;
  const int64_t most = each + (busy > 0);
  if (slots.count == 0) return {busy, 0, most, most * product.blocks};
  const auto with_rounds = [&](int64_t rounds) {  // of slots' units while the busy ones have their last of the product
    const int64_t ahead = std::min(slots.count, rounds * others);
    const int64_t together = std::max(most * product.blocks, each * product.blocks + rounds * slots.blocks);
    return Turns{busy, ahead, most, together + divide_up(slots.count - ahead, ctas) * slots.blocks};
  };
  const int64_t rounds = busy > 0 ? product.blocks / slots.blocks : 0;
  const Turns within = with_rounds(rounds), beyond = with_rounds(rounds + 1);
  return beyond.blocks < within.blocks ? beyond : within;
}

// A product of some tiles.
struct Product {
  Units tiles;
  double sums_a_clock;  // that a warpgroup's epilogue puts out
  Units slots{0, 0};
  double exposed = 0;  // clock cycles of each unit that nothing hides
};

// Clock cycles of adding slices of so many bytes, each of which is written and read. The launch is a programmatic one.
inline double adding(int slices, double bytes) {
  constexpr double kBytesAClock = 950;
  return slices > 1 ? slices * bytes / kBytesAClock : 0.0;
}

// Clock cycles. slice: bytes of one.
inline double estimate(const TileShape& tile, const Product& product, int splits, double slice, const Target& target) {
  const double block = 2.0 * tile.m * tile.n * kBlockK / kFlopsAClock;
  const Units units{product.tiles.count * splits, divide_up(product.tiles.blocks, splits)};
  const Turns turns = turns_of(units, product.slots, target.multiprocessors);
  const bool ping_pong = tile.schedule == Schedule::ping_pong;
  const double epilogue = tile.m * tile.n / (ping_pong ? 1.0 : 2.0) / product.sums_a_clock;
  const double blocks = turns.blocks * tile.slowness + (turns.units - 1) * units.blocks * tile.slowdown;
  return blocks * block + (ping_pong ? 1 : turns.units) * epilogue + turns.units * product.exposed +
         adding(splits, slice);
}

// The best of some tiles and of 1 to `most_splits` slices. product(tile): what it comes to with a tile.
template <int count, class F>
Plan best_plan(const TileKind (&kinds)[count], F&& product, int most_splits, double slice, const Target& target) {
  Plan best{kinds[0], 1};
  for (int splits = 1; splits <= most_splits; splits *= 2)
    for (const TileKind kind : kinds) {
      const Product of_tile = product(shape_of(kind));
      if (splits > 1 && of_tile.tiles.blocks < splits * target.least_blocks) continue;
      const double clocks = estimate(shape_of(kind), of_tile, splits, slice, target);
      if (best.clocks == 0 || clocks < best.clocks) best = {kind, splits, 1, clocks};
    }
  return best;
}

constexpr int kMostSplits = 8, kMostSlotSplits = 16;
// Of the epilogues of a warpgroup. K3's moves four matrices, and ping-pong hides not all of it.
constexpr double kSumsAClock = 4.3, kHiddenGradSumsAClock = 1.7, kHiddenGradExposed = 500;

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
    return Product{.tiles = {divide_up(tokens, tile.m) * tiles_n, divide_up(sizes.d, kBlockK)},
                   .sums_a_clock = kHiddenGradSumsAClock,
                   .exposed = kHiddenGradExposed};
  };
  return best_plan(kHiddenGradTiles, product, 1, 0.0, target);
}

// The slots' units of K4, of tiles m x n and with the tokens in slices. What one takes beside its K-blocks is counted as
// K-blocks too.
inline Units slot_units(int m, int n, int64_t tokens, int64_t d, int64_t r, int slices) {
  constexpr int64_t kEpilogue = 3000;  // clock cycles
  return {divide_up(3 * divide_up(r, 64), m / 64) * divide_up(d, n) * slices,
          divide_up(divide_up(tokens, kBlockK), slices) + kEpilogue * kFlopsAClock / (2 * 128 * n * kBlockK)};
}

// K4: dx in slices like K2, and the slots' gradients beside it.
inline Plan input_grad_plan(int64_t tokens, const FfnSizes& sizes, const Target& target = kTarget) {
  const int64_t blocks = 2 * (divide_up(sizes.m, kBlockK) + divide_up(sizes.r, kBlockK));
  Plan best{kInputGradTiles[0], 1};
  for (int slices = 1; slices <= std::min<int64_t>(kMostSlotSplits, divide_up(tokens, kBlockK)); slices *= 2) {
    const auto product = [&](const TileShape& tile) {
      return Product{{divide_up(tokens, tile.m) * divide_up(sizes.d, tile.n), blocks},
                     kSumsAClock,
                     slot_units(tile.m, tile.n, tokens, sizes.d, sizes.r, slices)};
    };
    Plan plan = best_plan(kInputGradTiles, product, kMostSplits, tokens * sizes.d * 4.0, target);
    plan.slot_splits = slices;
    plan.clocks += adding(slices, 3 * sizes.r * sizes.d * 4.0);
    if (best.clocks == 0 || plan.clocks < best.clocks) best = plan;
  }
  return best;
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
