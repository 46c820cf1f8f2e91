// glu_ffn_backward (K3 and K4): the backward of an FFN with memory. The host is frozen: gradients go to x and to the
// slots.
//
//      K3 glu_ffn_hidden_grad   d_hidden = dy [W_down | scale * V^T] stays on chip; its tile becomes d_gate and d_up
//
//           d_gate, d_up [tokens,  m host | r' memory ]     a CTA owns kM tokens x kN neurons of one part
//           memory tiles also write memory_hidden, which dV needs
//
//      K4 glu_ffn_input_and_slots_grad       one grid, two kinds of CTA
//
//           dx tiles            d_gate W_gate + d_up W_up + d_gate_memory G + d_up_memory K, one sum over four ranges
//                               of K; where the tiles are few, K is cut into slices that AddSlices adds in their order
//           slots' gradient     [d_gate_memory | d_up_memory]^T x and memory_hidden^T dy, K = tokens, added to float32
//
// Without dx (the lowest layer with a memory) only the memory's tiles exist. No atomics: a sum belongs to one CTA.
#include "common/activations.h"
#include "cuda/ffn/add_slices.cuh"
#include "cuda/ffn/sm80/plan.cuh"
#include "cuda/launch.cuh"
#include "cuda/ptx/grid.cuh"
#include "cuda/ptx/thread.cuh"

namespace locas::cuda::sm80 {
namespace {

template <class Tile>
struct GluFfnHiddenGrad {
  struct Params {
    GluFfnBackwardParams ffn;
    int tiles_m, host_tiles_n, tiles_n;
  };
  static constexpr const char* name = "glu_ffn_hidden_grad";
  static constexpr int threads = Tile::kThreads, min_blocks = 2;
  using T = typename Tile::T;
  using Shared = typename Tile::Shared;

  static LOCAS_DEVICE void run(const Params& p, unsigned char* dynamic) {
    ptx::launch_dependents();
    Shared& shared = *reinterpret_cast<Shared*>(dynamic);
    const GluFfnBackwardParams& ffn = p.ffn;
    const FfnWeights& w = ffn.weights;
    const TileIndex tile = tile_index(ptx::block_index(), p.tiles_m, p.tiles_n);
    const bool memory = tile.n >= p.host_tiles_n;
    const int first_token = tile.m * Tile::kM;
    const int first_neuron = (memory ? tile.n - p.host_tiles_n : tile.n) * Tile::kN;
    const int64_t columns = memory ? w.padded_r() : w.m();
    const auto dy = operand<T>(ffn.dy, ffn.tokens(), w.d());
    const auto down = operand<T>(w.down, w.d(), w.m());
    const auto value = operand<T>(w.memory_value, w.r(), w.d());

    Tile::product(
        shared, 0, static_cast<int>(divide_up(w.d(), kBlockK)),
        [&](int block, typename Tile::Stage& stage) {
          const int k = block * kBlockK;
          load_tile<T, Major::k, Tile::kM, threads>(stage.a, dy, first_token, k);
          if (memory) load_tile<T, Major::k, Tile::kN, threads>(stage.b, value, first_neuron, k);
          else load_tile<T, Major::mn, Tile::kN, threads>(stage.b, down, first_neuron, k);
        },
        [&](int, auto& sums, const auto& stage) {
          if (memory) Tile::template multiply<Major::k, Major::k>(sums, stage);
          else Tile::template multiply<Major::k, Major::mn>(sums, stage);
        });

    const int64_t before = memory ? w.m() : 0;
    const float scale = memory ? ffn.scale : 1.0f;
    with_activation(ffn.activation, [&]<Activation act>() {
      Tile::template for_each_piece<Tile::kN>([&](int row, int col) {
        const int token = first_token + row, neuron = first_neuron + col;
        if (token >= ffn.tokens() || neuron >= columns) return;
        const auto at = [&](const Matrix& matrix) {
          return static_cast<T*>(matrix.data) + token * matrix.stride + before + neuron;
        };
        float d_hidden[kPiece], gate[kPiece], up[kPiece], hidden[kPiece];
        load_piece(&shared.sums[row][col], d_hidden);
        load_piece(at(ffn.gate), gate);
        load_piece(at(ffn.up), up);
#pragma unroll
        for (int i = 0; i < kPiece; ++i) {
          const ValueAndSlope a = activate<act>(gate[i]);
          const float d = scale * d_hidden[i];
          hidden[i] = scale * a.value * up[i];
          gate[i] = d * up[i] * a.slope;  // from here on the gradients
          up[i] = d * a.value;
        }
        store_piece(gate, at(ffn.d_gate));
        store_piece(up, at(ffn.d_up));
        if (memory)
          store_piece(hidden, static_cast<T*>(ffn.memory_hidden.data) + token * ffn.memory_hidden.stride + neuron);
      });
    });
  }
};

template <class Tile>
struct GluFfnInputAndSlotsGrad {
  struct Params {
    GluFfnBackwardParams ffn;
    int tiles_m, tiles_n, splits;    // of dx; tiles_m is 0 without dx
    int slot_tiles_m, slot_tiles_n;  // of one of the three gradients
  };
  static constexpr const char* name = "glu_ffn_input_and_slots_grad";
  static constexpr int threads = Tile::kThreads, min_blocks = 2;
  using T = typename Tile::T;
  using Slots = SmallTile<T>;  // M over slots
  static_assert(threads == Slots::kThreads, "both kinds of CTA are of one grid");
  union Shared {
    typename Tile::Shared dx;
    typename Slots::Shared slots;
  };

  static LOCAS_DEVICE void run(const Params& p, unsigned char* dynamic) {
    ptx::launch_dependents();
    ptx::wait_for_launch_before();
    Shared& shared = *reinterpret_cast<Shared*>(dynamic);
    const int64_t dx_blocks = static_cast<int64_t>(p.tiles_m) * p.tiles_n * p.splits;
    if (ptx::block_index() < dx_blocks) dx_tile(p, shared.dx, ptx::block_index());
    else slot_tile(p, shared.slots, static_cast<int>(ptx::block_index() - dx_blocks));
  }

 private:
  static LOCAS_DEVICE void dx_tile(const Params& p, typename Tile::Shared& shared, int index) {
    const GluFfnBackwardParams& ffn = p.ffn;
    const FfnWeights& w = ffn.weights;
    const int split = index % p.splits;
    const TileIndex tile = tile_index(index / p.splits, p.tiles_m, p.tiles_n);
    const int first_token = tile.m * Tile::kM;
    const int first_col = tile.n * Tile::kN;
    const int host_blocks = static_cast<int>(divide_up(w.m(), kBlockK));
    const int memory_blocks = static_cast<int>(divide_up(w.r(), kBlockK));
    const int blocks = 2 * (host_blocks + memory_blocks);
    const int first = static_cast<int>(static_cast<int64_t>(blocks) * split / p.splits);
    const int last = static_cast<int>(static_cast<int64_t>(blocks) * (split + 1) / p.splits);

    const auto load = [&](int block, typename Tile::Stage& stage) {
      const bool memory = block >= 2 * host_blocks;
      const int within = memory ? block - 2 * host_blocks : block, half = memory ? memory_blocks : host_blocks;
      const bool of_up = within >= half;
      const int k = (of_up ? within - half : within) * kBlockK;
      const Matrix& a = of_up ? ffn.d_up : ffn.d_gate;
      const Matrix& b = memory ? (of_up ? w.memory_key : w.memory_gate) : (of_up ? w.up : w.gate);
      const auto gradient = operand<T>(a, ffn.tokens(), memory ? w.padded_r() : w.m(), memory ? w.m() : 0);
      const auto weight = operand<T>(b, memory ? w.r() : w.m(), w.d());
      load_tile<T, Major::k, Tile::kM, threads>(stage.a, gradient, first_token, k);
      load_tile<T, Major::mn, Tile::kN, threads>(stage.b, weight, first_col, k);
    };
    Tile::product(shared, first, last, load, [&](int, auto& sums, const auto& stage) {
      Tile::template multiply<Major::k, Major::mn>(sums, stage);
    });

    Tile::template for_each_piece<Tile::kN>([&](int row, int col) {
      const int token = first_token + row, channel = first_col + col;
      if (token >= ffn.tokens() || channel >= w.d()) return;
      float sum[kPiece];
      load_piece(&shared.sums[row][col], sum);
      if (p.splits > 1) store_piece(sum, ffn.workspace + (split * ffn.tokens() + token) * w.d() + channel);
      else store_piece(sum, static_cast<T*>(ffn.dx.data) + token * ffn.dx.stride + channel);
    });
  }

  static LOCAS_DEVICE void slot_tile(const Params& p, typename Slots::Shared& shared, int index) {
    const GluFfnBackwardParams& ffn = p.ffn;
    const FfnWeights& w = ffn.weights;
    const int tiles = p.slot_tiles_m * p.slot_tiles_n, kind = index / tiles;  // 0 gate, 1 key, 2 value
    const int first_slot = (index % tiles / p.slot_tiles_n) * Slots::kM;
    const int first_col = (index % tiles % p.slot_tiles_n) * Slots::kN;
    const auto coefficients = kind == 2
                                  ? operand<T>(ffn.memory_hidden, ffn.tokens(), w.padded_r())
                                  : operand<T>(kind == 0 ? ffn.d_gate : ffn.d_up, ffn.tokens(), w.padded_r(), w.m());
    const auto rows = operand<T>(kind == 2 ? ffn.dy : ffn.x, ffn.tokens(), w.d());

    Slots::product(
        shared, 0, static_cast<int>(divide_up(ffn.tokens(), kBlockK)),
        [&](int block, typename Slots::Stage& stage) {
          const int k = block * kBlockK;
          load_tile<T, Major::mn, Slots::kM, threads>(stage.a, coefficients, first_slot, k);
          load_tile<T, Major::mn, Slots::kN, threads>(stage.b, rows, first_col, k);
        },
        [&](int, auto& sums, const auto& stage) { Slots::template multiply<Major::mn, Major::mn>(sums, stage); });

    Slots::template for_each_piece<Slots::kN>([&](int row, int col) {
      const int64_t slot = first_slot + row, channel = first_col + col;
      if (slot >= w.r() || channel >= w.d()) return;
      float* gradient = static_cast<float*>(ffn.slots_grad.data) + (kind * w.r() + slot) * w.d() + channel;
      float sum[kPiece], before[kPiece];
      load_piece(&shared.sums[row][col], sum);
      load_piece(gradient, before);
#pragma unroll
      for (int i = 0; i < kPiece; ++i) sum[i] += before[i];
      store_piece(sum, gradient);
    });
  }
};

}  // namespace

int64_t glu_ffn_backward_workspace(int64_t tokens, const FfnSizes& sizes) {
  const int splits = is_cooperative_backward(tokens) ? decode_input_splits(sizes.d) : 1;
  return std::max<int64_t>(backward_plan(tokens, sizes).workspace, splits > 1 ? splits * tokens * sizes.d : 0);
}

void glu_ffn_backward(const GluFfnBackwardParams& p, Queue queue) {
  const FfnWeights& w = p.weights;
  const Plan plan = backward_plan(p.tokens(), w.sizes());
  const bool needs_dx = p.dx.data != nullptr;
  if (needs_dx && is_cooperative_backward(p.tokens()) && glu_ffn_backward_decode_cooperative(p, queue)) return;
  with_half_type(p.dtype, [&]<class T>() {
    with_hidden_tile<T>(plan.hidden, [&]<class Tile>() {
      using Kernel = GluFfnHiddenGrad<Tile>;
      const int host_tiles = needs_dx ? static_cast<int>(divide_up(w.m(), Tile::kN)) : 0;
      const typename Kernel::Params params{p, static_cast<int>(divide_up(p.tokens(), Tile::kM)), host_tiles,
                                           host_tiles + static_cast<int>(divide_up(w.padded_r(), Tile::kN))};
      launch<Kernel>(static_cast<int64_t>(params.tiles_m) * params.tiles_n, sizeof(typename Kernel::Shared), queue,
                     params);
    });
    with_tile<T>(plan.sum, [&]<class Tile>() {
      using Kernel = GluFfnInputAndSlotsGrad<Tile>;
      const int tiles_m = needs_dx ? static_cast<int>(divide_up(p.tokens(), Tile::kM)) : 0;
      const typename Kernel::Params params{p,
                                           tiles_m,
                                           static_cast<int>(divide_up(w.d(), Tile::kN)),
                                           plan.splits,
                                           static_cast<int>(divide_up(w.r(), Kernel::Slots::kM)),
                                           static_cast<int>(divide_up(w.d(), Kernel::Slots::kN))};
      const int slot_tiles = p.slots_grad.data ? 3 * params.slot_tiles_m * params.slot_tiles_n : 0;
      const int64_t blocks = static_cast<int64_t>(tiles_m) * params.tiles_n * plan.splits + slot_tiles;
      if (blocks > 0) launch<Kernel>(blocks, sizeof(typename Kernel::Shared), queue, params, {.programmatic = true});
    });
    if (needs_dx && plan.splits > 1) {
      add_slices<T>({p.workspace, plan.splits, nullptr, p.dx}, queue);
    }
  });
}

}  // namespace locas::cuda::sm80
