// The sum of a product's K slices, in their order, plus a bias.
#pragma once

#include "cuda/common/elements.cuh"
#include "cuda/ptx/thread.cuh"

namespace locas::cuda {
namespace {  // a kernel of each file that includes this, so that no family launches the code of another

struct SliceParams {
  const float* slices;  // [splits, rows, cols]
  int splits;
  const void* bias;  // [cols]; may be null
  Matrix out;        // [rows, cols]
};

// A thread owns 8 neighbouring columns of a row.
template <class T>
struct AddSlices {
  using Params = SliceParams;
  static constexpr const char* name = "add_slices";
  static constexpr int threads = 256, min_blocks = 1;

  static int64_t blocks(const Params& p) { return divide_up(p.out.rows * (p.out.cols / kPiece), threads); }

  static LOCAS_DEVICE void run(const Params& p, unsigned char*) {
    const int64_t index = static_cast<int64_t>(ptx::block_index()) * threads + ptx::thread_index();
    const int64_t pieces = p.out.cols / kPiece, row = index / pieces, col = index % pieces * kPiece;
    if (row >= p.out.rows) return;
    float sum[kPiece] = {};
    if (p.bias) load_piece(static_cast<const T*>(p.bias) + col, sum);
    for (int split = 0; split < p.splits; ++split) {
      float slice[kPiece];
      load_piece(p.slices + (split * p.out.rows + row) * p.out.cols + col, slice);
#pragma unroll
      for (int i = 0; i < kPiece; ++i) sum[i] += slice[i];
    }
    store_piece(sum, static_cast<T*>(p.out.data) + row * p.out.stride + col);
  }
};

}  // namespace
}  // namespace locas::cuda
