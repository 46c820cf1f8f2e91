// glu_ffn_forward (D1 and D2): the forward of an FFN with memory for at most 64 tokens, where streaming the weights is
// all that costs (decode.cuh).
//
//      D1 glu_ffn_decode_hidden    a CTA owns kGroups times 8 neurons, of the host or of the memory; it has 8 warps
//      D2 glu_ffn_decode_down      a CTA owns kGroups times 16 channels; it has 16 warps
//
// D2 begins while D1 still runs: it fetches what it needs first of W_down, then waits. Never of V, which an update may
// just have written. The more tokens, the more groups: each CTA reads all tokens, from the L2 cache, whatever it owns.
#include "cuda/ffn/sm80/decode.cuh"
#include "cuda/ptx/grid.cuh"

namespace locas::cuda::sm80 {
namespace {

// A warp's share of some rows of weights on their way into registers, kAhead steps before they are used. The warps take
// turns along the rows.
template <class T, int kRows, int kAhead, int kWarps>
struct WeightStream {
  static constexpr int kStride = kWarps * kStep;
  const T* rows[kRows];  // null: zeros
  int width;
  Vec16 ahead[kAhead][kRows];

  LOCAS_DEVICE void start() {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) load(ahead[i], ptx::warp_index() * kStep + i * kStride);
  }

  // use(k, pieces) for every step: the lane's pieces of all rows, at its k.
  template <class Use>
  LOCAS_DEVICE void run(Use&& use) {
#pragma unroll 1
    for (int first = ptx::warp_index() * kStep; first < width; first += kAhead * kStride) {
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const int step = first + i * kStride;
        if (step >= width) break;
        if constexpr (kAhead == 1) {  // registers are short: the next ones take the place of those used
          use(step + lane_offset(), ahead[i]);
          load(ahead[i], step + kStride);
        } else {
          Vec16 pieces[kRows];
#pragma unroll
          for (int row = 0; row < kRows; ++row) pieces[row] = ahead[i][row];
          load(ahead[i], step + kAhead * kStride);
          use(step + lane_offset(), pieces);
        }
      }
    }
  }

  template <int kTokenBlocks>
  LOCAS_DEVICE void add_to(Sums<kTokenBlocks, kRows / 2>& sums, const TokenRows<T>& tokens) {
    run([&](int k, const Vec16(&pieces)[kRows]) {
      tokens.template at<kTokenBlocks>(
          k, [&](int block, const Vec16& token) { sums.template add<T>(block, pieces, token); });
    });
  }

 private:
  LOCAS_DEVICE void load(Vec16 (&pieces)[kRows], int step) const {
    const int k = step + lane_offset();
#pragma unroll
    for (int row = 0; row < kRows; ++row)
      pieces[row] =
          rows[row] == nullptr || k >= width ? zeros() : ptx::load_once(reinterpret_cast<const Vec16*>(rows[row] + k));
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
  using Shared = WarpSums<kGroups, kWarps>;

  static LOCAS_DEVICE void run(const Params& p, unsigned char* dynamic) {
    ptx::launch_dependents();
    const FfnWeights& w = p.weights;
    const int first = ptx::block_index() * kNeurons, end = static_cast<int>(w.m() + w.padded_r());
    WeightStream<T, 2 * kGroups, 4 / kGroups, kWarps> weights;
    weights.width = static_cast<int>(w.d());
    rows_of_hidden<T, kGroups>(w, first, end, weights.rows);
    weights.start();
    Sums<kTokenBlocks, kGroups> sums;
    weights.add_to(sums, TokenRows<T>(p.x, p.tokens(), w.d()));
    finish_hidden<T>(p, *reinterpret_cast<Shared*>(dynamic), sums, first, end);
  }
};

template <class T_, int kTokenBlocks, int kGroups>
struct GluFfnDecodeDown {
  using T = T_;
  using Params = GluFfnForwardParams;
  static constexpr const char* name = "glu_ffn_decode_down";
  static constexpr int threads = 512, min_blocks = 1;
  static constexpr int kWarps = threads / 32, kChannels = 16 * kGroups;
  static constexpr int kAhead = kTokenBlocks > 4 ? 1 : kTokenBlocks > 2 ? 2 : 4;
  using Shared = WarpSums<kGroups, kWarps>;

  static LOCAS_DEVICE void run(const Params& p, unsigned char* dynamic) {
    const FfnWeights& w = p.weights;
    const int first = ptx::block_index() * kChannels, end = static_cast<int>(w.d());
    Sums<kTokenBlocks, kGroups> sums;
    add_host(p, sums, first, end);
    MemoryValues<T, kGroups, kWarps> values;
    values.load(w, first, end);
    values.add_to(sums, p, first, end);
    finish_down<T>(p, *reinterpret_cast<Shared*>(dynamic), sums, first, end);
  }

 private:
  static LOCAS_DEVICE void add_host(const Params& p, Sums<kTokenBlocks, kGroups>& sums, int first, int end) {
    const FfnWeights& w = p.weights;
    WeightStream<T, 2 * kGroups, kAhead, kWarps> weights;
    weights.width = static_cast<int>(w.m());
    rows_of_down<T, kGroups>(w, first, end, weights.rows);
    weights.start();
    const TokenRows<T> tokens(p.hidden, p.tokens(), w.m());
    ptx::wait_for_launch_before();  // for `hidden`
    weights.add_to(sums, tokens);
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
