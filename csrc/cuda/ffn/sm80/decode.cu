// glu_ffn_forward (D1 and D2): the forward of an FFN with memory for at most 32 tokens, where streaming the weights is
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
//           a CTA owns 16 channels; its 16 warps share k
//
// The warps' sums are added in their order: the result repeats bit for bit.
#include "common/activations.h"
#include "cuda/common/elements.cuh"
#include "cuda/ffn/sm80/launchers.h"
#include "cuda/launch.cuh"
#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/convert.cuh"
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

// 16 bytes of a token's row, or zeros.
template <class T>
LOCAS_DEVICE Vec16 load_token(const Matrix& from, int64_t tokens, int64_t token, int64_t k, int64_t width) {
  if (token >= tokens || k >= width) return zeros();
  return ptx::load(reinterpret_cast<const Vec16*>(static_cast<const T*>(from.data) + token * from.stride + k));
}
template <class T>
LOCAS_DEVICE Vec16 load_weight(const T* row, int64_t k, int64_t width) {
  if (row == nullptr || k >= width) return zeros();
  return ptx::load_once(reinterpret_cast<const Vec16*>(row + k));
}

template <class T_, int kTokenBlocks>
struct GluFfnDecodeHidden {
  using T = T_;
  using Params = GluFfnForwardParams;
  static constexpr const char* name = "glu_ffn_decode_hidden";
  static constexpr int threads = 256, min_blocks = 1;
  static constexpr int kWarps = threads / 32;
  static constexpr int kGroups = kTokenBlocks >= 2 ? 2 : 1;  // many tokens: more use of each of their loads
  struct Shared {
    float sums[kWarps][kGroups][4][32];
  };

  static LOCAS_DEVICE void run(const Params& p, unsigned char* dynamic) {
    Shared& shared = *reinterpret_cast<Shared*>(dynamic);
    const FfnWeights& w = p.weights;
    const int warp = ptx::warp_index(), lane = ptx::lane_index();
    const int64_t first = static_cast<int64_t>(ptx::block_index()) * kGroups * 8;
    const T *gate[kGroups], *up[kGroups];
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      const int64_t neuron = first + group * 8 + lane / 4;
      const bool memory = neuron >= w.m();
      const int64_t row = memory ? neuron - w.m() : neuron;
      const bool exists = row < (memory ? w.r() : w.m());
      const auto row_of = [&](const Matrix& weight) {
        return exists ? static_cast<const T*>(weight.data) + row * weight.stride : nullptr;
      };
      gate[group] = row_of(memory ? w.memory_gate : w.gate);
      up[group] = row_of(memory ? w.memory_key : w.up);
    }

    float sums[kTokenBlocks][kGroups][4] = {};
#pragma unroll(kTokenBlocks > 2 ? 1 : 4 / kGroups)  // loads in flight, as registers allow
    for (int64_t k0 = warp * kStep; k0 < w.d(); k0 += kWarps * kStep) {
      const int64_t k = k0 + lane % 4 * kPiece;
      Vec16 gates[kGroups], ups[kGroups];
#pragma unroll
      for (int group = 0; group < kGroups; ++group) {
        gates[group] = load_weight(gate[group], k, w.d());
        ups[group] = load_weight(up[group], k, w.d());
      }
#pragma unroll
      for (int block = 0; block < kTokenBlocks; ++block) {
        const Vec16 tokens = load_token<T>(p.x, p.tokens(), block * 8 + lane / 4, k, w.d());
#pragma unroll
        for (int group = 0; group < kGroups; ++group)
          multiply_step<T>(sums[block][group], gates[group], ups[group], tokens);
      }
    }

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

template <class T_, int kTokenBlocks>
struct GluFfnDecodeDown {
  using T = T_;
  using Params = GluFfnForwardParams;
  static constexpr const char* name = "glu_ffn_decode_down";
  static constexpr int threads = 512, min_blocks = 1;
  static constexpr int kWarps = threads / 32, kChannels = 16;
  struct Shared {
    float sums[kWarps][4][32];
  };

  static LOCAS_DEVICE void run(const Params& p, unsigned char* dynamic) {
    Shared& shared = *reinterpret_cast<Shared*>(dynamic);
    const FfnWeights& w = p.weights;
    const int warp = ptx::warp_index(), lane = ptx::lane_index();
    const int64_t first = static_cast<int64_t>(ptx::block_index()) * kChannels;
    float sums[kTokenBlocks][4] = {};
    add_host(p, sums, first, warp, lane);
    add_memory(p, sums, first, warp, lane);

#pragma unroll
    for (int block = 0; block < kTokenBlocks; ++block) {
      ptx::sync_threads();
#pragma unroll
      for (int i = 0; i < 4; ++i) ptx::store(&shared.sums[warp][i][lane], sums[block][i]);
      ptx::sync_threads();
      const int thread = ptx::thread_index();
      const int64_t token = block * 8 + thread / kChannels, channel = first + thread % kChannels;
      if (thread >= 8 * kChannels || token >= p.tokens() || channel >= w.d()) continue;
      const int from_lane = thread % 8 * 4 + static_cast<int>(token % 8) / 2;
      const int i = thread % kChannels / 8 * 2 + static_cast<int>(token % 2);
      float sum = w.down_bias ? ptx::to_float(ptx::load(static_cast<const T*>(w.down_bias) + channel)) : 0.0f;
      for (int from = 0; from < kWarps; ++from) sum += ptx::load(&shared.sums[from][i][from_lane]);
      ptx::store(static_cast<T*>(p.y.data) + token * p.y.stride + channel, ptx::from_float<T>(sum));
    }
  }

 private:
  static LOCAS_DEVICE void add_host(const Params& p, float (&sums)[kTokenBlocks][4], int64_t first, int warp,
                                    int lane) {
    const FfnWeights& w = p.weights;
    const int64_t channel = first + lane / 4;
    const auto row_of = [&](int64_t row) {
      return row < w.d() ? static_cast<const T*>(w.down.data) + row * w.down.stride : nullptr;
    };
    const T *low = row_of(channel), *high = row_of(channel + 8);
#pragma unroll(kTokenBlocks > 2 ? 2 : 4)
    for (int64_t k0 = warp * kStep; k0 < w.m(); k0 += kWarps * kStep) {
      const int64_t k = k0 + lane % 4 * kPiece;
      const Vec16 lows = load_weight(low, k, w.m()), highs = load_weight(high, k, w.m());
#pragma unroll
      for (int block = 0; block < kTokenBlocks; ++block)
        multiply_step<T>(sums[block], lows, highs, load_token<T>(p.hidden, p.tokens(), block * 8 + lane / 4, k, w.m()));
    }
  }

  // V lies the other way round, [r, d]: a lane picks single elements of it. There are few.
  static LOCAS_DEVICE void add_memory(const Params& p, float (&sums)[kTokenBlocks][4], int64_t first, int warp,
                                      int lane) {
    const FfnWeights& w = p.weights;
    const int64_t channel = first + lane / 4;
    const auto pair = [&](int64_t slot, int64_t col) {
      const auto element = [&](int64_t row) -> uint32_t {
        if (row >= w.r() || col >= w.d()) return 0;
        return ptx::load(static_cast<const T*>(w.memory_value.data) + row * w.memory_value.stride + col).bits;
      };
      return element(slot) | element(slot + 1) << 16;
    };
    for (int64_t k0 = warp * 16; k0 < w.padded_r(); k0 += kWarps * 16) {
      const int64_t k = k0 + lane % 4 * 2;
      const uint32_t values[4] = {pair(k, channel), pair(k, channel + 8), pair(k + 8, channel),
                                  pair(k + 8, channel + 8)};
#pragma unroll
      for (int block = 0; block < kTokenBlocks; ++block) {
        const int64_t token = block * 8 + lane / 4;
        const auto hidden = [&](int64_t slot) -> uint32_t {
          if (token >= p.tokens() || slot >= w.padded_r()) return 0;
          const T* row = static_cast<const T*>(p.hidden.data) + token * p.hidden.stride + w.m();
          return ptx::load(reinterpret_cast<const uint32_t*>(row + slot));
        };
        ptx::mma_m16n8k16<T>(sums[block], values, hidden(k), hidden(k + 8));
      }
    }
  }
};

// Calls f with the number of 8-token blocks, rounded up to one that is instantiated.
template <class F>
void with_token_blocks(int64_t tokens, F&& f) {
  if (tokens <= 8) return f.template operator()<1>();
  if (tokens <= 16) return f.template operator()<2>();
  return f.template operator()<4>();
}

}  // namespace

void glu_ffn_forward_decode(const GluFfnForwardParams& p, Queue queue) {
  const FfnWeights& w = p.weights;
  with_half_type(p.dtype, [&]<class T>() {
    with_token_blocks(p.tokens(), [&]<int blocks>() {
      using Hidden = GluFfnDecodeHidden<T, blocks>;
      using Down = GluFfnDecodeDown<T, blocks>;
      launch<Hidden>(divide_up(w.m() + w.padded_r(), Hidden::kGroups * 8), sizeof(typename Hidden::Shared), queue, p);
      launch<Down>(divide_up(w.d(), Down::kChannels), sizeof(typename Down::Shared), queue, p);
    });
  });
}

}  // namespace locas::cuda::sm80
