// The units of K2 and of K4's dx: tiles of [tokens, d], whole or with K in slices. Slices leave floats, which AddSlices
// adds in their order.
//
//      unit    slice 0 of all tiles | slice 1 of all tiles | ...
#pragma once

#include "cuda/ffn/sm90/epilogue.cuh"

namespace locas::cuda::sm90 {

template <class Tile, bool sliced>
struct OutputTiles {
  using T = typename Tile::T;
  using Stores = sm90::Stores<T, 3>;

  ptx::TensorMap out;
  const T* bias;      // may be null
  float* slice_sums;  // [splits, tokens, d] where sliced
  float one;          // 1, for put_floats
  int64_t tokens;
  int rows;  // of A that are loaded
  int d, tiles_m, tiles_n, tiles;
  int blocks, splits;  // of K

  constexpr int tile_units() const { return tiles * splits; }  // the launcher asks too
  LOCAS_DEVICE TileIndex tile(int unit) const { return tile_index(unit % tiles, tiles_m, tiles_n); }
  LOCAS_DEVICE int slice(int unit) const { return unit / tiles; }
  LOCAS_DEVICE int first_block(int unit) const { return blocks * slice(unit) / splits; }
  LOCAS_DEVICE int last_block(int unit) const { return blocks * (slice(unit) + 1) / splits; }
  LOCAS_DEVICE uint32_t stage_bytes(int) const { return bytes_of_rows<T>(rows, Tile::kBRows); }

  LOCAS_DEVICE void write(Stores& stores, int unit, const typename Tile::Sums& sums, int consumer) const {
    const TileIndex at = tile(unit);
    const int token = at.m * Tile::kM + (Tile::kPingPong ? 0 : consumer * Tile::kRows), channel = at.n * Tile::kN;
    if constexpr (sliced) {
#pragma unroll
      for (int row_block = 0; row_block < Tile::kRowBlocks; ++row_block)
        put_floats<false>(slice_sums + slice(unit) * tokens * d, sums[row_block], token + row_block * 64, tokens,
                          channel, d, one);
    } else {
      store_rounded(stores, out, sums, token, channel, d, bias);
    }
  }

  // to: no rows, no tiles.
  void set(const Matrix& to, const void* to_bias, int64_t cols, int64_t k_blocks, int slices, float* workspace) {
    out = map_or_none<T>(to, kSlabBox);
    bias = static_cast<const T*>(to_bias);
    slice_sums = workspace;
    one = 1.0f;
    tokens = to.rows;
    rows = loaded_rows(Tile::kM, tokens);
    d = static_cast<int>(cols);
    tiles_m = static_cast<int>(divide_up(tokens, Tile::kM));
    tiles_n = static_cast<int>(divide_up(cols, Tile::kN));
    tiles = tiles_m * tiles_n;
    blocks = static_cast<int>(k_blocks);
    splits = slices;
  }
};

// Calls f with whether there are slices.
template <class F>
void with_sliced(int splits, F&& f) {
  if (splits == 1) f.template operator()<false>();
  else f.template operator()<true>();
}

}  // namespace locas::cuda::sm90
