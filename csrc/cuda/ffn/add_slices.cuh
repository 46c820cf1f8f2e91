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
  const void* bias;     // [cols]; may be null
  Matrix out;           // [rows, cols]
};

constexpr int kSliceColumns = 4;  // of a row, neighbours: a thread's

// All slices are on their way at once: there are few threads, and each addition would wait for its memory.
template <class T, int kSplits>
struct AddSlices {
  using Params = SliceParams;
  static constexpr const char* name = "add_slices";
  static constexpr int threads = 128, min_blocks = 1;

  static LOCAS_DEVICE void run(const Params& p, unsigned char*) {
    ptx::wait_for_launch_before();
    using Floats = Elements<float, kSliceColumns>;
    using Outputs = Elements<T, kSliceColumns>;
    const int64_t index = static_cast<int64_t>(ptx::block_index()) * threads + ptx::thread_index();
    const int64_t groups = p.out.cols / kSliceColumns, row = index / groups, col = index % groups * kSliceColumns;
    if (row >= p.out.rows) return;
    Floats slices[kSplits];
#pragma unroll
    for (int split = 0; split < kSplits; ++split)
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
      for (int split = 0; split < kSplits; ++split) sum[i] += slices[split].at[i];
      out.at[i] = ptx::from_float<T>(sum[i]);
    }
    ptx::store(reinterpret_cast<Outputs*>(static_cast<T*>(p.out.data) + row * p.out.stride + col), out);
  }
};

// Begins while the launch that writes the slices still runs. splits: a power of two, 2 to 16.
template <class T>
void add_slices(const SliceParams& p, int splits, Queue queue) {
  const auto launched = [&]<int kSplits>() {
    using Kernel = AddSlices<T, kSplits>;
    const int64_t blocks = divide_up(p.out.rows * (p.out.cols / kSliceColumns), Kernel::threads);
    launch<Kernel>(blocks, 0, queue, p, {.programmatic = true});
  };
  switch (splits) {
    case 2: return launched.template operator()<2>();
    case 4: return launched.template operator()<4>();
    case 8: return launched.template operator()<8>();
    case 16: return launched.template operator()<16>();
    default: throw std::logic_error("add_slices: " + std::to_string(splits) + " slices; expected 2, 4, 8 or 16");
  }
}

}  // namespace
}  // namespace locas::cuda
