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

template <class T_, int kTokenBlocks>
struct GluFfnDecodeHidden {
  using T = T_;
  using Params = GluFfnForwardParams;
  static constexpr const char* name = "glu_ffn_decode_hidden";
  static constexpr int threads = 256, min_blocks = kTokenBlocks == 1 ? 3 : kTokenBlocks <= 4 ? 2 : 1;
  static constexpr int kGroups = kTokenBlocks == 1 ? 1 : kTokenBlocks == 2 ? 2 : 3;
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

template <class T, int kTokenBlocks, int kDownGroups>
void decode(const GluFfnForwardParams& p, Queue queue) {
  using Hidden = GluFfnDecodeHidden<T, kTokenBlocks>;
  using Down = GluFfnDecodeDown<T, kTokenBlocks, kDownGroups>;
  const FfnWeights& w = p.weights;
  launch<Hidden>(divide_up(w.m() + w.padded_r(), Hidden::kNeurons), sizeof(typename Hidden::Shared), queue, p);
  launch<Down>(divide_up(w.d(), Down::kChannels), sizeof(typename Down::Shared), queue, p, {.programmatic = true});
}

}  // namespace

void glu_ffn_forward_decode(const GluFfnForwardParams& p, Queue queue) {
  if (is_cooperative_forward(p.tokens(), p.weights.d()) && glu_ffn_forward_decode_cooperative(p, queue)) return;
  with_half_type(p.dtype, [&]<class T>() {
    if (p.tokens() <= 8) return decode<T, 1, 1>(p, queue);
    if (p.tokens() <= 16) return decode<T, 2, 1>(p, queue);
    const bool wide = decode_down_groups(p.tokens(), p.weights.d()) == 2;
    if (p.tokens() <= 32) return wide ? decode<T, 4, 2>(p, queue) : decode<T, 4, 1>(p, queue);
    return wide ? decode<T, 8, 2>(p, queue) : decode<T, 8, 1>(p, queue);
  });
}

}  // namespace locas::cuda::sm80
