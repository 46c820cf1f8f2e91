// glu_ffn_forward (D1 and D2): the forward of an FFN with memory for at most 64 tokens, where streaming the weights is
// all that costs (decode.cuh). A lane's weights go through a place of its own in shared memory, past all other lanes.
//
//      D1 glu_ffn_decode_hidden    a CTA owns kGroups times 8 neurons, of the host or of the memory; it has 8 warps
//      D2 glu_ffn_decode_down      a CTA owns kGroups times 16 channels; it has 16 warps
//
//      hidden   A fragment [ 8 gate rows ]      c0, c1: gate of slot l / 4 for two tokens
//                          [ 8 up rows   ]      c2, c3: up of the same slot and tokens
//
//      down     A fragment [ 16 rows of W_down ], then [ 16 columns of V ]
//
// D2 begins while D1 still runs: it fetches what it needs first of W_down and V, then waits. What wrote V has ended, as D1
// itself is an ordinary launch. The more tokens, the more groups: each CTA reads all tokens, from the L2 cache, whatever
// it owns.
#include "cuda/ffn/sm80/decode.cuh"
#include "cuda/launch.cuh"
#include "cuda/ptx/copy_async.cuh"
#include "cuda/ptx/grid.cuh"

namespace locas::cuda::sm80 {
namespace {

// A lane's weights on their way through shared memory, kDepth steps ahead of their use: the step that is taken makes room
// for the one that is copied next. A lane reads only what it has copied itself, so that no lane waits for another one. In
// registers nothing would be ahead: mma.sync wants the words of two rows side by side, and the compiler moves them there,
// that is waits for them, right behind the load.
template <class T, int kRows, int kDepth, int kThreads>
class PieceQueue {
 public:
  struct Shared {
    Vec16 pieces[kDepth][kRows][kThreads];
  };

  explicit LOCAS_DEVICE PieceQueue(Shared& shared) : shared_(shared) {}

  LOCAS_DEVICE void take(Vec16 (&pieces)[kRows]) {
    ptx::cp_async_wait<kDepth - 1>();
#pragma unroll
    for (int row = 0; row < kRows; ++row) pieces[row] = ptx::load(&shared_.pieces[place_][row][ptx::thread_index()]);
  }
  // The pieces at k of some rows (null: zeros), if there are any.
  LOCAS_DEVICE void copy(const T* const (&rows)[kRows], int k, bool exist) {
#pragma unroll
    for (int row = 0; row < kRows; ++row)
      ptx::cp_async_16(&shared_.pieces[place_][row][ptx::thread_index()], rows[row] + k, rows[row] != nullptr && exist);
  }
  // Behind each step that was copied, and as often where none is left, so that the wait counts right.
  LOCAS_DEVICE void advance() {
    ptx::cp_async_commit();
    place_ = place_ + 1 == kDepth ? 0 : place_ + 1;
  }

 private:
  Shared& shared_;
  int place_ = 0;
};

// A lane's rows of weights for the neurons from `first` on, up to `end`: gate, up, gate, up, ...; null: zeros.
template <class T, int kGroups>
LOCAS_DEVICE void rows_of_hidden(const FfnWeights& w, int first, int end, const T* (&rows)[2 * kGroups]) {
#pragma unroll
  for (int group = 0; group < kGroups; ++group) {
    const int neuron = first + group * kStrip + ptx::lane_index() / 4;
    const bool memory = neuron >= w.m();
    const int64_t row = memory ? neuron - w.m() : neuron;
    const bool exists = neuron < end && row < (memory ? w.r() : w.m());
    const auto row_of = [&](const Matrix& weight) {
      return exists ? static_cast<const T*>(weight.data) + row * weight.stride : nullptr;
    };
    rows[2 * group] = row_of(memory ? w.memory_gate : w.gate);
    rows[2 * group + 1] = row_of(memory ? w.memory_key : w.up);
  }
}

// The same of W_down for channels.
template <class T, int kGroups>
LOCAS_DEVICE void rows_of_down(const FfnWeights& w, int first, int end, const T* (&rows)[2 * kGroups]) {
#pragma unroll
  for (int row = 0; row < 2 * kGroups; ++row) {
    const int channel = first + row * kStrip + ptx::lane_index() / 4;
    rows[row] = channel < end ? static_cast<const T*>(w.down.data) + channel * w.down.stride : nullptr;
  }
}

// From the warps' sums to what is stored of a neuron and a token.
template <class T, int kBlocks, int kTokenBlocks, int kGroups, int kWarps>
LOCAS_DEVICE void finish_hidden(const GluFfnForwardParams& p, WarpSums<kBlocks, kGroups, kWarps>& shared,
                                const Sums<kTokenBlocks, kGroups>& sums, int first, int end) {
  const FfnWeights& w = p.weights;
  with_activation(p.activation, [&]<Activation act>() {
    shared.template finish<kGroups * kStrip>(sums, [&](int, const Place& place) {
      const int token = place.token, neuron = first + place.row;
      if (token >= p.tokens() || neuron >= end) return;
      const int group = place.row / kStrip, slot = place.row % kStrip;
      float gate = shared.total(group, slot, token, 0.0f), up = shared.total(group, 8 + slot, token, 0.0f);
      const bool memory = neuron >= w.m();
      if (!memory && w.gate_bias) gate += ptx::to_float(ptx::load(static_cast<const T*>(w.gate_bias) + neuron));
      if (!memory && w.up_bias) up += ptx::to_float(ptx::load(static_cast<const T*>(w.up_bias) + neuron));
      const T rounded_gate = ptx::from_float<T>(gate), rounded_up = ptx::from_float<T>(up);
      const float hidden =
          (memory ? p.scale : 1.0f) * activate<act>(ptx::to_float(rounded_gate)).value * ptx::to_float(rounded_up);
      const auto store = [&](const Matrix& to, T value) {
        if (to.data) ptx::store(static_cast<T*>(to.data) + token * to.stride + neuron, value);
      };
      store(p.gate, rounded_gate);
      store(p.up, rounded_up);
      store(p.hidden, ptx::from_float<T>(hidden));
    });
  });
}

// The same of a channel and a token.
template <class T, int kBlocks, int kTokenBlocks, int kGroups, int kWarps>
LOCAS_DEVICE void finish_down(const GluFfnForwardParams& p, WarpSums<kBlocks, kGroups, kWarps>& shared,
                              const Sums<kTokenBlocks, kGroups>& sums, int first, int end) {
  const void* bias = p.weights.down_bias;
  shared.template finish<kGroups * 16>(sums, [&](int, const Place& place) {
    const int token = place.token, channel = first + place.row;
    if (token >= p.tokens() || channel >= end) return;
    const float start = bias ? ptx::to_float(ptx::load(static_cast<const T*>(bias) + channel)) : 0.0f;
    const float sum = shared.total(place.row / 16, place.row % 16, token, start);
    ptx::store(static_cast<T*>(p.y.data) + token * p.y.stride + channel, ptx::from_float<T>(sum));
  });
}

// The memory's part of the down product. V lies the other way round, [r, d], and is turned when it is used; of the first 16
// slots that a warp has it is under way long before.
template <class T, int kGroups, int kWarps>
struct MemoryValues {
  uint32_t at[kGroups][4];

  LOCAS_DEVICE void load(const FfnWeights& w, int first, int end, int slot = ptx::warp_index() * 16) {
#pragma unroll
    for (int group = 0; group < kGroups; ++group)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int64_t row = slot + ptx::lane_index() / 4 + i / 2 * 8;
        const int channel = first + group * 16 + ptx::lane_index() % 4 * 2 + i % 2 * 8;
        const T* pair = static_cast<const T*>(w.memory_value.data) + row * w.memory_value.stride + channel;
        at[group][i] = row < w.r() && channel < end ? ptx::load(reinterpret_cast<const uint32_t*>(pair)) : 0;
      }
  }

  // After load: adds all of the warp's slots to the sums.
  template <int kTokenBlocks>
  LOCAS_DEVICE void add_to(Sums<kTokenBlocks, kGroups>& sums, const GluFfnForwardParams& p, int first, int end) {
    const FfnWeights& w = p.weights;
    for (int slot = ptx::warp_index() * 16; slot < w.padded_r();) {
#pragma unroll
      for (int group = 0; group < kGroups; ++group)
#pragma unroll
        for (int i = 0; i < 4; ++i) at[group][i] = ptx::movmatrix_trans(at[group][i]);
#pragma unroll
      for (int block = 0; block < kTokenBlocks; ++block) {
        const int64_t token = block * 8 + ptx::lane_index() / 4;
        const auto hidden = [&](int slot) -> uint32_t {
          if (token >= p.tokens() || slot >= w.padded_r()) return 0;
          const T* row = static_cast<const T*>(p.hidden.data) + token * p.hidden.stride + w.m();
          return ptx::load(reinterpret_cast<const uint32_t*>(row + slot));
        };
        const int pair = slot + ptx::lane_index() % 4 * 2;
        const uint32_t low = hidden(pair), high = hidden(pair + 8);
#pragma unroll
        for (int group = 0; group < kGroups; ++group) ptx::mma_m16n8k16<T>(sums.at[block][group], at[group], low, high);
      }
      slot += kWarps * 16;
      if (slot < w.padded_r()) load(w, first, end, slot);
    }
  }
};

// The weights of the rows that a CTA owns, of which its warps take turns along k.
template <class T, int kGroups, int kWarps>
struct WeightStream {
  static constexpr int kStride = kWarps * kStep;
  static constexpr int kDepth = kGroups == 1 ? 4 : 2;  // at most 64 KB, which every GPU has
  using Queue = PieceQueue<T, 2 * kGroups, kDepth, kWarps * 32>;
  Queue queue;
  const T* rows[2 * kGroups];  // null: zeros
  int width, next = ptx::warp_index() * kStep + lane_offset();

  LOCAS_DEVICE WeightStream(typename Queue::Shared& shared, int64_t width)
      : queue(shared), width(static_cast<int>(width)) {}

  LOCAS_DEVICE void start() {
#pragma unroll
    for (int i = 0; i < kDepth; ++i) copy_next();
  }

  template <int kTokenBlocks>
  LOCAS_DEVICE void add_to(Sums<kTokenBlocks, kGroups>& sums, const TokenRows<T>& tokens) {
    add_steps<T, kStride>(sums, tokens, [&](Vec16(&pieces)[2 * kGroups]) {
      queue.take(pieces);
      copy_next();
    });
    ptx::cp_async_wait<0>();  // the sums of all warps take the queue's place
  }

 private:
  LOCAS_DEVICE void copy_next() {
    queue.copy(rows, next, next < width);
    queue.advance();
    next += kStride;
  }
};

template <class T_, int kTokenBlocks, int kGroups>
struct GluFfnDecodeHidden {
  using T = T_;
  using Params = GluFfnForwardParams;
  static constexpr const char* name = "glu_ffn_decode_hidden";
  static constexpr int threads = 256, min_blocks = decode_hidden_residents(8 * kTokenBlocks);
  static constexpr int kWarps = threads / 32, kNeurons = kStrip * kGroups;
  using Weights = WeightStream<T, kGroups, kWarps>;
  union Shared {
    typename Weights::Queue::Shared queue;
    WarpSums<kTokenBlocks <= 4 ? kTokenBlocks : 4, kGroups, kWarps> sums;
  };

  static LOCAS_DEVICE void run(const Params& p, unsigned char* dynamic) {
    ptx::launch_dependents();
    Shared& shared = *reinterpret_cast<Shared*>(dynamic);
    const FfnWeights& w = p.weights;
    const int first = ptx::block_index() * kNeurons, end = static_cast<int>(w.m() + w.padded_r());
    Weights weights(shared.queue, w.d());
    rows_of_hidden<T, kGroups>(w, first, end, weights.rows);
    weights.start();
    Sums<kTokenBlocks, kGroups> sums;
    weights.add_to(sums, TokenRows<T>(p.x, p.tokens(), w.d()));
    finish_hidden<T>(p, shared.sums, sums, first, end);
  }
};

template <class T_, int kTokenBlocks, int kGroups>
struct GluFfnDecodeDown {
  using T = T_;
  using Params = GluFfnForwardParams;
  static constexpr const char* name = "glu_ffn_decode_down";
  static constexpr int threads = 512, min_blocks = 1;
  static constexpr int kWarps = threads / 32, kChannels = 16 * kGroups;
  using Weights = WeightStream<T, kGroups, kWarps>;
  union Shared {
    typename Weights::Queue::Shared queue;
    WarpSums<kTokenBlocks <= 4 ? kTokenBlocks : 4, kGroups, kWarps> sums;
  };

  static LOCAS_DEVICE void run(const Params& p, unsigned char* dynamic) {
    Shared& shared = *reinterpret_cast<Shared*>(dynamic);
    const FfnWeights& w = p.weights;
    const int first = ptx::block_index() * kChannels, end = static_cast<int>(w.d());
    Weights weights(shared.queue, w.m());
    rows_of_down<T, kGroups>(w, first, end, weights.rows);
    weights.start();
    MemoryValues<T, kGroups, kWarps> values;
    values.load(w, first, end);
    const TokenRows<T> tokens(p.hidden, p.tokens(), w.m());
    ptx::wait_for_launch_before();  // for `hidden`

    Sums<kTokenBlocks, kGroups> sums;
    weights.add_to(sums, tokens);
    values.add_to(sums, p, first, end);
    finish_down<T>(p, shared.sums, sums, first, end);
  }
};

template <class T, int kTokenBlocks, int kGroups>
void hidden(const GluFfnForwardParams& p, Queue queue) {
  using Kernel = GluFfnDecodeHidden<T, kTokenBlocks, kGroups>;
  const int64_t neurons = p.weights.m() + p.weights.padded_r();
  launch<Kernel>(divide_up(neurons, Kernel::kNeurons), sizeof(typename Kernel::Shared), queue, p);
}

template <class T, int kTokenBlocks, int kGroups>
void down(const GluFfnForwardParams& p, Queue queue) {
  using Kernel = GluFfnDecodeDown<T, kTokenBlocks, kGroups>;
  launch<Kernel>(divide_up(p.weights.d(), Kernel::kChannels), sizeof(typename Kernel::Shared), queue, p,
                 {.programmatic = true});
}

}  // namespace

void glu_ffn_forward_decode(const GluFfnForwardParams& p, Queue queue) {
  const int64_t tokens = p.tokens();
  const int hidden_groups = decode_hidden_groups(tokens, p.weights.m() + p.weights.padded_r());
  const int down_groups = decode_down_groups(p.weights.d());
  with_half_type(p.dtype, [&]<class T>() {
    if (tokens <= 8) hidden_groups == 1 ? hidden<T, 1, 1>(p, queue) : hidden<T, 1, 2>(p, queue);
    else if (tokens <= 16) hidden_groups == 2 ? hidden<T, 2, 2>(p, queue) : hidden<T, 2, 3>(p, queue);
    else if (tokens <= 32) hidden_groups == 2 ? hidden<T, 4, 2>(p, queue) : hidden<T, 4, 3>(p, queue);
    else hidden<T, 8, 3>(p, queue);
    if (tokens <= 8) down<T, 1, 1>(p, queue);
    else if (tokens <= 16) down<T, 2, 1>(p, queue);
    else if (tokens <= 32) down<T, 4, 1>(p, queue);
    else down_groups == 1 ? down<T, 8, 1>(p, queue) : down<T, 8, 2>(p, queue);
  });
}

}  // namespace locas::cuda::sm80
