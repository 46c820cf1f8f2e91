// Closed-form slots of all layers and tokens, in three launches:
//
//      inputs, gradients [layers, tokens, d]   write_slots_norms: CTA b adds up the squares of row b, in double, as the
//                                              squares of floats leave their range
//      norms [tokens]                          write_slots_token_norms: one CTA; a thread adds up a token's layers, and
//                                              all decide together whether anything is not finite
//      slots [layers, 2, capacity, d]          write_slots_rows: CTA b scales row b into the slots, or ends then
//
// Every sum has one owner and one order: the result repeats bit for bit.
#include <cmath>

#include "common/slot_math.h"
#include "cuda/common/block_sum.cuh"
#include "cuda/common/elements.cuh"
#include "cuda/launch.cuh"
#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/memory.cuh"
#include "cuda/ptx/thread.cuh"

namespace locas::cuda {
namespace {

constexpr int kThreads = 128;

struct WriteLaunch {
  WriteSlotsParams write;
  bool aligned;  // every row takes 16-byte accesses
};

// Calls f(values, col, count) for each vector of columns that this thread owns in a row of the inputs and gradients.
template <class T, class F>
LOCAS_DEVICE void for_each_vector(const WriteLaunch& launch, int64_t row, F&& f) {
  const WriteSlotsParams& p = launch.write;
  const T* from = static_cast<const T*>(p.is_value(row) ? p.gradients.data : p.inputs.data) + p.source_row(row) * p.d();
  for (int64_t col = kVector * ptx::thread_index(); col < p.d(); col += kVector * kThreads) {
    const int count = static_cast<int>(p.d() - col < kVector ? p.d() - col : kVector);
    float values[kVector];
    load_vector(from + col, values, count, launch.aligned);
    f(values, col, count);
  }
}

template <class T>
struct WriteSlotsNorms {
  using Params = WriteLaunch;
  static constexpr const char* name = "write_slots_norms";
  static constexpr int threads = kThreads, min_blocks = 1;
  using Shared = WarpSums<double, kThreads / 32>;

  static LOCAS_DEVICE void run(const Params& launch, unsigned char* shared) {
    const int64_t row = ptx::block_index();
    double sum = 0.0;
    for_each_vector<T>(launch, row, [&](const float (&values)[kVector], int64_t, int) {
#pragma unroll
      for (int j = 0; j < kVector; ++j) sum += static_cast<double>(values[j]) * values[j];
    });
    sum = block_sum(sum, *reinterpret_cast<Shared*>(shared));
    if (ptx::thread_index() == 0) ptx::store(launch.write.workspace + row, sum);
  }
};

struct WriteSlotsTokenNorms {
  using Params = WriteSlotsParams;
  static constexpr const char* name = "write_slots_token_norms";
  static constexpr int threads = 512, min_blocks = 1;

  static LOCAS_DEVICE void run(const Params& p, unsigned char*) {
    bool unfit = false;
    for (int64_t token = ptx::thread_index(); token < p.tokens; token += threads) {
      double inputs = 0.0, gradients = 0.0;
      for (int64_t layer = 0; layer < p.layers; ++layer) {
        const double* sums = p.workspace + layer * p.tokens + token;
        inputs += ptx::load(sums);
        gradients += ptx::load(sums + p.layers * p.tokens);
      }
      const float norm = p.gradient_norms ? ptx::load(p.gradient_norms + token) : static_cast<float>(sqrt(gradients));
      const bool finite = is_finite(inputs + gradients + fabsf(norm));
      ptx::store(p.norms + token, finite ? norm : NAN);
      unfit |= !finite;
    }
    unfit = ptx::sync_threads_or(unfit);
    if (ptx::thread_index() == 0) ptx::store(p.workspace + p.rows(), unfit ? 0.0 : 1.0);
  }
};

template <class T, class Copy>
struct WriteSlotsRows {
  using Params = WriteLaunch;
  static constexpr const char* name = "write_slots_rows";
  static constexpr int threads = kThreads, min_blocks = 1;

  static LOCAS_DEVICE void run(const Params& launch, unsigned char*) {
    const WriteSlotsParams& p = launch.write;
    if (ptx::load(p.workspace + p.rows()) == 0.0) return;
    const int64_t row = ptx::block_index(), first = p.slot_row(row) * p.d();
    const double factor = p.is_value(row) ? p.epsilon * inverse_norm(ptx::load(p.norms + row % p.tokens))
                                          : inverse_norm(sqrt(ptx::load(p.workspace + row)));
    for_each_vector<T>(launch, row, [&](const float (&values)[kVector], int64_t col, int count) {
      float scaled[kVector];
#pragma unroll
      for (int j = 0; j < kVector; ++j) scaled[j] = static_cast<float>(values[j] * factor);
      store_vector(scaled, static_cast<float*>(p.slots.data) + first + col, count, launch.aligned);
      if (p.compute.data) store_vector(scaled, static_cast<Copy*>(p.compute.data) + first + col, count, launch.aligned);
    });
  }
};

}  // namespace

void write_slots(const WriteSlotsParams& p, Queue queue) {
  if (p.tokens == 0) return;
  with_type(p.dtype, [&]<class T>() {
    with_type(p.compute_dtype, [&]<class Copy>() {
      const WriteLaunch parameters{p, is_aligned<T>(p.inputs) && is_aligned<T>(p.gradients) &&
                                          is_aligned<float>(p.slots) && is_aligned<Copy>(p.compute)};
      launch<WriteSlotsNorms<T>>(p.rows(), sizeof(typename WriteSlotsNorms<T>::Shared), queue, parameters);
      launch<WriteSlotsTokenNorms>(1, 0, queue, p);
      launch<WriteSlotsRows<T, Copy>>(p.rows(), 0, queue, parameters);
    });
  });
}

}  // namespace locas::cuda
