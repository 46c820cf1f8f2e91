// glu_ffn_forward (K1 and K2): the forward of an FFN with memory, for many tokens.
//
//      K1 glu_ffn_hidden  hidden = scale * act(x W_gate^T) * (x W_up^T)          one product, two weights side by side
//
//           B tile [ kN/2 gate rows | kN/2 up rows ]     a CTA owns kM tokens x kN/2 neurons, so it sees both
//           hidden [tokens,  m host | r' memory ]        pre-activations of each; memory tiles read G and K instead
//
//      K2 glu_ffn_down    y = hidden [W_down^T ; V]                               one product, two K ranges
//
//           K blocks [ m: W_down, K-major | r: V, along its columns ]
//           Where the tiles are few, K is cut into slices; AddSlices adds them in their order.
//
// No atomics, and nothing depends on the device: the result repeats bit for bit.
#include "common/activations.h"
#include "cuda/ffn/add_slices.cuh"
#include "cuda/ffn/sm80/plan.cuh"
#include "cuda/launch.cuh"
#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/convert.cuh"
#include "cuda/ptx/grid.cuh"
#include "cuda/ptx/memory.cuh"
#include "cuda/ptx/thread.cuh"

namespace locas::cuda::sm80 {
namespace {

template <class Tile>
struct GluFfnHidden {
  struct Params {
    GluFfnForwardParams ffn;
    int tiles_m, host_tiles_n, tiles_n;
    float* importance;  // [tiles_m, m] out: column sums of |hidden| over the tile's tokens; may be null
  };
  static constexpr const char* name = "glu_ffn_hidden";
  static constexpr int threads = Tile::kThreads, min_blocks = 2;
  using T = typename Tile::T;
  static constexpr int kNeurons = Tile::kN / 2;
  union Shared {
    typename Tile::Shared tile;
    float column_sums[threads / (kNeurons / kPiece)][kNeurons];
  };

  static Params params(const GluFfnForwardParams& ffn, float* importance) {
    const auto host_tiles = static_cast<int>(divide_up(ffn.weights.m(), kNeurons));
    const auto memory_tiles = static_cast<int>(divide_up(ffn.weights.padded_r(), kNeurons));
    return {ffn, static_cast<int>(divide_up(ffn.tokens(), Tile::kM)), host_tiles, host_tiles + memory_tiles,
            importance};
  }

  static LOCAS_DEVICE void run(const Params& p, unsigned char* dynamic) {
    ptx::launch_dependents();
    Shared& shared = *reinterpret_cast<Shared*>(dynamic);
    const GluFfnForwardParams& ffn = p.ffn;
    const FfnWeights& w = ffn.weights;
    const TileIndex tile = tile_index(ptx::block_index(), p.tiles_m, p.tiles_n);
    const bool memory = tile.n >= p.host_tiles_n;
    const int first_token = tile.m * Tile::kM;
    const int first_neuron = (memory ? tile.n - p.host_tiles_n : tile.n) * kNeurons;
    const int64_t rows = memory ? w.r() : w.m(), columns = memory ? w.padded_r() : w.m();
    const auto x = operand<T>(ffn.x, ffn.tokens(), w.d());
    const auto gate = operand<T>(memory ? w.memory_gate : w.gate, rows, w.d());
    const auto up = operand<T>(memory ? w.memory_key : w.up, rows, w.d());

    Tile::product(
        shared.tile, 0, static_cast<int>(divide_up(w.d(), kBlockK)),
        [&](int block, typename Tile::Stage& stage) {
          const int k = block * kBlockK;
          load_tile<T, Major::k, Tile::kM, threads>(stage.a, x, first_token, k);
          load_tile<T, Major::k, kNeurons, threads>(stage.b, gate, first_neuron, k);
          load_tile<T, Major::k, kNeurons, threads>(stage.b + kNeurons * kBlockK, up, first_neuron, k);
        },
        [&](int, auto& sums, const auto& stage) { Tile::template multiply<Major::k, Major::k>(sums, stage); });

    const int64_t before = memory ? w.m() : 0;  // columns of the buffers in front of this tile's part
    const float scale = memory ? ffn.scale : 1.0f;
    float magnitudes[kPiece] = {};
    with_activation(ffn.activation, [&]<Activation act>() {
      Tile::template for_each_piece<kNeurons>([&](int row, int col) {
        const int token = first_token + row, neuron = first_neuron + col;
        if (token >= ffn.tokens() || neuron >= columns) return;
        float g[kPiece], u[kPiece], hidden[kPiece];
        load_piece(&shared.tile.sums[row][col], g);
        load_piece(&shared.tile.sums[row][kNeurons + col], u);
        if (!memory && w.gate_bias) add_piece(g, static_cast<const T*>(w.gate_bias) + neuron);
        if (!memory && w.up_bias) add_piece(u, static_cast<const T*>(w.up_bias) + neuron);
#pragma unroll
        for (int i = 0; i < kPiece; ++i) {
          // Rounded first, as they are saved: forward and backward see the same pre-activations.
          g[i] = ptx::to_float(ptx::from_float<T>(g[i]));
          u[i] = ptx::to_float(ptx::from_float<T>(u[i]));
          hidden[i] = scale * activate<act>(g[i]).value * u[i];
          magnitudes[i] += hidden[i] < 0.0f ? -hidden[i] : hidden[i];
        }
        const auto store = [&](const Matrix& to, const float (&piece)[kPiece]) {
          if (to.data) store_piece(piece, static_cast<T*>(to.data) + token * to.stride + before + neuron);
        };
        store(ffn.gate, g);
        store(ffn.up, u);
        store(ffn.hidden, hidden);
      });
    });
    if (p.importance) add_columns(shared, magnitudes, p.importance + tile.m * w.m(), first_neuron, w.m());
  }

 private:
  static LOCAS_DEVICE void add_piece(float (&piece)[kPiece], const T* bias) {
    float addend[kPiece];
    load_piece(bias, addend);
#pragma unroll
    for (int i = 0; i < kPiece; ++i) piece[i] += addend[i];
  }

  // Each thread met one group of 8 columns only, in some of the rows; their sums are added in the order of the threads.
  static LOCAS_DEVICE void add_columns(Shared& shared, const float (&magnitudes)[kPiece], float* to, int64_t first,
                                       int64_t columns) {
    constexpr int kPieces = kNeurons / kPiece, kLanes = threads / kPieces;
    static_assert(threads % kPieces == 0);
    const int thread = ptx::thread_index();
    ptx::sync_threads();  // all are done with the tile's sums
    store_piece(magnitudes, &shared.column_sums[thread / kPieces][thread % kPieces * kPiece]);
    ptx::sync_threads();
    if (thread >= kNeurons || first + thread >= columns) return;
    float sum = 0.0f;
    for (int lane = 0; lane < kLanes; ++lane) sum += ptx::load(&shared.column_sums[lane][thread]);
    ptx::store(to + first + thread, sum);
  }
};

template <class Tile>
struct GluFfnDown {
  struct Params {
    GluFfnForwardParams ffn;
    int tiles_m, tiles_n, splits;
  };
  static constexpr const char* name = "glu_ffn_down";
  static constexpr int threads = Tile::kThreads, min_blocks = 2;
  using T = typename Tile::T;
  using Shared = typename Tile::Shared;

  static LOCAS_DEVICE void run(const Params& p, unsigned char* dynamic) {
    ptx::launch_dependents();
    ptx::wait_for_launch_before();
    Shared& shared = *reinterpret_cast<Shared*>(dynamic);
    const GluFfnForwardParams& ffn = p.ffn;
    const FfnWeights& w = ffn.weights;
    const int split = ptx::block_index() % p.splits;
    const TileIndex tile = tile_index(ptx::block_index() / p.splits, p.tiles_m, p.tiles_n);
    const int first_token = tile.m * Tile::kM;
    const int first_col = tile.n * Tile::kN;
    const auto host_hidden = operand<T>(ffn.hidden, ffn.tokens(), w.m());
    const auto memory_hidden = operand<T>(ffn.hidden, ffn.tokens(), w.padded_r(), w.m());
    const auto down = operand<T>(w.down, w.d(), w.m());
    const auto value = operand<T>(w.memory_value, w.r(), w.d());
    const int host_blocks = static_cast<int>(divide_up(w.m(), kBlockK));
    const int blocks = host_blocks + static_cast<int>(divide_up(w.r(), kBlockK));
    const int first = static_cast<int>(static_cast<int64_t>(blocks) * split / p.splits);
    const int last = static_cast<int>(static_cast<int64_t>(blocks) * (split + 1) / p.splits);

    Tile::product(
        shared, first, last,
        [&](int block, typename Tile::Stage& stage) {
          if (block < host_blocks) {
            const int k = block * kBlockK;
            load_tile<T, Major::k, Tile::kM, threads>(stage.a, host_hidden, first_token, k);
            load_tile<T, Major::k, Tile::kN, threads>(stage.b, down, first_col, k);
          } else {
            const int k = (block - host_blocks) * kBlockK;
            load_tile<T, Major::k, Tile::kM, threads>(stage.a, memory_hidden, first_token, k);
            load_tile<T, Major::mn, Tile::kN, threads>(stage.b, value, first_col, k);
          }
        },
        [&](int block, auto& sums, const auto& stage) {
          if (block < host_blocks) Tile::template multiply<Major::k, Major::k>(sums, stage);
          else Tile::template multiply<Major::k, Major::mn>(sums, stage);
        });

    Tile::template for_each_piece<Tile::kN>([&](int row, int col) {
      const int token = first_token + row, channel = first_col + col;
      if (token >= ffn.tokens() || channel >= w.d()) return;
      float sum[kPiece];
      load_piece(&shared.sums[row][col], sum);
      if (p.splits > 1) {
        store_piece(sum, ffn.workspace + (split * ffn.tokens() + token) * w.d() + channel);
        return;
      }
      if (w.down_bias) {
        float bias[kPiece];
        load_piece(static_cast<const T*>(w.down_bias) + channel, bias);
#pragma unroll
        for (int i = 0; i < kPiece; ++i) sum[i] += bias[i];
      }
      store_piece(sum, static_cast<T*>(ffn.y.data) + token * ffn.y.stride + channel);
    });
  }
};

// The mean over all tokens from the column sums of the tiles, added in their order.
struct MeanParams {
  Matrix sums;  // float32 [tiles, m]
  float* mean;  // [m] out
  int64_t tokens;
};

struct NeuronImportanceMean {
  using Params = MeanParams;
  static constexpr const char* name = "neuron_importance_mean";
  static constexpr int threads = 256, min_blocks = 1;

  static LOCAS_DEVICE void run(const Params& p, unsigned char*) {
    const int64_t neuron = static_cast<int64_t>(ptx::block_index()) * threads + ptx::thread_index();
    if (neuron >= p.sums.cols) return;
    float sum = 0.0f;
    for (int64_t tile = 0; tile < p.sums.rows; ++tile) sum += ptx::load(p.sums.at<const float>(tile, neuron));
    ptx::store(p.mean + neuron, sum / static_cast<float>(p.tokens));
  }
};

template <class Tile>
void hidden_tiles(const GluFfnForwardParams& ffn, float* importance, Queue queue) {
  using Kernel = GluFfnHidden<Tile>;
  const auto p = Kernel::params(ffn, importance);
  launch<Kernel>(static_cast<int64_t>(p.tiles_m) * p.tiles_n, sizeof(typename Kernel::Shared), queue, p);
}

template <class Tile>
void down_tiles(const GluFfnForwardParams& ffn, int splits, Queue queue) {
  using Kernel = GluFfnDown<Tile>;
  const typename Kernel::Params p{ffn, static_cast<int>(divide_up(ffn.tokens(), Tile::kM)),
                                  static_cast<int>(divide_up(ffn.weights.d(), Tile::kN)), splits};
  launch<Kernel>(static_cast<int64_t>(p.tiles_m) * p.tiles_n * splits, sizeof(typename Kernel::Shared), queue, p,
                 {.programmatic = true});
}

}  // namespace

int64_t glu_ffn_tiles_workspace(int64_t tokens, const FfnSizes& sizes) { return forward_plan(tokens, sizes).workspace; }

int64_t glu_ffn_forward_workspace(int64_t tokens, const FfnSizes& sizes) {
  return is_decode(tokens) ? 0 : glu_ffn_tiles_workspace(tokens, sizes);
}

void glu_ffn_forward_tiles(const GluFfnForwardParams& p, Queue queue) {
  const FfnWeights& w = p.weights;
  const Plan plan = forward_plan(p.tokens(), w.sizes());
  with_half_type(p.dtype, [&]<class T>() {
    with_hidden_tile<T>(plan.hidden, [&]<class Tile>() {
      if constexpr (Tile::kM > 16) hidden_tiles<Tile>(p, nullptr, queue);
    });
    with_tile<T>(plan.sum, [&]<class Tile>() {
      if constexpr (Tile::kM > 16) down_tiles<Tile>(p, plan.splits, queue);
    });
    if (plan.splits > 1) {
      add_slices<T>({p.workspace, plan.splits, w.down_bias, p.y}, queue);
    }
  });
}

void glu_ffn_forward(const GluFfnForwardParams& p, Queue queue) {
  if (is_decode(p.tokens())) glu_ffn_forward_decode(p, queue);
  else glu_ffn_forward_tiles(p, queue);
}

int64_t neuron_importance_workspace(int64_t tokens, int64_t m) { return divide_up(tokens, kImportanceRows) * m; }

void neuron_importance(const NeuronImportanceParams& p, Queue queue) {
  GluFfnForwardParams ffn{};  // hidden, gate and up stay null: nothing of [tokens, m] is written
  ffn.weights = p.weights;
  ffn.x = p.x;
  ffn.scale = 1.0f;
  ffn.activation = p.activation;
  ffn.dtype = p.dtype;
  with_half_type(p.dtype, [&]<class T>() {
    static_assert(SmallTile<T>::kM == kImportanceRows);
    hidden_tiles<SmallTile<T>>(ffn, p.workspace, queue);
  });
  const int64_t m = p.weights.m();
  const MeanParams mean{{p.workspace, divide_up(p.tokens(), kImportanceRows), m, m}, p.importance, p.tokens()};
  launch<NeuronImportanceMean>(divide_up(m, NeuronImportanceMean::threads), 0, queue, mean);
}

}  // namespace locas::cuda::sm80
