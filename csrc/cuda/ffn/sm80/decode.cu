// glu_ffn_forward (D1 and D2): the forward of an FFN with memory for at most 64 tokens, where streaming the weights is
// all that costs (decode.cuh).
//
//      D1 glu_ffn_decode_hidden    a CTA owns kGroups times 8 neurons, of the host or of the memory; it has 8 warps
//      D2 glu_ffn_decode_down      a CTA owns kGroups times 16 channels; it has 16 warps
//
// D2 begins while D1 still runs: it fetches what it needs first of W_down and V, then waits. What wrote V has ended, as D1
// itself is an ordinary launch. The more tokens, the more groups: each CTA reads all tokens, from the L2 cache, whatever
// it owns.
#include "cuda/ffn/sm80/decode.cuh"
#include "cuda/ptx/grid.cuh"

namespace locas::cuda::sm80 {
namespace {

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
  struct Shared {
    typename Weights::Queue::Shared queue;
    WarpSums<kGroups, kWarps> sums;
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
  struct Shared {
    typename Weights::Queue::Shared queue;
    WarpSums<kGroups, kWarps> sums;
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
  if (is_cooperative_forward(p.tokens(), p.weights.d()) && glu_ffn_forward_decode_cooperative(p, queue)) return;
  const int64_t tokens = p.tokens();
  const int hidden_groups = decode_hidden_groups(tokens, p.weights.m() + p.weights.padded_r());
  const int down_groups = decode_down_groups(tokens, p.weights.d());
  with_half_type(p.dtype, [&]<class T>() {
    if (tokens <= 8) hidden_groups == 1 ? hidden<T, 1, 1>(p, queue) : hidden<T, 1, 2>(p, queue);
    else if (tokens <= 16) hidden_groups == 2 ? hidden<T, 2, 2>(p, queue) : hidden<T, 2, 3>(p, queue);
    else if (tokens <= 32) hidden<T, 4, 3>(p, queue);
    else hidden<T, 8, 3>(p, queue);
    if (tokens <= 8) down<T, 1, 1>(p, queue);
    else if (tokens <= 16) down<T, 2, 1>(p, queue);
    else if (tokens <= 32) down_groups == 1 ? down<T, 4, 1>(p, queue) : down<T, 4, 2>(p, queue);
    else down_groups == 1 ? down<T, 8, 1>(p, queue) : down<T, 8, 2>(p, queue);
  });
}

}  // namespace locas::cuda::sm80
