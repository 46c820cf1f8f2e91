// Blocks of a cluster: a kernel that must be right in every seed, and the same with one line left out or wrong, which the
// runner must notice.
#include "cuda/ptx/cluster.cuh"
#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/thread.cuh"
#include "simt/tests/bugs.h"
#include "simt/tests/harness.h"

namespace locas::test {
namespace {

enum class Bug {
  none,
  no_start_barrier,
  no_init_fence,
  block_outside,
  wrong_bytes,
  no_wait,
  wrong_slot,
};

constexpr int kCluster = 2;

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
      if (bug != Bug::no_init_fence) ptx::mbarrier_init_fence();
      const int bytes = sizeof shared.received;
      ptx::mbarrier_arrive_expect(&shared.arrived, bug == Bug::wrong_bytes ? bytes / 2 : bytes);
    }
    if (bug == Bug::no_start_barrier) ptx::sync_threads();
    else ptx::sync_cluster();
    float parts[kCluster][4];
    for (int part = 0; part < kCluster; ++part)
      for (int i = 0; i < 4; ++i)
        parts[part][i] = ptx::load(p.x + (ptx::block_index() * kCluster + part) * kPart + 4 * lane + i);
    ptx::store_async(bug == Bug::block_outside ? 2 : 1 - rank,
                     shared.received + 4 * (bug == Bug::wrong_slot ? lane / 2 : lane), parts[1 - rank],
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

LOCAS_TEST(clusters, "clusters: sums over blocks") {
  for_each_seed(add_parts<Bug::none>);
  return "10 seeds";
}

LOCAS_TEST(planted_bugs, "clusters: planted bugs") {
  std::string counts;
  const auto plant = [&](const char* bug, const char* reason, const std::function<void()>& body) {
    counts += std::string(counts.empty() ? "" : ", ") + bug + " found by " +
              std::to_string(seeds_that_find(bug, reason, body));
  };
  plant("no barrier at the start", "", add_parts<Bug::no_start_barrier>);
  plant("no fence of the mbarriers", "without mbarrier_init_fence", add_parts<Bug::no_init_fence>);
  plant("a block beyond the cluster", "of a cluster of 2", add_parts<Bug::block_outside>);
  plant("wrong expected bytes", "", add_parts<Bug::wrong_bytes>);
  plant("no wait for stores", "", add_parts<Bug::no_wait>);
  plant("two stores to one place", "", add_parts<Bug::wrong_slot>);
  return counts + " of 10 seeds";
}

}  // namespace
}  // namespace locas::test
