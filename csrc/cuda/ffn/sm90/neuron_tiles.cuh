// The units of K1 and K3: tiles of [tokens, m host | r' memory neurons], of one source each, whose sums go over d.
//
//      n    0 ... host_tiles_n - 1 | host_tiles_n ... tiles_n - 1      kNeurons each; the last one of each source may
//           host                   | memory                           reach beyond it
#pragma once

#include "cuda/ffn/sm90/pipeline.cuh"

namespace locas::cuda::sm90 {

// Source: its `neurons`, the `stage_bytes` of its K-blocks, and what else the kernel has of it.
template <class Tile, class Source, int kNeurons>
struct NeuronTiles : EachInTurn {
  Source host, memory;
  int blocks, tiles_m, host_tiles_n, tiles_n;

  LOCAS_DEVICE int first_block(int) const { return 0; }
  LOCAS_DEVICE int last_block(int) const { return blocks; }
  LOCAS_DEVICE uint32_t stage_bytes(int unit) const { return place_of(unit).source.stage_bytes; }

  struct Place {
    const Source& source;
    bool memory;
    int token, neuron;
  };
  LOCAS_DEVICE Place place_of(int unit) const {
    const TileIndex tile = tile_index(unit, tiles_m, tiles_n);
    const bool of_memory = tile.n >= host_tiles_n;
    return {of_memory ? memory : host, of_memory, tile.m * Tile::kM,
            (of_memory ? tile.n - host_tiles_n : tile.n) * kNeurons};
  }

  void set_sizes(int64_t tokens, int64_t d, int64_t host_neurons, int64_t memory_neurons) {
    blocks = static_cast<int>(divide_up(d, kBlockK));
    tiles_m = static_cast<int>(divide_up(tokens, Tile::kM));
    host_tiles_n = static_cast<int>(divide_up(host_neurons, kNeurons));
    tiles_n = host_tiles_n + static_cast<int>(divide_up(memory_neurons, kNeurons));
    units = tiles_m * tiles_n;
  }
};

}  // namespace locas::cuda::sm90
