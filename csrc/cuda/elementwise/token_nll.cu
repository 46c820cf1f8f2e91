// The summed terms of a language-model loss and their gradient, one pass of each kind over the logits.
//
//      logits [rows, cols]    CTA b owns row b: its threads stride over the row, once for a running maximum and sum of
//                             exponentials, once for the gradient. Partial results are combined in a fixed order.
#include <cmath>

#include "cuda/common/elements.cuh"
#include "cuda/launch.cuh"
#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/convert.cuh"
#include "cuda/ptx/memory.cuh"
#include "cuda/ptx/shuffle.cuh"
#include "cuda/ptx/thread.cuh"

namespace locas::cuda {
namespace {

constexpr int kThreads = 512, kWarps = kThreads / 32;

// sum of exp(x - maximum) over what has been seen
struct Softmax {
  float maximum, sum;
};

LOCAS_DEVICE Softmax combine(Softmax a, Softmax b) {
  const float maximum = fmaxf(a.maximum, b.maximum);
  // An empty part has maximum -inf; exp(-inf - maximum) is 0, but -inf - -inf would be NaN.
  const float from_a = a.maximum == -INFINITY ? 0.0f : a.sum * expf(a.maximum - maximum);
  const float from_b = b.maximum == -INFINITY ? 0.0f : b.sum * expf(b.maximum - maximum);
  return {maximum, from_a + from_b};
}

struct Shared {
  Softmax warp_parts[kWarps];
};

template <class T>
struct TokenNll {
  using Params = TokenNllParams;
  static constexpr const char* name = "token_nll";
  static constexpr int threads = kThreads, min_blocks = 1;

  static LOCAS_DEVICE void run(const Params& p, unsigned char* memory) {
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    const int64_t row = ptx::block_index(), target = ptx::load(p.targets + row);
    const T* logits = p.logits.at<const T>(row, 0);

    Softmax part{-INFINITY, 0.0f};
    bool nan = false;
    for (int64_t col = ptx::thread_index(); col < p.logits.cols; col += kThreads) {
      const float x = ptx::to_float(ptx::load(logits + col));
      nan |= x != x;
      part = combine(part, {x, 1.0f});
    }
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2)
      part = combine(part, {ptx::shuffle_xor(part.maximum, mask), ptx::shuffle_xor(part.sum, mask)});
    if (ptx::lane_index() == 0) ptx::store(&shared.warp_parts[ptx::warp_index()], part);
    nan = ptx::sync_threads_or(nan);  // fmaxf drops NaN, so it is carried apart
    Softmax all{-INFINITY, 0.0f};
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) all = combine(all, ptx::load(&shared.warp_parts[warp]));
    if (nan) all.sum = NAN;

    if (ptx::thread_index() == 0)
      ptx::store(p.nll + row, logf(all.sum) + all.maximum - ptx::to_float(ptx::load(logits + target)));
    if (!p.d_logits.data) return;
    T* out = p.d_logits.at<T>(row, 0);
    const float inverse = 1.0f / all.sum;
    for (int64_t col = ptx::thread_index(); col < p.logits.cols; col += kThreads) {
      const float probability = expf(ptx::to_float(ptx::load(logits + col)) - all.maximum) * inverse;
      ptx::store(out + col, ptx::from_float<T>(probability - (col == target ? 1.0f : 0.0f)));
    }
  }
};

}  // namespace

void token_nll(const TokenNllParams& p, Queue queue) {
  with_type(p.dtype, [&]<class T>() { launch<TokenNll<T>>(p.logits.rows, sizeof(Shared), queue, p); });
}

}  // namespace locas::cuda
