// Blocks of a cluster: two kernels that must be right in every seed, and the same with one line left out or wrong, which
// the runner must notice.
#include "cuda/ptx/cluster.cuh"
#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/bulk_tensor.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/thread.cuh"
#include "cuda/ptx/warpgroup.cuh"
#include "cuda/tensor_map.cuh"
#include "simt/tests/bugs.h"
#include "simt/tests/harness.h"

namespace locas::test {
namespace {

enum class Bug {
  none,
  no_start_barrier,
  no_exit_barrier,
  no_init_fence,
  own_release_only,
  own_arrivals_only,
  early_release,
  wrong_mask,
  block_outside,
  wrong_bytes,
  no_wait,
  wrong_slot,
};

constexpr int kCluster = 2, kCols = 64;

// ---- out [rows] = row sums of x [rows, 64], which both blocks need --------------------------------------------------
// A box of 32 rows a step; each block loads half of it for both. Two consumer warps have 16 rows each.
struct RowParams {
  ptx::TensorMap x;  // boxes of 16 rows
  float* out;        // [blocks, rows]
  int rows;
};

template <Bug bug>
struct SharedRows {
  using Params = RowParams;
  static constexpr const char* name = "SharedRows";
  static constexpr int threads = 96, min_blocks = 1, kStages = 2, kStepRows = 32;
  struct Shared {
    alignas(1024) bf16 x[kStages][kStepRows * kCols];
    alignas(8) uint64_t full[kStages], empty[kStages];
  };

  static void produce(const Params& p, Shared& shared) {
    const int rank = ptx::cluster_rank();
    for (int step = 0; step * kStepRows < p.rows; ++step) {
      const int stage = step % kStages, first = rank * kStepRows / kCluster;
      ptx::mbarrier_wait(&shared.empty[stage], (step / kStages & 1) ^ 1);
      const int bytes = kStepRows * kCols * sizeof(bf16);
      ptx::mbarrier_arrive_expect(&shared.full[stage], bug == Bug::wrong_bytes ? bytes / kCluster : bytes);
      ptx::bulk_tensor_multicast(shared.x[stage] + first * kCols, p.x, 0, step * kStepRows + first, &shared.full[stage],
                                 bug == Bug::wrong_mask      ? 1u << rank
                                 : bug == Bug::block_outside ? 6
                                                             : 3);
    }
  }

  static void release(Shared& shared, int stage) {
    if (ptx::lane_index() != 0) return;
    for (int block = 0; block < kCluster; ++block)
      if (bug != Bug::own_release_only || block == ptx::cluster_rank())
        ptx::mbarrier_arrive_in(block, &shared.empty[stage]);
  }

  static void consume(const Params& p, Shared& shared) {
    const int row = ptx::thread_index() / 2 - 16, half = ptx::thread_index() % 2;
    for (int step = 0; step * kStepRows < p.rows; ++step) {
      const int stage = step % kStages;
      ptx::mbarrier_wait(&shared.full[stage], step / kStages & 1);
      if (bug == Bug::early_release) release(shared, stage);
      float sum = 0.0f;
      for (int col = 0; col < kCols; ++col) sum += ptx::to_float(ptx::load(&shared.x[stage][row * kCols + col]));
      ptx::sync_warp();
      if (bug != Bug::early_release) release(shared, stage);
      if (half == 0 && step * kStepRows + row < p.rows)
        ptx::store(p.out + ptx::block_index() * p.rows + step * kStepRows + row, sum);
    }
  }

  static void run(const Params& p, unsigned char* memory) {
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    if (ptx::thread_index() == 0) {
      for (int stage = 0; stage < kStages; ++stage) {
        ptx::mbarrier_init(&shared.full[stage], 1);
        ptx::mbarrier_init(&shared.empty[stage], bug == Bug::own_arrivals_only ? 2 : 2 * kCluster);
      }
      if (bug != Bug::no_init_fence) ptx::mbarrier_init_fence();
    }
    if (bug == Bug::no_start_barrier) ptx::sync_threads();
    else ptx::sync_cluster();
    if (ptx::warp_index() > 0) consume(p, shared);
    else if (ptx::elect_one()) produce(p, shared);
    if (bug != Bug::no_exit_barrier) ptx::sync_cluster();
  }
};

template <Bug bug>
void share_rows() {
  const int rows = 150, blocks = 2 * kCluster;
  Random random(3);
  std::vector<bf16> values(rows * kCols);
  for (bf16& value : values) value = ptx::from_float<bf16>(static_cast<float>(random.integer(-3, 3)));
  simt::Buffer<bf16> x("x", values);
  simt::Buffer<float> out("out", blocks * rows);
  cuda::launch<SharedRows<bug>>(blocks, sizeof(typename SharedRows<bug>::Shared), kQueue,
                                {cuda::tensor_map<bf16>(rows_of(x, rows, kCols), {16, kCols, 0}), out.data(), rows},
                                {.cluster = kCluster});
  std::vector<float> expected;
  for (int i = 0; i < blocks * rows; ++i) {
    float sum = 0.0f;
    for (int col = 0; col < kCols; ++col) sum += ptx::to_float(x[i % rows * kCols + col]);
    expected.push_back(sum);
  }
  expect_equal("row sums", out.values(), expected);
}

// ---- out [clusters, 2, 128]: block q adds up part q of x [clusters, blocks, 2, 128] over the blocks ------------------
struct PartParams {
  const float* x;
  float* out;
};

template <Bug bug>
struct AddedParts {
  using Params = PartParams;
  static constexpr const char* name = "AddedParts";
  static constexpr int threads = 32, min_blocks = 1, kPart = 4 * threads;
  struct Shared {
    alignas(16) float received[kPart];
    uint64_t arrived;
  };

  static void run(const Params& p, unsigned char* memory) {
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    const int lane = ptx::lane_index(), rank = ptx::cluster_rank();
    if (lane == 0) {
      ptx::mbarrier_init(&shared.arrived, 1);
      ptx::mbarrier_init_fence();
      const int bytes = sizeof shared.received;
      ptx::mbarrier_arrive_expect(&shared.arrived, bug == Bug::wrong_bytes ? bytes / 2 : bytes);
    }
    if (bug == Bug::no_start_barrier) ptx::sync_threads();
    else ptx::sync_cluster();
    float parts[kCluster][4];
    for (int part = 0; part < kCluster; ++part)
      for (int i = 0; i < 4; ++i)
        parts[part][i] = ptx::load(p.x + (ptx::block_index() * kCluster + part) * kPart + 4 * lane + i);
    ptx::store_async(1 - rank, shared.received + 4 * (bug == Bug::wrong_slot ? lane / 2 : lane), parts[1 - rank],
                     &shared.arrived);
    if (bug != Bug::no_wait) ptx::mbarrier_wait_in_cluster(&shared.arrived, 0);
    for (int i = 0; i < 4; ++i)
      ptx::store(p.out + ptx::block_index() * kPart + 4 * lane + i,
                 parts[rank][i] + ptx::load(shared.received + 4 * lane + i));
  }
};

template <Bug bug>
void add_parts() {
  using Kernel = AddedParts<bug>;
  const int clusters = 3, blocks = clusters * kCluster, part = Kernel::kPart;
  Random random(4);
  std::vector<float> values(blocks * kCluster * part);
  for (float& value : values) value = static_cast<float>(random.integer(-9, 9));
  simt::Buffer<float> x("x", values), out("out", blocks * part);
  cuda::launch<Kernel>(blocks, sizeof(typename Kernel::Shared), kQueue, {x.data(), out.data()}, {.cluster = kCluster});
  std::vector<float> expected;
  for (int i = 0; i < blocks * part; ++i) {
    const int block = i / part, first = block / kCluster * kCluster, own = block % kCluster;
    float sum = 0.0f;
    for (int from = 0; from < kCluster; ++from) sum += x[((first + from) * kCluster + own) * part + i % part];
    expected.push_back(sum);
  }
  expect_equal("sums of parts", out.values(), expected);
}

LOCAS_TEST(clusters, "clusters: multicast and sums over blocks") {
  for_each_seed(share_rows<Bug::none>);
  for_each_seed(add_parts<Bug::none>);
  return "2 kernels, 10 seeds";
}

LOCAS_TEST(planted_bugs, "clusters: planted bugs") {
  std::string counts;
  const auto plant = [&](const char* bug, const char* reason, const std::function<void()>& body) {
    counts += std::string(counts.empty() ? "" : ", ") + bug + " found by " +
              std::to_string(seeds_that_find(bug, reason, body));
  };
  plant("no barrier at the start", "", share_rows<Bug::no_start_barrier>);
  plant("no barrier at the exit", "which has exited", share_rows<Bug::no_exit_barrier>);
  plant("no fence of the mbarriers", "without mbarrier_init_fence", share_rows<Bug::no_init_fence>);
  plant("a release that stays in the block", "deadlock", share_rows<Bug::own_release_only>);
  plant("arrivals of the own block only", "", share_rows<Bug::own_arrivals_only>);
  plant("early release", "", share_rows<Bug::early_release>);
  plant("wrong multicast mask", "deadlock", share_rows<Bug::wrong_mask>);
  plant("a mask beyond the cluster", "of a cluster of 2", share_rows<Bug::block_outside>);
  plant("wrong expected bytes", "", share_rows<Bug::wrong_bytes>);
  plant("stores before the others have begun", "", add_parts<Bug::no_start_barrier>);
  plant("wrong bytes of stores", "", add_parts<Bug::wrong_bytes>);
  plant("no wait for stores", "", add_parts<Bug::no_wait>);
  plant("two stores to one place", "", add_parts<Bug::wrong_slot>);
  return counts + " of 10 seeds";
}

}  // namespace
}  // namespace locas::test
