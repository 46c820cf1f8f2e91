// out = scale * act(gate) * up, its backward, and the neuron importance, as elementwise and column kernels: the
// epilogues of the matmul backend.
//
// glu_forward, glu_backward: a thread owns kVector neighbouring columns of one row; the grid strides over all of them.
//
//      cols ->  [t0 | t1 | ... ]      one thread: 8 columns, 16-byte loads where pointers and strides allow
//      rows     [ .    .   ... ]
//
// importance: a CTA owns 32 columns; its 32 x 8 threads walk down the rows, 8 at a time, and the 8 partial sums of a
// column are added in a fixed order, so the result repeats bit for bit.
#include "common.cuh"

namespace locas::cuda {
namespace {

constexpr int kThreads = 256;

template <class T, Activation act>
__global__ void __launch_bounds__(kThreads) glu_forward_kernel(GluForwardParams p, bool aligned) {
  const int64_t vectors = (p.cols + kVector - 1) / kVector;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < p.rows * vectors; i += step) {
    const int64_t row = i / vectors, col = (i % vectors) * kVector;
    const int count = static_cast<int>(min(static_cast<int64_t>(kVector), p.cols - col));
    float gate[kVector], up[kVector], out[kVector];
    load_vector(static_cast<const T*>(p.gate.data) + row * p.gate.stride + col, gate, count, aligned);
    load_vector(static_cast<const T*>(p.up.data) + row * p.up.stride + col, up, count, aligned);
#pragma unroll
    for (int j = 0; j < kVector; ++j) out[j] = p.scale * activate<act>(gate[j]).value * up[j];
    store_vector(out, static_cast<T*>(p.out.data) + row * p.out.stride + col, count, aligned);
  }
}

template <class T, Activation act>
__global__ void __launch_bounds__(kThreads) glu_backward_kernel(GluBackwardParams p, bool aligned) {
  const int64_t vectors = (p.cols + kVector - 1) / kVector;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < p.rows * vectors; i += step) {
    const int64_t row = i / vectors, col = (i % vectors) * kVector;
    const int count = static_cast<int>(min(static_cast<int64_t>(kVector), p.cols - col));
    float gate[kVector], up[kVector], d_hidden[kVector], d_gate[kVector], d_up[kVector], hidden[kVector];
    load_vector(static_cast<const T*>(p.gate.data) + row * p.gate.stride + col, gate, count, aligned);
    load_vector(static_cast<const T*>(p.up.data) + row * p.up.stride + col, up, count, aligned);
    load_vector(static_cast<const T*>(p.d_hidden.data) + row * p.d_hidden.stride + col, d_hidden, count, aligned);
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      const ValueAndSlope a = activate<act>(gate[j]);
      const float d = p.scale * d_hidden[j];
      d_gate[j] = d * up[j] * a.slope;
      d_up[j] = d * a.value;
      hidden[j] = p.scale * a.value * up[j];
    }
    store_vector(d_gate, static_cast<T*>(p.d_gate.data) + row * p.d_gate.stride + col, count, aligned);
    store_vector(d_up, static_cast<T*>(p.d_up.data) + row * p.d_up.stride + col, count, aligned);
    if (p.hidden.data)
      store_vector(hidden, static_cast<T*>(p.hidden.data) + row * p.hidden.stride + col, count, aligned);
  }
}

constexpr int kColumns = 32, kRowLanes = 8;

template <class T, Activation act>
__global__ void __launch_bounds__(kColumns* kRowLanes) importance_kernel(ImportanceParams p) {
  __shared__ float partial[kRowLanes][kColumns];
  const int64_t col = static_cast<int64_t>(blockIdx.x) * kColumns + threadIdx.x;
  float sum = 0.0f;
  if (col < p.cols) {
    for (int64_t row = threadIdx.y; row < p.rows; row += kRowLanes) {
      const float gate = to_float(static_cast<const T*>(p.gate.data)[row * p.gate.stride + col]);
      const float up = to_float(static_cast<const T*>(p.up.data)[row * p.up.stride + col]);
      sum += fabsf(activate<act>(gate).value * up);
    }
  }
  partial[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y == 0 && col < p.cols) {
    float total = 0.0f;
#pragma unroll
    for (int lane = 0; lane < kRowLanes; ++lane) total += partial[lane][threadIdx.x];
    p.importance[col] = total / static_cast<float>(p.rows);
  }
}

// Enough CTAs to fill the device a few times over; the grid-stride loop does the rest.
unsigned elementwise_grid(int64_t rows, int64_t cols, int device) {
  int multiprocessors = 0;
  check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
  const int64_t vectors = rows * ((cols + kVector - 1) / kVector);
  const int64_t wanted = (vectors + kThreads - 1) / kThreads;
  return static_cast<unsigned>(std::min<int64_t>(wanted, static_cast<int64_t>(multiprocessors) * 16));
}

}  // namespace

void glu_forward(const GluForwardParams& p, Queue queue) {
  if (p.rows == 0 || p.cols == 0) return;
  const DeviceGuard guard(queue.device);
  with_type(p.dtype, [&]<class T>() {
    const bool aligned = is_aligned<T>(p.gate) && is_aligned<T>(p.up) && is_aligned<T>(p.out);
    with_activation(p.activation, [&]<Activation act>() {
      glu_forward_kernel<T, act><<<elementwise_grid(p.rows, p.cols, queue.device), kThreads, 0,
                                   static_cast<cudaStream_t>(queue.stream)>>>(p, aligned);
    });
  });
  check(cudaGetLastError(), "glu_forward");
}

void glu_backward(const GluBackwardParams& p, Queue queue) {
  if (p.rows == 0 || p.cols == 0) return;
  const DeviceGuard guard(queue.device);
  with_type(p.dtype, [&]<class T>() {
    const bool aligned = is_aligned<T>(p.d_hidden) && is_aligned<T>(p.gate) && is_aligned<T>(p.up) &&
                         is_aligned<T>(p.d_gate) && is_aligned<T>(p.d_up) && is_aligned<T>(p.hidden);
    with_activation(p.activation, [&]<Activation act>() {
      glu_backward_kernel<T, act><<<elementwise_grid(p.rows, p.cols, queue.device), kThreads, 0,
                                    static_cast<cudaStream_t>(queue.stream)>>>(p, aligned);
    });
  });
  check(cudaGetLastError(), "glu_backward");
}

void importance(const ImportanceParams& p, Queue queue) {
  if (p.cols == 0) return;
  const DeviceGuard guard(queue.device);
  const dim3 block(kColumns, kRowLanes);
  const unsigned grid = static_cast<unsigned>((p.cols + kColumns - 1) / kColumns);
  with_type(p.dtype, [&]<class T>() {
    with_activation(p.activation, [&]<Activation act>() {
      importance_kernel<T, act><<<grid, block, 0, static_cast<cudaStream_t>(queue.stream)>>>(p);
    });
  });
  check(cudaGetLastError(), "importance");
}

}  // namespace locas::cuda
