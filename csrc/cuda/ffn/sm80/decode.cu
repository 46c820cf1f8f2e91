// glu_ffn_forward (D1 and D2): the forward of an FFN with memory for at most 64 tokens, where streaming the weights is
// all that costs.
//
//      The weights are the A operand of mma.sync, tokens its 8 columns, and weights go from global memory straight into
//      registers: within 32 of k, lane l reads 16 bytes at k = 8 (l % 4), and both operands use k in that order.
//
//      D1 glu_ffn_decode_hidden   A fragment [ 8 gate rows ]      c0, c1: gate of slot l / 4 for two tokens
//                                           [ 8 up rows   ]      c2, c3: up of the same slot and tokens
//
//           a CTA owns kGroups times 8 neurons, of the host or of the memory; its 8 warps share k
//
//      D2 glu_ffn_decode_down    A fragment [ 16 rows of W_down ], then [ 16 columns of V ]
//
//           a CTA owns kGroups times 16 channels; its 16 warps share k
//
// D2 begins while D1 still runs: it fetches what it needs first of W_down, then waits. Never of V, which an update may
// just have written. The more tokens, the more groups: each CTA reads all tokens, from the L2 cache, whatever it owns.
// The warps' sums are added in their order: the result repeats bit for bit.
#include "common/activations.h"
#include "cuda/common/elements.cuh"
#include "cuda/ffn/sm80/plan.cuh"
#include "cuda/launch.cuh"
#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/convert.cuh"
#include "cuda/ptx/grid.cuh"
#include "cuda/ptx/memory.cuh"
#include "cuda/ptx/mma.cuh"
#include "cuda/ptx/thread.cuh"
#include "cuda/ptx/types.cuh"

namespace locas::cuda::sm80 {
namespace {

constexpr int kStep = 32;  // of k that a warp takes at once

// Words 0, 1 of two rows make the first k16 fragment, words 2, 3 the second.
template <class T>
LOCAS_DEVICE void multiply_step(float (&sums)[4], const Vec16& low, const Vec16& high, const Vec16& tokens) {
  ptx::mma_m16n8k16<T>(sums, {low.word[0], high.word[0], low.word[1], high.word[1]}, tokens.word[0], tokens.word[1]);
  ptx::mma_m16n8k16<T>(sums, {low.word[2], high.word[2], low.word[3], high.word[3]}, tokens.word[2], tokens.word[3]);
}

LOCAS_DEVICE Vec16 zeros() { return Vec16{{0, 0, 0, 0}}; }

// The rows of tokens, of which lane l reads the pieces of l / 4, l / 4 + 8, ...; zeros where there is none.
template <class T>
struct TokenRows {
  const T* first;
  int64_t stride;
  int tokens, width;

  LOCAS_DEVICE TokenRows(const Matrix& from, int64_t tokens, int64_t width)
      : first(static_cast<const T*>(from.data) + ptx::lane_index() / 4 * from.stride), stride(8 * from.stride),
        tokens(static_cast<int>(tokens) - ptx::lane_index() / 4), width(static_cast<int>(width)) {}

  // use(block, piece) for every 8 tokens.
  template <int kBlocks, class Use>
  LOCAS_DEVICE void at(int k, Use&& use) const {
    const T* from = first + k;
#pragma unroll
    for (int block = 0; block < kBlocks; ++block, from += stride)
      use(block, 8 * block < tokens && k < width ? ptx::load(reinterpret_cast<const Vec16*>(from)) : zeros());
  }
};

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

 private:
  static LOCAS_DEVICE int lane_offset() { return ptx::lane_index() % 4 * kPiece; }
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
  static constexpr int kWarps = threads / 32, kNeurons = 8 * kGroups;
  struct Shared {
    float sums[kWarps][kGroups][4][32];
  };

  static LOCAS_DEVICE void run(const Params& p, unsigned char* dynamic) {
    ptx::launch_dependents();
    Shared& shared = *reinterpret_cast<Shared*>(dynamic);
    const FfnWeights& w = p.weights;
    const int warp = ptx::warp_index(), lane = ptx::lane_index();
    const int64_t first = static_cast<int64_t>(ptx::block_index()) * kNeurons;
    constexpr int kAhead = 4 / kGroups;
    WeightStream<T, 2 * kGroups, kAhead, kWarps> weights;  // gate, up, gate, up, ...
    weights.width = static_cast<int>(w.d());
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      const int64_t neuron = first + group * 8 + lane / 4;
      const bool memory = neuron >= w.m();
      const int64_t row = memory ? neuron - w.m() : neuron;
      const bool exists = row < (memory ? w.r() : w.m());
      const auto row_of = [&](const Matrix& weight) {
        return exists ? static_cast<const T*>(weight.data) + row * weight.stride : nullptr;
      };
      weights.rows[2 * group] = row_of(memory ? w.memory_gate : w.gate);
      weights.rows[2 * group + 1] = row_of(memory ? w.memory_key : w.up);
    }
    weights.start();
    const TokenRows<T> tokens(p.x, p.tokens(), w.d());

    float sums[kTokenBlocks][kGroups][4] = {};
    weights.run([&](int k, const Vec16(&pieces)[2 * kGroups]) {
      tokens.template at<kTokenBlocks>(k, [&](int block, const Vec16& token) {
#pragma unroll
        for (int group = 0; group < kGroups; ++group)
          multiply_step<T>(sums[block][group], pieces[2 * group], pieces[2 * group + 1], token);
      });
    });

    with_activation(p.activation, [&]<Activation act>() {
#pragma unroll
      for (int block = 0; block < kTokenBlocks; ++block) {
        ptx::sync_threads();
#pragma unroll
        for (int group = 0; group < kGroups; ++group)
#pragma unroll
          for (int i = 0; i < 4; ++i) ptx::store(&shared.sums[warp][group][i][lane], sums[block][group][i]);
        ptx::sync_threads();
        for (int i = ptx::thread_index(); i < kGroups * 64; i += threads)
          finish<act>(p, shared, block * 8 + i / (kGroups * 8), i % 8, i / 8 % kGroups, first);
      }
    });
  }

 private:
  template <Activation act>
  static LOCAS_DEVICE void finish(const Params& p, const Shared& shared, int64_t token, int slot, int group,
                                  int64_t first) {
    const FfnWeights& w = p.weights;
    const int64_t neuron = first + group * 8 + slot;
    if (token >= p.tokens() || neuron >= w.m() + w.padded_r()) return;
    const int lane = slot * 4 + static_cast<int>(token % 8) / 2, parity = static_cast<int>(token % 2);
    float gate = 0.0f, up = 0.0f;
    for (int warp = 0; warp < kWarps; ++warp) {
      gate += ptx::load(&shared.sums[warp][group][parity][lane]);
      up += ptx::load(&shared.sums[warp][group][2 + parity][lane]);
    }
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
  }
};

template <class T_, int kTokenBlocks, int kGroups>
struct GluFfnDecodeDown {
  using T = T_;
  using Params = GluFfnForwardParams;
  static constexpr const char* name = "glu_ffn_decode_down";
  static constexpr int threads = 512, min_blocks = 1;
  static constexpr int kWarps = threads / 32, kChannels = 16 * kGroups;
  struct Shared {
    float sums[kWarps][kGroups][4][32];
  };
  using Sums = float[kTokenBlocks][kGroups][4];

  static LOCAS_DEVICE void run(const Params& p, unsigned char* dynamic) {
    Shared& shared = *reinterpret_cast<Shared*>(dynamic);
    const int warp = ptx::warp_index(), lane = ptx::lane_index();
    const int64_t first = static_cast<int64_t>(ptx::block_index()) * kChannels;
    Sums sums = {};
    add_host(p, sums, first);
    add_memory(p, sums, first);

#pragma unroll
    for (int block = 0; block < kTokenBlocks; ++block) {
      ptx::sync_threads();
#pragma unroll
      for (int group = 0; group < kGroups; ++group)
#pragma unroll
        for (int i = 0; i < 4; ++i) ptx::store(&shared.sums[warp][group][i][lane], sums[block][group][i]);
      ptx::sync_threads();
      for (int i = ptx::thread_index(); i < 8 * kChannels; i += threads)
        finish(p, shared, block * 8 + i / kChannels, first, i % kChannels);
    }
  }

 private:
  static LOCAS_DEVICE void finish(const Params& p, const Shared& shared, int64_t token, int64_t first, int within) {
    const FfnWeights& w = p.weights;
    const int64_t channel = first + within;
    if (token >= p.tokens() || channel >= w.d()) return;
    const int lane = within % 8 * 4 + static_cast<int>(token % 8) / 2;
    const int i = within % 16 / 8 * 2 + static_cast<int>(token % 2);
    float sum = w.down_bias ? ptx::to_float(ptx::load(static_cast<const T*>(w.down_bias) + channel)) : 0.0f;
    for (int from = 0; from < kWarps; ++from) sum += ptx::load(&shared.sums[from][within / 16][i][lane]);
    ptx::store(static_cast<T*>(p.y.data) + token * p.y.stride + channel, ptx::from_float<T>(sum));
  }

  static LOCAS_DEVICE void add_host(const Params& p, Sums& sums, int64_t first) {
    const FfnWeights& w = p.weights;
    const int lane = ptx::lane_index();
    constexpr int kAhead = kTokenBlocks > 4 ? 1 : kTokenBlocks > 2 ? 2 : 4;
    WeightStream<T, 2 * kGroups, kAhead, kWarps> weights;  // rows lane / 4 and 8 more, of each group
    weights.width = static_cast<int>(w.m());
#pragma unroll
    for (int row = 0; row < 2 * kGroups; ++row) {
      const int64_t channel = first + row * 8 + lane / 4;
      weights.rows[row] = channel < w.d() ? static_cast<const T*>(w.down.data) + channel * w.down.stride : nullptr;
    }
    weights.start();
    const TokenRows<T> tokens(p.hidden, p.tokens(), w.m());
    ptx::wait_for_launch_before();  // for `hidden`
    weights.run([&](int k, const Vec16(&pieces)[2 * kGroups]) {
      tokens.template at<kTokenBlocks>(k, [&](int block, const Vec16& token) {
#pragma unroll
        for (int group = 0; group < kGroups; ++group)
          multiply_step<T>(sums[block][group], pieces[2 * group], pieces[2 * group + 1], token);
      });
    });
  }

  // V lies the other way round, [r, d]: a lane picks single elements of it. There are few.
  static LOCAS_DEVICE void add_memory(const Params& p, Sums& sums, int64_t first) {
    const FfnWeights& w = p.weights;
    const int warp = ptx::warp_index(), lane = ptx::lane_index();
    const auto pair = [&](int64_t slot, int64_t col) {
      const auto element = [&](int64_t row) -> uint32_t {
        if (row >= w.r() || col >= w.d()) return 0;
        return ptx::load(static_cast<const T*>(w.memory_value.data) + row * w.memory_value.stride + col).bits;
      };
      return element(slot) | element(slot + 1) << 16;
    };
    for (int64_t k0 = warp * 16; k0 < w.padded_r(); k0 += kWarps * 16) {
      const int64_t k = k0 + lane % 4 * 2;
      uint32_t values[kGroups][4];
#pragma unroll
      for (int group = 0; group < kGroups; ++group) {
        const int64_t channel = first + group * 16 + lane / 4;
#pragma unroll
        for (int i = 0; i < 4; ++i) values[group][i] = pair(k + i / 2 * 8, channel + i % 2 * 8);
      }
#pragma unroll
      for (int block = 0; block < kTokenBlocks; ++block) {
        const int64_t token = block * 8 + lane / 4;
        const auto hidden = [&](int64_t slot) -> uint32_t {
          if (token >= p.tokens() || slot >= w.padded_r()) return 0;
          const T* row = static_cast<const T*>(p.hidden.data) + token * p.hidden.stride + w.m();
          return ptx::load(reinterpret_cast<const uint32_t*>(row + slot));
        };
        const uint32_t low = hidden(k), high = hidden(k + 8);
#pragma unroll
        for (int group = 0; group < kGroups; ++group)
          ptx::mma_m16n8k16<T>(sums[block][group], values[group], low, high);
      }
    }
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
  with_half_type(p.dtype, [&]<class T>() {
    if (p.tokens() <= 8) return decode<T, 1, 1>(p, queue);
    if (p.tokens() <= 16) return decode<T, 2, 1>(p, queue);
    const bool wide = decode_down_groups(p.tokens(), p.weights.d()) == 2;
    if (p.tokens() <= 32) return wide ? decode<T, 4, 2>(p, queue) : decode<T, 4, 1>(p, queue);
    return wide ? decode<T, 8, 2>(p, queue) : decode<T, 8, 1>(p, queue);
  });
}

}  // namespace locas::cuda::sm80
