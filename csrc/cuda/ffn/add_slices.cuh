// The sum of a product's K slices, in their order, plus a bias.
#pragma once

#include <stdexcept>
#include <string>

#include "cuda/common/elements.cuh"
#include "cuda/launch.cuh"
#include "cuda/ptx/grid.cuh"
#include "cuda/ptx/thread.cuh"

namespace locas::cuda {
namespace {  // a kernel of each file that includes this, so that no family launches the code of another

struct SliceParams {
  const float* slices;  // [splits, rows, cols]
  int splits;
  const void* bias;  // [cols]; may be null
  Matrix out;        // [rows, cols]
};

constexpr int kSliceColumns = 4;  // of a row, neighbours: a thread's

// Up to kMost slices are on their way at once: there are few threads, and each addition would wait for its memory.
template <class T, int kMost>
struct AddSlices {
  using Params = SliceParams;
  static constexpr const char* name = "add_slices";
  static constexpr int threads = 128, min_blocks = 1;
  using Floats = Elements<float, kSliceColumns>;
  using Outputs = Elements<T, kSliceColumns>;

  static LOCAS_DEVICE void run(const Params& p, unsigned char*) {
    ptx::wait_for_launch_before();
    const int64_t index = static_cast<int64_t>(ptx::block_index()) * threads + ptx::thread_index();
    const int64_t groups = p.out.cols / kSliceColumns, row = index / groups, col = index % groups * kSliceColumns;
    if (row >= p.out.rows) return;
    Floats slices[kMost];
#pragma unroll
    for (int split = 0; split < kMost; ++split)
      if (split < p.splits)
        slices[split] =
            ptx::load(reinterpret_cast<const Floats*>(p.slices + (split * p.out.rows + row) * p.out.cols + col));
    float sum[kSliceColumns] = {};
    if (p.bias) {
      const auto bias = ptx::load(reinterpret_cast<const Outputs*>(static_cast<const T*>(p.bias) + col));
#pragma unroll
      for (int i = 0; i < kSliceColumns; ++i) sum[i] = ptx::to_float(bias.at[i]);
    }
    Outputs out;
#pragma unroll
    for (int i = 0; i < kSliceColumns; ++i) {
#pragma unroll
      for (int split = 0; split < kMost; ++split)
        if (split < p.splits) sum[i] += slices[split].at[i];
      out.at[i] = ptx::from_float<T>(sum[i]);
    }
    ptx::store(reinterpret_cast<Outputs*>(static_cast<T*>(p.out.data) + row * p.out.stride + col), out);
  }
};

// Begins while the launch that writes the slices still runs; at most 16 slices.
template <class T>
void add_slices(const SliceParams& p, Queue queue) {
  const auto launched = [&]<int kMost>() {
    using Kernel = AddSlices<T, kMost>;
    const int64_t blocks = divide_up(p.out.rows * (p.out.cols / kSliceColumns), Kernel::threads);
    launch<Kernel>(blocks, 0, queue, p, {.programmatic = true});
  };
  if (p.splits > 16) throw std::logic_error("add_slices: " + std::to_string(p.splits) + " slices; expected at most 16");
  if (p.splits <= 4) launched.template operator()<4>();
  else launched.template operator()<16>();
}

}  // namespace
}  // namespace locas::cuda
