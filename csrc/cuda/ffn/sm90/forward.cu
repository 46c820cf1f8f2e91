// glu_ffn_forward (K1 and K2) on Hopper: the forward of an FFN with memory, for many tokens.
//
//      K1 glu_ffn_hidden  hidden = scale * act(x W_gate^T) * (x W_up^T)          one product, two weights side by side
//
//           B stage [ kN/2 gate rows | kN/2 up rows ]    two copies by two tensor maps; both pre-activations of a neuron
//           hidden  [tokens,  m host | r' memory ]       are in one thread; memory tiles take the maps of G and K
//
//      K2 glu_ffn_down    y = hidden [W_down^T ; V]                               one product, two K ranges
//
//           K-blocks [ m: W_down, K-major | r: V, along its columns ]
//           Where the tiles are few, K is cut into slices; AddSlices adds them in their order.
//
// No atomics, and nothing depends on the device: the result repeats bit for bit.
#include "common/activations.h"
#include "cuda/ffn/add_slices.cuh"
#include "cuda/ffn/sm90/epilogue.cuh"
#include "cuda/ffn/sm90/half_activations.cuh"
#include "cuda/ffn/sm90/launchers.h"
#include "cuda/ffn/sm90/neuron_tiles.cuh"
#include "cuda/ffn/sm90/output_tiles.cuh"
#include "cuda/ffn/sm90/plan.cuh"
#include "cuda/launch.cuh"
#include "cuda/ptx/convert.cuh"
#include "cuda/ptx/grid.cuh"
#include "cuda/ptx/memory.cuh"
#include "cuda/tensor_map.cuh"

namespace locas::cuda::sm90 {
namespace {

template <class Tile>
struct GluFfnHidden {
  using T = typename Tile::T;
  static constexpr const char* name = "glu_ffn_hidden_sm90";
  static constexpr int threads = Tile::kThreads, min_blocks = 1;
  static constexpr int kNeurons = Tile::kN / 2, kSlabs = 3;
  using Stores = sm90::Stores<T, kSlabs>;

  struct Source {
    ptx::TensorMap gate, up;
    ptx::TensorMap hidden, gate_out, up_out;
    const T *gate_bias, *up_bias;
    int neurons;  // of the buffers
    uint32_t stage_bytes;
    float scale;
  };
  struct Params : NeuronTiles<Tile, Source, kNeurons> {
    ptx::TensorMap x;
    bool saves;
    Activation activation;
  };
  using Place = typename Params::Place;
  struct Shared {
    typename Tile::Shared tile;
    typename Stores::Shared stores[Tile::kConsumers * 4];
  };

  static LOCAS_DEVICE void run(const Params& p, unsigned char* dynamic) {
    Shared& shared = *reinterpret_cast<Shared*>(dynamic);
    ptx::launch_dependents();
    specialise<Tile>(
        shared.tile,
        [&] {
          produce<Tile>(shared.tile, p, [&](int unit) {
            return [&p, at = p.place_of(unit)](int block, typename Tile::Stage& stage, uint64_t* full) {
              const int k = block * kBlockK;
              ptx::bulk_tensor_load(stage.a, p.x, k, at.token, full);
              ptx::bulk_tensor_load(stage.b, at.source.gate, k, at.neuron, full);
              ptx::bulk_tensor_load(stage.b + kNeurons * kBlockK, at.source.up, k, at.neuron, full);
            };
          });
        },
        [&](int consumer) {
          Stores stores{shared.stores[ptx::uniform(ptx::warp_index()) - 4]};
          consume<Tile>(
              shared.tile, p, consumer,
              [&](int, auto& ring, typename Tile::Sums& sums, auto&& pass_turn) {
                multiply_blocks<Tile, Major::k, Major::k>(shared.tile, ring, sums, consumer, p.blocks, false,
                                                          pass_turn);
              },
              [&](int unit, const typename Tile::Sums& sums) {
                const Place at = p.place_of(unit);
                const int first_row = Tile::kPingPong ? 0 : consumer * Tile::kRows;
                with_activation(p.activation, [&]<Activation act>() {
                  if (p.saves) write<act, true>(stores, at.source, sums, at.token + first_row, at.neuron);
                  else write<act, false>(stores, at.source, sums, at.token + first_row, at.neuron);
                });
              });
          stores.finish();
        });
  }

 private:
  // Two neighbours of the gate or up part of the sums, rounded as they are saved: forward and backward see the same.
  static LOCAS_DEVICE uint32_t rounded_pair(float first, float second, const T* bias, int neuron, int neurons) {
    if (bias && neuron < neurons) {
      const auto pair = ptx::load(reinterpret_cast<const Elements<T, 2>*>(bias + neuron));
      first += ptx::to_float(pair.at[0]);
      second += ptx::to_float(pair.at[1]);
    }
    return ptx::pack<T>(first, second);
  }

  template <Activation act, bool saves>
  static LOCAS_DEVICE void write(Stores& stores, const Source& to, const typename Tile::Sums& sums, int token,
                                 int neuron) {
#pragma unroll
    for (int row_block = 0; row_block < Tile::kRowBlocks; ++row_block)
#pragma unroll
      for (int col = 0; col < kNeurons; col += kSlabCols) {
        if (neuron + col >= to.neurons) break;
        const int row = token + row_block * 64 + warp_row();
        const auto part = [&](int at, int first, const T* bias) {
          return rounded_pair(sums[row_block][first + at], sums[row_block][first + at + 1], bias,
                              neuron + at / 4 * 8 + ptx::lane_index() % 4 * 2, to.neurons);
        };
        const auto hidden_of = [&](int group, uint32_t (&gate)[4], uint32_t (&up)[4], uint32_t (&hidden)[4]) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int at = col / 2 + 8 * group + 2 * i;
            const uint32_t g = gate[i] = part(at, 0, to.gate_bias), u = up[i] = part(at, kNeurons / 2, to.up_bias);
            hidden[i] =
                ptx::pack<T>(to.scale * half_activation<act>(ptx::first_of<T>(g)).value * ptx::first_of<T>(u),
                             to.scale * half_activation<act>(ptx::second_of<T>(g)).value * ptx::second_of<T>(u));
          }
        };
        if constexpr (saves) {
          const auto all = [&](int group, uint32_t (&pairs)[3][4]) { hidden_of(group, pairs[0], pairs[1], pairs[2]); };
          stores.store(row, neuron + col, all, to.gate_out, to.up_out, to.hidden);
        } else {
          const auto one = [&](int group, uint32_t (&pairs)[1][4]) {
            uint32_t gate[4], up[4];
            hidden_of(group, gate, up, pairs[0]);
          };
          stores.store(row, neuron + col, one, to.hidden);
        }
      }
  }
};

template <class Tile, bool sliced>
struct GluFfnDown {
  using T = typename Tile::T;
  static constexpr const char* name = "glu_ffn_down_sm90";
  static constexpr int threads = Tile::kThreads, min_blocks = 1;
  using Output = OutputTiles<Tile, sliced>;

  struct Params : EachInTurn, Output {
    ptx::TensorMap hidden, memory_hidden, down, value;
    int host_blocks;
  };
  struct Shared {
    typename Tile::Shared tile;
    typename Output::Stores::Shared stores[Tile::kConsumers * 4];
  };

  static LOCAS_DEVICE void run(const Params& p, unsigned char* dynamic) {
    Shared& shared = *reinterpret_cast<Shared*>(dynamic);
    specialise<Tile>(
        shared.tile,
        [&] {
          ptx::wait_for_launch_before();
          produce<Tile>(shared.tile, p, [&](int unit) {
            return [&p, at = p.tile(unit)](int block, typename Tile::Stage& stage, uint64_t* full) {
              load(p, at, block, stage, full);
            };
          });
        },
        [&](int consumer) {
          typename Output::Stores stores{shared.stores[ptx::uniform(ptx::warp_index()) - 4]};
          consume<Tile>(
              shared.tile, p, consumer,
              [&](int unit, auto& ring, typename Tile::Sums& sums, auto&& pass_turn) {
                const int first = p.first_block(unit), last = p.last_block(unit);
                const int middle = first > p.host_blocks ? first : last < p.host_blocks ? last : p.host_blocks;
                multiply_blocks<Tile, Major::k, Major::k>(shared.tile, ring, sums, consumer, middle - first, false,
                                                          [&] {
                                                            if (last == middle) pass_turn();
                                                          });
                if (last > middle)
                  multiply_blocks<Tile, Major::k, Major::mn>(shared.tile, ring, sums, consumer, last - middle,
                                                             middle > first, pass_turn);
              },
              [&](int unit, const typename Tile::Sums& sums) { p.write(stores, unit, sums, consumer); });
          stores.finish();
        });
  }

 private:
  static LOCAS_DEVICE void load(const Params& p, TileIndex at, int block, typename Tile::Stage& stage, uint64_t* full) {
    const int token = at.m * Tile::kM, channel = at.n * Tile::kN;
    if (block < p.host_blocks) {
      const int k = block * kBlockK;
      ptx::bulk_tensor_load(stage.a, p.hidden, k, token, full);
      ptx::bulk_tensor_load(stage.b, p.down, k, channel, full);
    } else {
      const int k = (block - p.host_blocks) * kBlockK;
      ptx::bulk_tensor_load(stage.a, p.memory_hidden, k, token, full);
      load_mn_major<Tile>(stage, p.value, channel, k, full);
    }
  }
};

template <class Tile>
void launch_hidden(const GluFfnForwardParams& ffn, Queue queue) {
  using Kernel = GluFfnHidden<Tile>;
  using T = typename Tile::T;
  const FfnWeights& w = ffn.weights;
  const int rows = loaded_rows(Tile::kM, ffn.tokens());
  const auto source = [&](const Matrix& gate, const Matrix& up, int64_t first, int64_t neurons, const void* gate_bias,
                          const void* up_bias, float scale) {
    const auto out = [&](const Matrix& to) { return map_or_none<T>(columns_of<T>(to, first, neurons), kSlabBox); };
    const int weight_rows = loaded_rows(Kernel::kNeurons, neurons);
    return typename Kernel::Source{map_or_none<T>(gate, operand_box(weight_rows)),
                                   map_or_none<T>(up, operand_box(weight_rows)),
                                   out(ffn.hidden),
                                   out(ffn.gate),
                                   out(ffn.up),
                                   static_cast<const T*>(gate_bias),
                                   static_cast<const T*>(up_bias),
                                   static_cast<int>(neurons),
                                   bytes_of_rows<T>(rows, 2 * weight_rows),
                                   scale};
  };
  typename Kernel::Params p;
  p.x = tensor_map<T>(ffn.x, operand_box(rows));
  p.host = source(w.gate, w.up, 0, w.m(), w.gate_bias, w.up_bias, 1.0f);
  p.memory = source(w.memory_gate, w.memory_key, w.m(), w.padded_r(), nullptr, nullptr, ffn.scale);
  p.set_sizes(ffn.tokens(), w.d(), w.m(), w.padded_r());
  p.saves = ffn.gate.data != nullptr;
  p.activation = ffn.activation;
  launch_units<Kernel>(p, false, queue);
}

template <class Tile, bool sliced>
void launch_down(const GluFfnForwardParams& ffn, int splits, Queue queue) {
  using Kernel = GluFfnDown<Tile, sliced>;
  using T = typename Tile::T;
  const FfnWeights& w = ffn.weights;
  typename Kernel::Params p;
  p.host_blocks = static_cast<int>(divide_up(w.m(), kBlockK));
  p.set(ffn.y, w.down_bias, w.d(), p.host_blocks + divide_up(w.r(), kBlockK), splits, ffn.workspace);
  p.units = p.tile_units();
  p.hidden = tensor_map<T>(columns_of<T>(ffn.hidden, 0, w.m()), operand_box(p.rows));
  p.memory_hidden = map_or_none<T>(columns_of<T>(ffn.hidden, w.m(), w.padded_r()), operand_box(p.rows));
  p.down = tensor_map<T>(w.down, k_major_box<Tile>);
  p.value = map_or_none<T>(w.memory_value, kMnMajorBox);
  launch_units<Kernel>(p, true, queue);
}

}  // namespace

void glu_ffn_hidden(const GluFfnForwardParams& p, int tile, Queue queue) {
  with_half_type(p.dtype, [&]<class T>() {
    with_tile<T, kHiddenTiles, output_stage_bytes>(static_cast<TileKind>(tile),
                                                   [&]<class Tile>() { launch_hidden<Tile>(p, queue); });
  });
}

void glu_ffn_down(const GluFfnForwardParams& p, int tile, int splits, Queue queue) {
  with_half_type(p.dtype, [&]<class T>() {
    with_tile<T, kDownTiles, output_stage_bytes>(static_cast<TileKind>(tile), [&]<class Tile>() {
      with_sliced(splits, [&]<bool sliced>() { launch_down<Tile, sliced>(p, splits, queue); });
    });
    if (splits > 1) add_slices<T>({p.workspace, splits, p.weights.down_bias, p.y}, queue);
  });
}

int64_t glu_ffn_forward_workspace(int64_t tokens, const FfnSizes& sizes) {
  const int splits = down_plan(tokens, sizes).splits;
  return splits > 1 ? splits * tokens * sizes.d : 0;
}

void glu_ffn_forward_tiles(const GluFfnForwardParams& p, Queue queue) {
  const FfnSizes sizes = p.weights.sizes();
  glu_ffn_hidden(p, static_cast<int>(hidden_plan(p.tokens(), sizes).kind), queue);
  const Plan down = down_plan(p.tokens(), sizes);
  glu_ffn_down(p, static_cast<int>(down.kind), down.splits, queue);
}

}  // namespace locas::cuda::sm90
