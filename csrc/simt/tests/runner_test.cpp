// The runner itself: two pipelines, which must give the right sums in every seed, and the same with one line left out,
// which the runner must notice; then one kernel for every rule that it enforces, broken.
#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/copy_async.cuh"
#include "cuda/ptx/grid.cuh"
#include "cuda/ptx/memory.cuh"
#include "cuda/ptx/mma.cuh"
#include "cuda/ptx/shuffle.cuh"
#include "cuda/ptx/thread.cuh"
#include "simt/tests/bugs.h"
#include "simt/tests/harness.h"

namespace locas::test {
namespace {

enum class Bug {
  none,
  no_sync_threads,
  no_copy_wait,
  no_bound,
  no_full_wait,
  no_empty_wait,
  no_sync_grid,
  one_sync_grid,
  skips_sync_grid,
  read_once
};

// ---- out [rows] = row sums of x [rows, cols] in a cp.async pipeline of two stages ----------------------------------
// CTA b owns row b. A stage holds 16 bytes a thread; zeros come where the row has ended.
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
      load_stage(p, shared, stage + 1);
      if (bug != Bug::no_copy_wait) ptx::cp_async_wait<1>();
      if (bug != Bug::no_sync_threads) ptx::sync_threads();
      // Elements that other threads copied.
      for (int i = 0; i < 4; ++i) sum += ptx::load(&shared.stage[stage % 2][i * threads + thread]);
      ptx::sync_threads();
    }
    for (int mask = 16; mask > 0; mask /= 2) sum += ptx::shuffle_xor(sum, mask);
    if (ptx::lane_index() == 0) ptx::store(&shared.warp_sums[ptx::warp_index()], sum);
    ptx::sync_threads();
    if (thread == 0)
      ptx::store(p.out + ptx::block_index(), ptx::load(&shared.warp_sums[0]) + ptx::load(&shared.warp_sums[1]));
  }
};

// ---- The same sums by a producer warp that issues bulk copies and two consumer warps -------------------------------
template <Bug bug>
struct BulkRowSum {
  using Params = RowSumParams;
  static constexpr const char* name = "BulkRowSum";
  static constexpr int threads = 96, min_blocks = 1, kStages = 2, kStage = 128, kConsumers = 64;
  struct Shared {
    alignas(128) float stage[kStages][kStage];
    float warp_sums[2];
    alignas(8) uint64_t full[kStages], empty[kStages];
  };

  static LOCAS_DEVICE void produce(const Params& p, Shared& shared, int steps) {
    const float* row = p.x + static_cast<int64_t>(ptx::block_index()) * p.cols;
    for (int step = 0; step < steps; ++step) {
      const int stage = step % kStages, first = step * kStage;
      const uint32_t bytes = sizeof(float) * (p.cols - first < kStage ? p.cols - first : kStage);
      if (bug != Bug::no_empty_wait) simt::mbarrier_wait(&shared.empty[stage], (step / kStages & 1) ^ 1);
      simt::mbarrier_arrive(&shared.full[stage], bytes);
      simt::bulk_copy(shared.stage[stage], row + first, bytes, &shared.full[stage]);
    }
  }

  static LOCAS_DEVICE float consume(const Params& p, Shared& shared, int steps) {
    float sum = 0.0f;
    for (int step = 0; step < steps; ++step) {
      const int stage = step % kStages, left = p.cols - step * kStage;
      if (bug != Bug::no_full_wait) simt::mbarrier_wait(&shared.full[stage], step / kStages & 1);
      for (int i = ptx::thread_index(); i < kStage && i < left; i += kConsumers)
        sum += ptx::load(&shared.stage[stage][i]);
      simt::mbarrier_arrive(&shared.empty[stage], 0);
    }
    return sum;
  }

  static LOCAS_DEVICE void run(const Params& p, unsigned char* memory) {
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    const int steps = (p.cols + kStage - 1) / kStage, thread = ptx::thread_index();
    if (thread == 0) {
      for (int stage = 0; stage < kStages; ++stage) {
        simt::mbarrier_init(&shared.full[stage], 1);
        simt::mbarrier_init(&shared.empty[stage], kConsumers);
      }
      simt::mbarrier_init_fence();
    }
    ptx::sync_threads();
    if (thread >= kConsumers) {
      if (thread == kConsumers) produce(p, shared, steps);
      return;
    }
    float sum = consume(p, shared, steps);
    for (int mask = 16; mask > 0; mask /= 2) sum += ptx::shuffle_xor(sum, mask);
    if (ptx::lane_index() == 0) ptx::store(&shared.warp_sums[ptx::warp_index()], sum);
    simt::barrier("named_barrier", 1, kConsumers);
    if (thread == 0)
      ptx::store(p.out + ptx::block_index(), ptx::load(&shared.warp_sums[0]) + ptx::load(&shared.warp_sums[1]));
  }
};

template <class Kernel>
void row_sums() {
  Random random(7);
  for (const int cols : {4, 252, 256, 1028}) {
    const int rows = 3;
    simt::Buffer<float> x("x", random.normals<float>(rows * cols)), out("out", rows);
    cuda::launch<Kernel>(rows, sizeof(typename Kernel::Shared), kQueue, {x.data(), out.data(), cols});
    for (int row = 0; row < rows; ++row) {
      double sum = 0.0;
      for (int col = 0; col < cols; ++col) sum += x[row * cols + col];
      if (!(std::abs(out[row] - sum) < 1e-4)) fail("row %d of %d columns: %g instead of %g", row, cols, out[row], sum);
    }
  }
}

// ---- Each block's number goes round all blocks of a cooperative grid, twice -----------------------------------------
struct RoundParams {
  float* numbers;  // [blocks], of each block in the end that of the second one before it
};

template <Bug bug>
struct Round {
  using Params = RoundParams;
  static constexpr const char* name = "Round";
  static constexpr int threads = 64, min_blocks = 1;

  static LOCAS_DEVICE void run(const Params& p, unsigned char*) {
    const int block = ptx::block_index(), blocks = ptx::block_count();
    // Behind the first warp, which is not the one that waits for the grid.
    const bool moves = ptx::thread_index() == threads - 1;
    if (moves) ptx::store(p.numbers + block, static_cast<float>(block));
    for (int turn = 0; turn < 2; ++turn) {
      if (bug != Bug::no_sync_grid && !(bug == Bug::skips_sync_grid && turn == 1 && block == 1)) ptx::sync_grid();
      const float* before = p.numbers + (block + blocks - 1) % blocks;
      const float number = !moves ? 0.0f : bug == Bug::read_once ? ptx::load_once(before) : ptx::load(before);
      if (bug != Bug::one_sync_grid) ptx::sync_grid();  // all have read what is now overwritten
      if (moves) ptx::store(p.numbers + block, number);
    }
  }
};

// Twice, as a graph replays it.
template <class Kernel>
void rounds() {
  constexpr int kBlocks = simt::kMultiprocessors;
  simt::Buffer<float> numbers("numbers", kBlocks);
  for (int replay = 0; replay < 2; ++replay) {
    cuda::launch<Kernel>(kBlocks, 0, kQueue, {numbers.data()}, {.cooperative = true});
    for (int block = 0; block < kBlocks; ++block)
      if (numbers[block] != static_cast<float>((block + kBlocks - 2) % kBlocks))
        fail("block %d: %g", block, numbers[block]);
  }
}

LOCAS_TEST(pipelines, "runner: cp.async and mbarrier pipelines, a cooperative grid") {
  for_each_seed(row_sums<RowSum<Bug::none>>);
  for_each_seed(row_sums<BulkRowSum<Bug::none>>);
  for_each_seed(rounds<Round<Bug::none>>);
  return "9 cases, 10 seeds";
}

LOCAS_TEST(planted_bugs, "runner: planted bugs") {
  std::string counts;
  const auto plant = [&](const char* bug, const char* reason, const std::function<void()>& body) {
    counts += std::string(counts.empty() ? "" : ", ") + bug + " found by " +
              std::to_string(seeds_that_find(bug, reason, body));
  };
  plant("no sync_threads", "race", row_sums<RowSum<Bug::no_sync_threads>>);
  plant("no cp.async wait", "under way (no cp_async_wait yet)", row_sums<RowSum<Bug::no_copy_wait>>);
  plant("no mbarrier wait", "", row_sums<BulkRowSum<Bug::no_full_wait>>);
  plant("no wait for an empty stage", "", row_sums<BulkRowSum<Bug::no_empty_wait>>);
  plant("no bound", "outside every buffer", row_sums<RowSum<Bug::no_bound>>);
  plant("no sync_grid before a read", "race", rounds<Round<Bug::no_sync_grid>>);
  plant("no sync_grid before a write", "race", rounds<Round<Bug::one_sync_grid>>);
  plant("a block skips sync_grid", "race", rounds<Round<Bug::skips_sync_grid>>);
  plant("load_once behind sync_grid", "by the read-only path", rounds<Round<Bug::read_once>>);
  return counts + " of 10 seeds";
}

// ---- One broken kernel per rule -------------------------------------------------------------------------------------
using Body = void (*)(float* data, float* shared);  // 64 floats each, of ones and of poison
struct MisuseParams {
  float* data;
  Body body;
};

struct Misuse {
  using Params = MisuseParams;
  static constexpr const char* name = "Misuse";
  static constexpr int threads = 64, min_blocks = 1;
  static void run(const Params& p, unsigned char* shared) { p.body(p.data, reinterpret_cast<float*>(shared)); }
};

using ptx::thread_index, ptx::warp_index, ptx::lane_index;

// Every seed must abort with this reason.
void expect_abort(const char* rule, const char* reason, Body body, int blocks = 1, cuda::LaunchOptions options = {}) {
  const int found = seeds_that_find(rule, reason, [=] {
    simt::Buffer<float> data("data", std::vector<float>(64, 1.0f));
    cuda::launch<Misuse>(blocks, 256, kQueue, {data.data(), body}, options);
  });
  if (found != kSeeds) fail("%s: found by %d of %d seeds", rule, found, kSeeds);
}

LOCAS_TEST(memory_rules, "runner: rules of memory") {
  expect_abort("misaligned", "which is not aligned",
               [](float* data, float*) { ptx::load(reinterpret_cast<Vec16*>(data + 1)); });
  expect_abort("past a buffer", "'data', 256 bytes, and this is byte 256",
               [](float* data, float*) { ptx::load(data + 64); });
  expect_abort("before a buffer", "outside every buffer", [](float* data, float*) { ptx::store(data - 1, 0.0f); });
  expect_abort("past shared memory", "shared memory, which has 256 bytes",
               [](float*, float* shared) { ptx::load(shared + 64); });
  expect_abort("ldmatrix from global memory", "of shared memory", [](float* data, float*) {
    uint32_t r[4];
    ptx::ldmatrix_x4(r, data);
  });
  expect_abort("misaligned ldmatrix", "which is not aligned", [](float*, float* shared) {
    uint32_t r[4];
    ptx::ldmatrix_x4(r, shared + 1);
  });
  expect_abort("misaligned cp.async", "must be aligned to 16",
               [](float* data, float* shared) { ptx::cp_async_16(shared + 1, data, true); });
  return "7 rules, 10 seeds";
}

// Every seed must abort with this reason in the last of three launches, of which the second and the third are programmatic;
// the second one only waits.
void expect_abort_of_the_last(const char* rule, const char* reason, Body first, Body last) {
  const int found = seeds_that_find(rule, reason, [first, last] {
    simt::Buffer<float> data("data", std::vector<float>(64, 1.0f));
    cuda::launch<Misuse>(1, 256, kQueue, {data.data(), first});
    cuda::launch<Misuse>(1, 256, kQueue, {data.data(), [](float*, float*) { ptx::wait_for_launch_before(); }},
                         {.programmatic = true});
    cuda::launch<Misuse>(1, 256, kQueue, {data.data(), last}, {.programmatic = true});
  });
  if (found != kSeeds) fail("%s: found by %d of %d seeds", rule, found, kSeeds);
}

LOCAS_TEST(launch_rules, "runner: rules of programmatic launches") {
  const Body writes = [](float* data, float*) { ptx::store(data + thread_index(), 2.0f); };
  const Body reads = [](float* data, float*) { ptx::load(data + thread_index()); };
  expect_abort_of_the_last("reads what two launches before wrote", "reads byte", writes, [](float* data, float*) {
    ptx::load(data + thread_index());
    ptx::wait_for_launch_before();
  });
  expect_abort_of_the_last("overwrites what two launches before read", "which a launch before read", reads,
                           [](float* data, float*) {
                             ptx::store(data + thread_index(), 2.0f);
                             ptx::wait_for_launch_before();
                           });
  expect_abort_of_the_last("never waits", "ends without having waited", reads, reads);
  for_each_seed([&] {
    simt::Buffer<float> data("data", std::vector<float>(64, 1.0f));
    cuda::launch<Misuse>(1, 256, kQueue, {data.data(), writes});
    cuda::launch<Misuse>(1, 256, kQueue, {data.data(), reads});  // waits for the first, being an ordinary one
    const auto reads_early = [](float* data, float*) {
      ptx::load(data + thread_index());
      ptx::wait_for_launch_before();
      ptx::store(data + thread_index(), 3.0f);
    };
    cuda::launch<Misuse>(1, 256, kQueue, {data.data(), reads_early}, {.programmatic = true});
  });
  return "3 rules, 10 seeds";
}

LOCAS_TEST(barrier_rules, "runner: rules of warps and barriers") {
  expect_abort("divergent collective", "divergent collective", [](float*, float*) {
    if (lane_index() == 3) simt::sync_warp();
    else ptx::shuffle_xor(1.0f, 1);
  });
  expect_abort("a lane has exited", "exit", [](float*, float*) {
    if (thread_index() != 3) simt::sync_warp();
  });
  expect_abort("a warp skips a barrier", "deadlock: 32 threads have exited, 32 threads wait in sync_threads",
               [](float*, float*) {
                 if (warp_index() == 0) ptx::sync_threads();
               });
  expect_abort("two counts at a barrier", "where others wait for",
               [](float*, float*) { simt::barrier("named_barrier", 1, lane_index() % 2 == 0 ? 32 : 64); });
  expect_abort("half a warp", "expected whole warps", [](float*, float*) { simt::barrier("named_barrier", 1, 48); });
  expect_abort("barrier 16", "numbered 0 to 15", [](float*, float*) { simt::barrier("named_barrier", 16, 64); });
  return "6 rules, 10 seeds";
}

LOCAS_TEST(grid_rules, "runner: rules of cooperative grids") {
  const cuda::LaunchOptions cooperative{.cooperative = true};
  expect_abort("sync_grid of blocks that are not all there", "not cooperative",
               [](float*, float*) { ptx::sync_grid(); });
  expect_abort(
      "too many blocks", "a cooperative launch of 4 blocks; 3 are resident at once", [](float*, float*) {}, 4,
      cooperative);
  expect_abort(
      "a block ends", "deadlock: 2 blocks wait in sync_grid, the others have ended",
      [](float*, float*) {
        if (ptx::block_index() != 1) ptx::sync_grid();
      },
      3, cooperative);
  expect_abort(
      "a warp does not come", "deadlock: 32 threads have exited, 32 threads wait in sync_threads",
      [](float*, float*) {
        if (warp_index() == 0) ptx::sync_grid();
      },
      3, cooperative);
  return "4 rules, 10 seeds";
}

LOCAS_TEST(mbarrier_rules, "runner: rules of mbarriers") {
  expect_abort("no init", "nobody initialised",
               [](float*, float* shared) { simt::mbarrier_arrive(reinterpret_cast<uint64_t*>(shared), 0); });
  expect_abort("over-arrival", "over-arrival", [](float*, float* shared) {
    auto* barrier = reinterpret_cast<uint64_t*>(shared);
    if (thread_index() == 0) {
      simt::mbarrier_init(barrier, 2);
      simt::mbarrier_arrive(barrier, 16);
      simt::mbarrier_arrive(barrier, 0);  // the phase now lacks 16 bytes, but no arrival
      simt::mbarrier_arrive(barrier, 0);
    }
  });
  expect_abort("bytes that never come", "deadlock: 63 threads have exited, 1 threads wait in mbarrier_wait",
               [](float* data, float* shared) {
                 auto* barrier = reinterpret_cast<uint64_t*>(shared);
                 if (thread_index() == 0) {
                   simt::mbarrier_init(barrier, 1);
                   simt::mbarrier_init_fence();
                   simt::mbarrier_arrive(barrier, 32);
                   simt::bulk_copy(shared + 16, data, 16, barrier);
                   simt::mbarrier_wait(barrier, 0);
                 }
               });
  expect_abort("an mbarrier read as data", "which is in an mbarrier", [](float*, float* shared) {
    if (thread_index() == 0) {
      simt::mbarrier_init(reinterpret_cast<uint64_t*>(shared), 1);
      ptx::load(shared);
    }
  });
  return "4 rules, 10 seeds";
}

LOCAS_TEST(race_rules, "runner: rules of races") {
  expect_abort("two writers in a warp", "race",
               [](float*, float* shared) { ptx::store(shared + thread_index() / 2, 1.0f); });
  expect_abort("sync_warp between warps", "race", [](float*, float* shared) {
    ptx::store(shared + thread_index(), 1.0f);
    simt::sync_warp();
    ptx::load(shared + (thread_index() + 32) % 64);
  });
  expect_abort("a write over what others read", "race", [](float*, float* shared) {
    ptx::store(shared + thread_index(), 1.0f);
    ptx::sync_threads();
    ptx::load(shared + (thread_index() + 1) % 64);
    ptx::store(shared + thread_index(), 2.0f);
  });
  expect_abort(
      "two blocks write one element", "of the same launch wrote",
      [](float* data, float*) { ptx::store(data + thread_index(), 2.0f); }, 2);
  expect_abort(
      "a block writes what another reads", "of the same launch",
      [](float* data, float*) {
        if (ptx::block_index() == 0) ptx::load(data + thread_index());
        else ptx::store(data + thread_index(), 2.0f);
      },
      2);
  expect_abort("load_once of what the launch wrote", "by the read-only path", [](float* data, float*) {
    ptx::store(data + thread_index(), 2.0f);
    ptx::load_once(data + thread_index());
  });
  return "6 rules, 10 seeds";
}

}  // namespace
}  // namespace locas::test
