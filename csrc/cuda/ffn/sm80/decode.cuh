// What the kernels for at most 64 tokens share: the forward as two (decode.cu) or as one (decode_cooperative.cu), and the
// backward as one (decode_backward.cu). plan.cuh picks.
//
//      The weights are the A operand of mma.sync, tokens its 8 columns, and a lane's weights go through a place of its own
//      in shared memory, past all other lanes: within 32 of k, lane l has 16 bytes at k = 8 (l % 4), and both operands use
//      k in that order. The warps of a CTA share k; their sums are added in their order: the result repeats bit for bit.
//
//      hidden   A fragment [ 8 gate rows ]      c0, c1: gate of slot l / 4 for two tokens
//                          [ 8 up rows   ]      c2, c3: up of the same slot and tokens
//
//      down     A fragment [ 16 rows of W_down ], then [ 16 columns of V ]
#pragma once

#include "common/activations.h"
#include "cuda/common/elements.cuh"
#include "cuda/ffn/sm80/plan.cuh"
#include "cuda/launch.cuh"
#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/convert.cuh"
#include "cuda/ptx/copy_async.cuh"
#include "cuda/ptx/memory.cuh"
#include "cuda/ptx/mma.cuh"
#include "cuda/ptx/thread.cuh"
#include "cuda/ptx/types.cuh"

namespace locas::cuda::sm80 {

constexpr int kStep = 32;  // of k that a warp takes at once
constexpr int kStrip = 8;  // rows of weights, or tokens, that lanes l / 4 have

// Of the kernels whose blocks are all resident, one per multiprocessor: threads, and 16-byte pieces of weights of each
// thread that are on their way at once.
constexpr int kResidentThreads = 512;
#ifdef __CUDACC__
constexpr int kResidentPieces = 24;  // 192 KB, which GPUs of 8.0, 8.6 or 12.0 do not have
#else
constexpr int kResidentPieces = 16;  // small tests use each place several times
#endif

LOCAS_DEVICE Vec16 zeros() { return Vec16{{0, 0, 0, 0}}; }

// Where in k this lane begins.
LOCAS_DEVICE int lane_offset() { return ptx::lane_index() % 4 * kPiece; }

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

// A lane's part of the sums of kGroups fragments with kTokenBlocks times 8 tokens.
template <int kTokenBlocks, int kGroups>
struct Sums {
  float at[kTokenBlocks][kGroups][4] = {};

  // Words 0, 1 of two rows make the first k16 fragment, words 2, 3 the second.
  template <class T>
  LOCAS_DEVICE void add(int block, const Vec16 (&rows)[2 * kGroups], const Vec16& tokens) {
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      const Vec16 &low = rows[2 * group], &high = rows[2 * group + 1];
      float (&sums)[4] = at[block][group];
      ptx::mma_m16n8k16<T>(sums, {low.word[0], high.word[0], low.word[1], high.word[1]}, tokens.word[0],
                           tokens.word[1]);
      ptx::mma_m16n8k16<T>(sums, {low.word[2], high.word[2], low.word[3], high.word[3]}, tokens.word[2],
                           tokens.word[3]);
    }
  }
};

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

// A whole sum over k: += weights * tokens, with a step's weights from take(pieces). The tokens of several steps come at once.
template <class T, int kStride, int kTokenBlocks, int kGroups, class Take>
LOCAS_DEVICE void add_steps(Sums<kTokenBlocks, kGroups>& sums, const TokenRows<T>& tokens, Take&& take) {
  constexpr int kProducts = kGroups * kTokenBlocks, kTogether = kProducts < 8 ? 8 / kProducts : 1;  // as registers allow
#pragma unroll 1
  for (int first = ptx::warp_index() * kStep; first < tokens.width; first += kTogether * kStride) {
    Vec16 pieces[kTogether][kTokenBlocks];
#pragma unroll
    for (int i = 0; i < kTogether; ++i)
      tokens.template at<kTokenBlocks>(first + lane_offset() + i * kStride,
                                       [&](int block, const Vec16& piece) { pieces[i][block] = piece; });
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      if (first + i * kStride >= tokens.width) break;
      Vec16 rows[2 * kGroups];
      take(rows);
#pragma unroll
      for (int block = 0; block < kTokenBlocks; ++block) sums.template add<T>(block, rows, pieces[i][block]);
    }
  }
}

// One row of the sums and one token.
struct Place {
  int token, row;
};

// The sums of all warps, in shared memory, for 8 tokens at a time.
template <int kGroups, int kWarps>
struct WarpSums {
  static constexpr int kThreads = kWarps * 32;
  float at[kWarps][kGroups][4][32];

  static constexpr int turns(int rows) { return (8 * rows + kThreads - 1) / kThreads; }

  // Where index is less than 8 times the rows. A lane reads what the same lanes of all warps have stored: no two lanes use a bank.
  static LOCAS_DEVICE Place place(int block, int index) {
    const int lane = index % 32, strip = index / 64, odd = index / 32 % 2;
    return {block * 8 + lane % 4 * 2 + odd, strip * kStrip + lane / 4};
  }

  // finish(turn, place) for every token of the blocks and kRows rows, when all warps' sums are here; a thread has kTurns
  // places of a block, and counts them.
  template <int kRows, int kTokenBlocks, class Finish>
  LOCAS_DEVICE void finish(const Sums<kTokenBlocks, kGroups>& sums, Finish&& finish) {
    constexpr int kTurns = turns(kRows);
#pragma unroll
    for (int block = 0; block < kTokenBlocks; ++block) {
      ptx::sync_threads();
#pragma unroll
      for (int group = 0; group < kGroups; ++group)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          ptx::store(&at[ptx::warp_index()][group][i][ptx::lane_index()], sums.at[block][group][i]);
      ptx::sync_threads();
#pragma unroll
      for (int turn = 0; turn < kTurns; ++turn) {
        const int index = turn * kThreads + ptx::thread_index();
        if (index < 8 * kRows) finish(block * kTurns + turn, place(block, index));
      }
    }
  }

  // Of one element of a fragment, `row` of 16 and `token`, onto `sum`.
  LOCAS_DEVICE float total(int group, int row, int token, float sum) const {
    const int lane = row % 8 * 4 + token % 8 / 2, i = row / 8 * 2 + token % 2;
    for (int warp = 0; warp < kWarps; ++warp) sum += ptx::load(&at[warp][group][i][lane]);
    return sum;
  }
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
template <class T, int kTokenBlocks, int kGroups, int kWarps>
LOCAS_DEVICE void finish_hidden(const GluFfnForwardParams& p, WarpSums<kGroups, kWarps>& shared,
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
template <class T, int kTokenBlocks, int kGroups, int kWarps>
LOCAS_DEVICE void finish_down(const GluFfnForwardParams& p, WarpSums<kGroups, kWarps>& shared,
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

// False, and nothing is launched, where the device does not hold a block on every multiprocessor at once.
template <class Kernel>
bool launch_resident(const typename Kernel::Params& p, Queue queue) {
  constexpr size_t kSharedBytes = sizeof(typename Kernel::Shared);
  const int blocks = multiprocessor_count(queue);
  if (resident_blocks<Kernel>(kSharedBytes, queue) < blocks) return false;
  launch<Kernel>(blocks, kSharedBytes, queue, p, {.cooperative = true});
  return true;
}

}  // namespace locas::cuda::sm80
