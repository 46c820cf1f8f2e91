// The runner itself: small kernels in every primitive of ptx.cuh against plain loops, and the same kernels with one line
// left out, which the runner must notice.
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include "harness.h"

namespace locas::test {
namespace {

enum class Bug { none, no_sync_threads, no_copy_wait, no_mbarrier_wait, no_bound };

// ---- out [rows] = row sums of x [rows, cols]: a two-stage cp.async pipeline --------------------------------------
// CTA b owns row b. A stage holds 16 bytes a thread; what does not fill a stage arrives as zeros.
struct RowSumParams {
  const float* x;
  float* out;
  int cols;  // a multiple of 4
};

template <Bug bug>
struct RowSum {
  using Params = RowSumParams;
  static constexpr const char* name = "RowSum";
  static constexpr int threads = 64, min_blocks = 1, kStage = 4 * threads;
  struct Shared {
    float stage[2][kStage];
    float warp_sums[threads / 32];
  };

  static LOCAS_DEVICE void load_stage(const Params& p, Shared& shared, int stage) {
    const int col = stage * kStage + 4 * ptx::thread_index();
    const float* row = p.x + static_cast<int64_t>(ptx::block_index()) * p.cols;
    const bool inside = bug == Bug::no_bound || col < p.cols;
    ptx::cp_async_16(&shared.stage[stage % 2][4 * ptx::thread_index()], row + col, inside);
    ptx::cp_async_commit();
  }

  static LOCAS_DEVICE void run(const Params& p, unsigned char* memory) {
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    const int stages = (p.cols + kStage - 1) / kStage, thread = ptx::thread_index();
    float sum = 0.0f;
    load_stage(p, shared, 0);
    for (int stage = 0; stage < stages; ++stage) {
      load_stage(p, shared, stage + 1);  // zeros past the end
      if (bug != Bug::no_copy_wait) ptx::cp_async_wait<1>();
      if (bug != Bug::no_sync_threads) ptx::sync_threads();
      // Another thread's elements, so that the barriers matter.
      for (int i = 0; i < 4; ++i) sum += ptx::load(&shared.stage[stage % 2][i * threads + (thread + 1) % threads]);
      ptx::sync_threads();
    }
    for (int mask = 16; mask > 0; mask /= 2) sum += ptx::shuffle_xor(sum, mask);
    if (ptx::lane_index() == 0) ptx::store(&shared.warp_sums[ptx::warp_index()], sum);
    ptx::sync_threads();
    if (thread == 0)
      ptx::store(p.out + ptx::block_index(), ptx::load(&shared.warp_sums[0]) + ptx::load(&shared.warp_sums[1]));
  }
};

template <Bug bug>
void row_sum() {
  Random random(7);
  for (const int cols : {4, 252, 256, 1028}) {
    const int rows = 3;
    simt::Buffer<float> x("x", random.normals<float>(rows * cols)), out("out", rows);
    cuda::launch<RowSum<bug>>(rows, sizeof(typename RowSum<bug>::Shared), kQueue, {x.data(), out.data(), cols});
    for (int row = 0; row < rows; ++row) {
      double sum = 0.0;
      for (int col = 0; col < cols; ++col) sum += x[row * cols + col];
      if (!(std::abs(out[row] - sum) < 1e-4)) fail("row %d of %d columns: %g instead of %g", row, cols, out[row], sum);
    }
  }
}

LOCAS_TEST(row_sums, "runner: cp.async pipeline") {
  for_each_seed(row_sum<Bug::none>);
  return "4 shapes, 10 seeds";
}

}  // namespace
}  // namespace locas::test
