// out = scale * act(gate) * up, its backward, and the neuron importance, as elementwise and column kernels: the
// epilogues of the matmul backend.
//
// glu_activation_forward, glu_activation_backward, with up or without: a thread owns kVector neighbouring columns of
// one row; the grid strides over all of them.
//
//      cols ->  [t0 | t1 | ... ]      one thread: 8 columns, 16-byte loads where pointers and strides allow
//      rows     [ .    .   ... ]
//
// neuron_importance_of_products: a CTA owns 32 columns; its 8 warps walk down the rows, 8 at a time, and the 8 partial
// sums of a column are added in a fixed order, so the result repeats bit for bit.
#include <algorithm>
#include <cmath>

#include "common/activations.h"
#include "cuda/common/elements.cuh"
#include "cuda/launch.cuh"
#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/convert.cuh"
#include "cuda/ptx/memory.cuh"
#include "cuda/ptx/thread.cuh"

namespace locas::cuda {
namespace {

constexpr int kThreads = 256;

// Calls f(row, col, count) for each vector of `count` columns that this thread owns.
template <class F>
LOCAS_DEVICE void for_each_vector(int64_t rows, int64_t cols, F&& f) {
  const int64_t vectors = (cols + kVector - 1) / kVector;
  const int64_t step = static_cast<int64_t>(ptx::block_count()) * kThreads;
  const int64_t first = static_cast<int64_t>(ptx::block_index()) * kThreads + ptx::thread_index();
  for (int64_t i = first; i < rows * vectors; i += step) {
    const int64_t row = i / vectors, col = (i % vectors) * kVector;
    f(row, col, static_cast<int>(cols - col < kVector ? cols - col : kVector));
  }
}

// The vector of `up` that this thread owns; ones where there is no up.
template <class T>
LOCAS_DEVICE void load_up(const Matrix& up, int64_t row, int64_t col, float (&to)[kVector], int count, bool aligned) {
  if (up.data) {
    load_vector(up.at<const T>(row, col), to, count, aligned);
  } else {
#pragma unroll
    for (int j = 0; j < kVector; ++j) to[j] = 1.0f;
  }
}

struct ForwardLaunch {
  GluActivationForwardParams glu;
  bool aligned;  // every matrix takes 16-byte accesses
};

template <class T, Activation act>
struct GluActivationForward {
  using Params = ForwardLaunch;
  static constexpr const char* name = "glu_activation_forward";
  static constexpr int threads = kThreads, min_blocks = 1;

  static LOCAS_DEVICE void run(const Params& launch, unsigned char*) {
    const GluActivationForwardParams& p = launch.glu;
    for_each_vector(p.gate.rows, p.gate.cols, [&](int64_t row, int64_t col, int count) {
      float gate[kVector], up[kVector], out[kVector];
      load_vector(p.gate.at<const T>(row, col), gate, count, launch.aligned);
      load_up<T>(p.up, row, col, up, count, launch.aligned);
#pragma unroll
      for (int j = 0; j < kVector; ++j) out[j] = p.scale * activate<act>(gate[j], p.params).value * up[j];
      store_vector(out, p.out.at<T>(row, col), count, launch.aligned);
    });
  }
};

struct BackwardLaunch {
  GluActivationBackwardParams glu;
  bool aligned;
};

template <class T, Activation act>
struct GluActivationBackward {
  using Params = BackwardLaunch;
  static constexpr const char* name = "glu_activation_backward";
  static constexpr int threads = kThreads, min_blocks = 1;

  static LOCAS_DEVICE void run(const Params& launch, unsigned char*) {
    const GluActivationBackwardParams& p = launch.glu;
    for_each_vector(p.gate.rows, p.gate.cols, [&](int64_t row, int64_t col, int count) {
      float gate[kVector], up[kVector], d_hidden[kVector], d_gate[kVector], d_up[kVector], hidden[kVector];
      load_vector(p.gate.at<const T>(row, col), gate, count, launch.aligned);
      load_up<T>(p.up, row, col, up, count, launch.aligned);
      load_vector(p.d_hidden.at<const T>(row, col), d_hidden, count, launch.aligned);
#pragma unroll
      for (int j = 0; j < kVector; ++j) {
        const ValueAndSlope a = activate<act>(gate[j], p.params);
        const float d = p.scale * d_hidden[j];
        d_gate[j] = d * up[j] * a.slope;
        d_up[j] = d * a.value;
        hidden[j] = p.scale * a.value * up[j];
      }
      store_vector(d_gate, p.d_gate.at<T>(row, col), count, launch.aligned);
      if (p.d_up.data) store_vector(d_up, p.d_up.at<T>(row, col), count, launch.aligned);
      if (p.hidden.data) store_vector(hidden, p.hidden.at<T>(row, col), count, launch.aligned);
    });
  }
};

constexpr int kColumns = 32, kRowLanes = kThreads / kColumns;

template <class T, Activation act>
struct NeuronImportanceOfProducts {
  using Params = NeuronImportanceOfProductsParams;
  static constexpr const char* name = "neuron_importance_of_products";
  static constexpr int threads = kThreads, min_blocks = 1;
  struct Shared {
    float partial[kRowLanes][kColumns];
  };

  static LOCAS_DEVICE void run(const Params& p, unsigned char* memory) {
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    const int column = ptx::lane_index(), row_lane = ptx::warp_index();
    const int64_t col = static_cast<int64_t>(ptx::block_index()) * kColumns + column;
    float sum = 0.0f;
    if (col < p.gate.cols) {
      for (int64_t row = row_lane; row < p.gate.rows; row += kRowLanes) {
        const float gate = ptx::to_float(ptx::load(p.gate.at<const T>(row, col)));
        const float up = ptx::to_float(ptx::load(p.up.at<const T>(row, col)));
        sum += fabsf(activate<act>(gate, p.params).value * up);
      }
    }
    ptx::store(&shared.partial[row_lane][column], sum);
    ptx::sync_threads();
    if (row_lane == 0 && col < p.gate.cols) {
      float total = 0.0f;
#pragma unroll
      for (int lane = 0; lane < kRowLanes; ++lane) total += ptx::load(&shared.partial[lane][column]);
      ptx::store(p.importance + col, total / static_cast<float>(p.gate.rows));
    }
  }
};

// Enough CTAs to fill the device a few times over; the grid-stride loop does the rest.
int64_t elementwise_grid(int64_t rows, int64_t cols, Queue queue) {
  const int64_t vectors = rows * ((cols + kVector - 1) / kVector);
  return std::min<int64_t>((vectors + kThreads - 1) / kThreads, 16 * multiprocessor_count(queue));
}

}  // namespace

void glu_activation_forward(const GluActivationForwardParams& p, Queue queue) {
  with_type(p.dtype, [&]<class T>() {
    const bool aligned = is_aligned<T>(p.gate) && is_aligned<T>(p.up) && is_aligned<T>(p.out);
    with_any_activation(p.activation, [&]<Activation act>() {
      launch<GluActivationForward<T, act>>(elementwise_grid(p.gate.rows, p.gate.cols, queue), 0, queue, {p, aligned});
    });
  });
}

void glu_activation_backward(const GluActivationBackwardParams& p, Queue queue) {
  with_type(p.dtype, [&]<class T>() {
    const bool aligned = is_aligned<T>(p.d_hidden) && is_aligned<T>(p.gate) && is_aligned<T>(p.up) &&
                         is_aligned<T>(p.d_gate) && is_aligned<T>(p.d_up) && is_aligned<T>(p.hidden);
    with_any_activation(p.activation, [&]<Activation act>() {
      launch<GluActivationBackward<T, act>>(elementwise_grid(p.gate.rows, p.gate.cols, queue), 0, queue, {p, aligned});
    });
  });
}

void neuron_importance_of_products(const NeuronImportanceOfProductsParams& p, Queue queue) {
  with_type(p.dtype, [&]<class T>() {
    with_any_activation(p.activation, [&]<Activation act>() {
      using Kernel = NeuronImportanceOfProducts<T, act>;
      launch<Kernel>((p.gate.cols + kColumns - 1) / kColumns, sizeof(typename Kernel::Shared), queue, p);
    });
  });
}

}  // namespace locas::cuda
