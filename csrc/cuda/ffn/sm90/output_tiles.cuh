// The units of K2 and of K4's dx: tiles of [tokens, d], whole or with K in slices. Slices by launch leave floats, which
// AddSlices adds in their order; those of a cluster are beside each other and add themselves.
//
//      unit    by launch:     slice 0 of all tiles | slice 1 of all tiles | ...
//              by cluster:    all slices of tile 0 | all slices of tile 1 | ...
#pragma once

#include "cuda/ffn/sm90/epilogue.cuh"

namespace locas::cuda::sm90 {

// sliced: by launch.
template <class Tile, bool sliced>
struct OutputTiles {
  static_assert(!sliced || Tile::kSlices == 1);
  using T = typename Tile::T;
  using Stores = sm90::Stores<T, 3>;
  using Slices = SlicedSums<Tile>;
  struct Shared {  // of a consumer's warp
    typename Stores::Shared stores;
    typename Slices::Shared slices;
  };

  ptx::TensorMap out;
  const T* bias;      // may be null
  float* slice_sums;  // [splits, tokens, d] where sliced
  float one;          // 1, for store_floats
  int64_t tokens;
  int d, tiles_m, tiles_n, tiles;
  int blocks, splits;  // of K; the slices of a cluster too

  constexpr int tile_units() const { return tiles * splits; }  // the launcher asks too
  LOCAS_DEVICE TileIndex tile(int unit) const { return tile_index(unit / Tile::kSlices % tiles, tiles_m, tiles_n); }
  LOCAS_DEVICE int slice(int unit) const { return unit / Tile::kSlices / tiles * Tile::kSlices + unit % Tile::kSlices; }
  LOCAS_DEVICE int first_block(int unit) const { return blocks * slice(unit) / splits; }
  LOCAS_DEVICE int last_block(int unit) const { return blocks * (slice(unit) + 1) / splits; }

  static LOCAS_DEVICE int consumer_warp() { return ptx::uniform(ptx::warp_index()) - 4; }
  // Before the cluster's first barrier.
  static LOCAS_DEVICE void initialise_slices(Shared* shared) {
    if constexpr (Tile::kSlices > 1)
      if (consumer_warp() >= 0) Slices{shared[consumer_warp()].slices}.initialise();
  }
  LOCAS_DEVICE void write(Stores& stores, Shared* shared, int unit, const typename Tile::Sums& sums,
                          int consumer) const {
    const TileIndex at = tile(unit);
    const int token = at.m * Tile::kM + (Tile::kPingPong ? 0 : consumer * Tile::kRows), channel = at.n * Tile::kN;
    if constexpr (sliced) {
      store_floats<Tile>(slice_sums + slice(unit) * tokens * d, sums, token, tokens, channel, d, one);
    } else if constexpr (Tile::kSlices > 1) {
      typename Slices::Sums added;
      Slices{shared[consumer_warp()].slices}.add(sums, one, added);
      store_rounded(stores, out, added, token, channel + ptx::cluster_rank() * Slices::kCols, d, bias);
    } else {
      store_rounded(stores, out, sums, token, channel, d, bias);
    }
  }

  // to: no rows, no tiles. `splits`: by launch.
  void set(const Matrix& to, const void* to_bias, int64_t cols, int64_t k_blocks, int splits_by_launch,
           float* workspace) {
    out = map_or_none<T>(to, kSlabBox);
    bias = static_cast<const T*>(to_bias);
    slice_sums = workspace;
    one = 1.0f;
    tokens = to.rows;
    d = static_cast<int>(cols);
    tiles_m = static_cast<int>(divide_up(tokens, Tile::kM));
    tiles_n = static_cast<int>(divide_up(cols, Tile::kN));
    tiles = tiles_m * tiles_n;
    blocks = static_cast<int>(k_blocks);
    splits = splits_by_launch * Tile::kSlices;
  }
};

// Calls f with whether there are slices by launch.
template <class Tile, class F>
void with_sliced(int splits, F&& f) {
  if (splits == 1) return f.template operator()<false>();
  if constexpr (Tile::kSlices == 1) f.template operator()<true>();
  else throw std::invalid_argument(std::to_string(splits) + " slices by launch of a cluster's tile; expected 1");
}

}  // namespace locas::cuda::sm90
