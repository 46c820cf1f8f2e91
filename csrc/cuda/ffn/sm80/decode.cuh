// What the kernels for at most 64 tokens share: the forward (decode.cu) and the backward (decode_backward.cu).
//
//      The weights are the A operand of mma.sync, tokens its 8 columns: within 32 of k, lane l has 16 bytes at
//      k = 8 (l % 4), and both operands use k in that order. The warps of a CTA share k; their sums are added in their
//      order: the result repeats bit for bit.
#pragma once

#include "common/activations.h"
#include "cuda/common/elements.cuh"
#include "cuda/ffn/sm80/plan.cuh"
#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/convert.cuh"
#include "cuda/ptx/memory.cuh"
#include "cuda/ptx/mma.cuh"
#include "cuda/ptx/thread.cuh"
#include "cuda/ptx/types.cuh"

namespace locas::cuda::sm80 {

constexpr int kStep = 32;  // of k that a warp takes at once
constexpr int kStrip = 8;  // rows of weights, or tokens, that lanes l / 4 have

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

// A whole sum over k: += weights * tokens, with a step's weights from take(pieces). The tokens of several steps come at once.
template <class T, int kStride, int kTokenBlocks, int kGroups, class Take>
LOCAS_DEVICE void add_steps(Sums<kTokenBlocks, kGroups>& sums, const TokenRows<T>& tokens, Take&& take) {
  constexpr int kProducts = kGroups * kTokenBlocks;
  constexpr int kTogether = kProducts < 8 ? 8 / kProducts : 1;  // as registers allow
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

// The sums of all warps, in shared memory, for kBlocks times 8 tokens at a time.
template <int kBlocks, int kGroups, int kWarps>
struct WarpSums {
  static constexpr int kThreads = kWarps * 32;
  float at[kBlocks][kWarps][kGroups][4][32];

  // Places that a thread has of the tokens of a time.
  static constexpr int turns(int rows) { return (kBlocks * 8 * rows + kThreads - 1) / kThreads; }

  // The i-th place of this thread, where it has one: a lane reads what the same lanes of all warps stored, so that no two
  // share a bank.
  template <int kRows>
  static LOCAS_DEVICE Place place(int i) {
    constexpr int kTurns = turns(kRows);
    const int index = i % kTurns * kThreads + ptx::thread_index(), within = index % (8 * kRows), lane = index % 32;
    const int block = i / kTurns * kBlocks + index / (8 * kRows);
    return {block * 8 + lane % 4 * 2 + within / 32 % 2, within / 64 * kStrip + lane / 4};
  }

  // finish(i, place) for every token of the blocks and kRows rows, when all warps' sums are here.
  template <int kRows, int kTokenBlocks, class Finish>
  LOCAS_DEVICE void finish(const Sums<kTokenBlocks, kGroups>& sums, Finish&& finish) {
    static_assert(kTokenBlocks % kBlocks == 0);
    constexpr int kTurns = turns(kRows);
#pragma unroll
    for (int time = 0; time < kTokenBlocks / kBlocks; ++time) {
      ptx::sync_threads();
#pragma unroll
      for (int block = 0; block < kBlocks; ++block)
#pragma unroll
        for (int group = 0; group < kGroups; ++group)
#pragma unroll
          for (int i = 0; i < 4; ++i)
            ptx::store(&at[block][ptx::warp_index()][group][i][ptx::lane_index()],
                       sums.at[time * kBlocks + block][group][i]);
      ptx::sync_threads();
#pragma unroll
      for (int turn = 0; turn < kTurns; ++turn)
        if (turn * kThreads + ptx::thread_index() < kBlocks * 8 * kRows)
          finish(time * kTurns + turn, place<kRows>(time * kTurns + turn));
    }
  }

  // Of one element of a fragment, `row` of 16 and `token`, onto `sum`.
  LOCAS_DEVICE float total(int group, int row, int token, float sum) const {
    const int lane = row % 8 * 4 + token % 8 / 2, i = row / 8 * 2 + token % 2;
    for (int warp = 0; warp < kWarps; ++warp) sum += ptx::load(&at[token / 8 % kBlocks][warp][group][i][lane]);
    return sum;
  }
};

}  // namespace locas::cuda::sm80
