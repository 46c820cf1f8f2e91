// The summed terms of a language-model loss and their gradient, one pass of each kind over the logits.
//
//      logits [rows, cols]    [ edge | 16 bytes | 16 bytes | ... | edge ]
//
// CTA b owns row b. Its threads stride over the row, kBatch pieces of 16 bytes at a time, once for a running maximum
// and sum of exponentials, once for the gradient. The edges, what lies before the first and behind the last whole
// piece, go by single elements. Partial results are combined in a fixed order.
#include <cmath>

#include "common/logits.h"
#include "cuda/common/block_sum.cuh"
#include "cuda/common/elements.cuh"
#include "cuda/launch.cuh"
#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/convert.cuh"
#include "cuda/ptx/memory.cuh"
#include "cuda/ptx/shuffle.cuh"
#include "cuda/ptx/thread.cuh"

namespace locas::cuda {
namespace {

constexpr int kThreads = 1024, kWarps = kThreads / 32;
static_assert(kWarps == 32, "a lane takes up each warp's result");

// The largest of the values seen, and the sum of exp(value - maximum). A NaN shows in the sum.
struct Softmax {
  float maximum, sum;
};

// What is subtracted in the exponents: of nothing but -inf too, it must be a number.
LOCAS_DEVICE float anchor(float maximum) { return maximum == -INFINITY ? 0.0f : maximum; }

// The warp's result in each of its lanes.
LOCAS_DEVICE Softmax combine_lanes(Softmax part) {
  float maximum = part.maximum;
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) maximum = fmaxf(maximum, ptx::shuffle_xor(maximum, mask));
  return {maximum, lane_sum<32>(part.sum * expf(part.maximum - anchor(maximum)))};
}

struct Shared {
  Softmax warp_parts[kWarps];
};

// A row as this thread goes over it.
template <class T>
struct Pieces {
  static constexpr int kElements = 16 / sizeof(T), kBatch = 4;
  using Piece = Elements<T, kElements>;
  int64_t cols, head, count;  // elements, those before the first whole piece, pieces

  // `others` has the same columns; where its pieces begin elsewhere there are none.
  LOCAS_DEVICE Pieces(const T* row, const T* others, int64_t cols) : cols(cols), head(cols), count(0) {
    const auto misaligned = reinterpret_cast<uintptr_t>(row) % 16;
    if (others && reinterpret_cast<uintptr_t>(others) % 16 != misaligned) return;
    const int64_t before = misaligned == 0 ? 0 : (16 - misaligned) / sizeof(T);
    if (before >= cols) return;
    head = before;
    count = (cols - head) / kElements;
  }
  // Calls f(column) for each element of the edges that this thread owns.
  template <class F>
  LOCAS_DEVICE void for_each_of_edges(F&& f) const {
    const int64_t edges = cols - count * kElements;
    for (int64_t i = ptx::thread_index(); i < edges; i += kThreads) f(i < head ? i : i + count * kElements);
  }
  // Calls f(pieces of this thread: columns, how many of kBatch exist).
  template <class F>
  LOCAS_DEVICE void for_each_batch(F&& f) const {
    for (int64_t first = ptx::thread_index(); first < count; first += kThreads * kBatch)
      f(head + first * kElements, static_cast<int>((count - first + kThreads - 1) / kThreads));
  }
  // The column of a batch's piece k.
  static LOCAS_DEVICE int64_t column(int64_t col, int k) {
    return col + static_cast<int64_t>(k) * kThreads * kElements;
  }
  static LOCAS_DEVICE void load(const T* row, int64_t col, int existing, Piece (&to)[kBatch]) {
#pragma unroll
    for (int k = 0; k < kBatch; ++k)
      if (k < existing) to[k] = ptx::load(reinterpret_cast<const Piece*>(row + column(col, k)));
  }
};

template <class T, LogitMap map>
struct TokenNll {
  using Params = TokenNllParams;
  using Row = Pieces<T>;
  static constexpr const char* name = "token_nll";
  static constexpr int threads = kThreads, min_blocks = 1;

  static LOCAS_DEVICE ValueAndSlope mapped(const Params& p, T logit) {
    return map_logit<map>(ptx::to_float(logit), p.logit_scale, p.soft_cap);
  }

  template <int count>
  static LOCAS_DEVICE void add(Softmax& part, const float (&z)[count]) {
    float maximum = part.maximum;
#pragma unroll
    for (int i = 0; i < count; ++i) maximum = fmaxf(maximum, z[i]);
    const float base = anchor(maximum);
    float sum = part.sum * expf(part.maximum - base);
#pragma unroll
    for (int i = 0; i < count; ++i) sum += expf(z[i] - base);
    part = {maximum, sum};
  }

  static LOCAS_DEVICE Softmax softmax_of_thread(const Params& p, const T* logits, const Row& row) {
    Softmax part{-INFINITY, 0.0f};
    row.for_each_of_edges([&](int64_t col) { add<1>(part, {mapped(p, ptx::load(logits + col)).value}); });
    row.for_each_batch([&](int64_t first, int existing) {
      typename Row::Piece pieces[Row::kBatch];
      Row::load(logits, first, existing, pieces);
#pragma unroll
      for (int k = 0; k < Row::kBatch; ++k) {
        if (k >= existing) continue;
        float z[Row::kElements];
#pragma unroll
        for (int i = 0; i < Row::kElements; ++i) z[i] = mapped(p, pieces[k].at[i]).value;
        add(part, z);
      }
    });
    return part;
  }

  static LOCAS_DEVICE void write_gradient(const Params& p, const T* logits, const Row& row, T* out, Softmax all,
                                          int64_t target) {
    const float inverse = 1.0f / all.sum;
    const auto gradient = [&](T logit, int64_t col) {
      const ValueAndSlope z = mapped(p, logit);
      return ptx::from_float<T>((expf(z.value - all.maximum) * inverse - (col == target ? 1.0f : 0.0f)) * z.slope);
    };
    row.for_each_of_edges([&](int64_t col) { ptx::store(out + col, gradient(ptx::load(logits + col), col)); });
    row.for_each_batch([&](int64_t first, int existing) {
      typename Row::Piece pieces[Row::kBatch];
      Row::load(logits, first, existing, pieces);
#pragma unroll
      for (int k = 0; k < Row::kBatch; ++k) {
        if (k >= existing) continue;
        const int64_t col = Row::column(first, k);
#pragma unroll
        for (int i = 0; i < Row::kElements; ++i) pieces[k].at[i] = gradient(pieces[k].at[i], col + i);
        ptx::store(reinterpret_cast<typename Row::Piece*>(out + col), pieces[k]);
      }
    });
  }

  static LOCAS_DEVICE void run(const Params& p, unsigned char* memory) {
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    const int64_t index = ptx::block_index(), target = ptx::load(p.targets + index);
    const T* logits = p.logits.at<const T>(index, 0);
    T* out = p.d_logits.data ? p.d_logits.at<T>(index, 0) : nullptr;
    // Before the barrier, behind which the gradient may be written over it.
    const float target_logit = mapped(p, ptx::load(logits + target)).value;

    const Row row(logits, out, p.logits.cols);
    const Softmax part = combine_lanes(softmax_of_thread(p, logits, row));
    if (ptx::lane_index() == 0) ptx::store(&shared.warp_parts[ptx::warp_index()], part);
    ptx::sync_threads();
    const Softmax all = combine_lanes(ptx::load(&shared.warp_parts[ptx::lane_index()]));

    if (ptx::thread_index() == 0) ptx::store(p.nll + index, logf(all.sum) + all.maximum - target_logit);
    if (out) write_gradient(p, logits, row, out, all, target);
  }
};

}  // namespace

void token_nll(const TokenNllParams& p, Queue queue) {
  with_type(p.dtype, [&]<class T>() {
    with_logit_map(p, [&]<LogitMap map>() { launch<TokenNll<T, map>>(p.logits.rows, sizeof(Shared), queue, p); });
  });
}

}  // namespace locas::cuda
