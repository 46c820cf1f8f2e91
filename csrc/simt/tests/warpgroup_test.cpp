// Tensor maps, mbarriers, wgmma and the asynchronous proxy: a warp-specialised product against plain loops, and the
// same with one line left out or wrong, which the runner must notice; then the rules that they bring, each broken once.
#include "cuda/ptx/warpgroup.cuh"
#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/bulk_tensor.cuh"
#include "cuda/ptx/convert.cuh"
#include "cuda/ptx/grid.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/mma.cuh"
#include "cuda/ptx/thread.cuh"
#include "cuda/ptx/wgmma.cuh"
#include "cuda/tensor_map.cuh"
#include "simt/tests/bugs.h"
#include "simt/tests/harness.h"

namespace locas::test {
namespace {

using ptx::Major;

enum class Bug {
  none,
  no_full_wait,
  no_empty_wait,
  early_release,
  no_wgmma_fence,
  no_wgmma_wait,
  wrong_bytes,
  wrong_stride,
  wrong_k_step,
  no_init_fence,
  no_proxy_fence,
  no_store_barrier,
  no_store_wait,
  no_grid_wait,
};

// out [m, n] = a b, of operands that lie [m, k] or [k, m], and [n, k] or [k, n]. A CTA takes the 128 x kN tiles that are
// its turn: a producer warp, two consumer warpgroups of 64 rows.
struct ProductParams {
  ptx::TensorMap a, b, out;
  int k, tiles_m, tiles_n;
};

template <class T, int kN, Major a_major, Major b_major, Bug bug>
struct TensorProduct {
  using Params = ProductParams;
  static constexpr const char* name = "TensorProduct";
  static constexpr int threads = 384, min_blocks = 1, kM = 128, kK = 64, kStages = 2;
  struct Shared {
    alignas(1024) T a[kStages][kM * kK];
    alignas(1024) T b[kStages][kN * kK];
    alignas(1024) T out[8][16 * 32];  // of each consumer warp
    alignas(8) uint64_t full[kStages], empty[kStages];
  };

  static void load(Major major, T* to, const ptx::TensorMap& map, int mn_count, int mn, int k, uint64_t* full) {
    if (major == Major::k) return ptx::bulk_tensor_load(to, map, k, mn, full);
    for (int slab = 0; slab < mn_count; slab += 64) ptx::bulk_tensor_load(to + slab * kK, map, mn + slab, k, full);
  }

  static void produce(const Params& p, Shared& shared) {
    if (bug != Bug::no_grid_wait) ptx::wait_for_launch_before();
    int step = 0;
    for (int tile = ptx::block_index(); tile < p.tiles_m * p.tiles_n; tile += ptx::block_count())
      for (int k = 0; k < p.k; k += kK, ++step) {
        const int stage = step % kStages;
        if (bug != Bug::no_empty_wait) ptx::mbarrier_wait(&shared.empty[stage], (step / kStages & 1) ^ 1);
        const int bytes = (kM + kN) * kK * sizeof(T);
        ptx::mbarrier_arrive_expect(&shared.full[stage], bug == Bug::wrong_bytes ? bytes / 2 : bytes);
        load(a_major, shared.a[stage], p.a, kM, tile % p.tiles_m * kM, k, &shared.full[stage]);
        load(b_major, shared.b[stage], p.b, kN, tile / p.tiles_m * kN, k, &shared.full[stage]);
      }
  }

  static void release(Shared& shared, int step) {
    if (step >= 0 && ptx::lane_index() == 0) ptx::mbarrier_arrive(&shared.empty[step % kStages]);
  }

  static void multiply(float (&sums)[kN / 2], Shared& shared, int stage, bool accumulate) {
    const int consumer = ptx::warpgroup_index() - 1;
    const int slab = bug == Bug::wrong_stride ? 4096 : 8192;
    uint64_t a = ptx::operand_descriptor<a_major>(shared.a[stage] + consumer * 64 * kK);
    uint64_t b = ptx::operand_descriptor<b_major>(shared.b[stage], slab);
    for (int k = 0; k < kK; k += 16) {
      ptx::wgmma<T, kN, a_major, b_major>(sums, a, b, accumulate || k > 0);
      a += ptx::kNextK16<a_major>;
      b += ptx::kNextK16 < bug == Bug::wrong_k_step ? Major::mn : b_major > ;
    }
  }

  static void store_tile(const Params& p, Shared& shared, const float (&sums)[kN / 2], int m, int n) {
    const int warp = ptx::warp_index() - 4, lane = ptx::lane_index();
    T* out = shared.out[warp];
    for (int col = 0; col < kN; col += 32) {
      for (int half = 0; half < 2; ++half) {
        uint32_t pairs[4];
        for (int i = 0; i < 4; ++i)
          pairs[i] = ptx::pack<T>(sums[col / 2 + half * 8 + 2 * i], sums[col / 2 + half * 8 + 2 * i + 1]);
        const int row = lane % 16, piece = half * 2 + lane / 16;
        ptx::stmatrix_x4(out + row * 32 + (piece ^ (row / 2 % 4)) * 8, pairs);
      }
      if (bug != Bug::no_proxy_fence) ptx::fence_async_shared();
      if (bug != Bug::no_store_barrier) ptx::sync_warp();
      if (lane == 0) {
        ptx::bulk_tensor_store(p.out, n + col, m + warp * 16, out);
        ptx::bulk_commit();
        if (bug != Bug::no_store_wait) ptx::bulk_wait_read<0>();
      }
      ptx::sync_warp();
    }
  }

  static void consume(const Params& p, Shared& shared) {
    int step = 0;
    for (int tile = ptx::block_index(); tile < p.tiles_m * p.tiles_n; tile += ptx::block_count()) {
      float sums[kN / 2];
      const int first = step;
      for (int k = 0; k < p.k; k += kK, ++step) {
        const int stage = step % kStages;
        if (bug != Bug::no_full_wait) ptx::mbarrier_wait(&shared.full[stage], step / kStages & 1);
        if (bug != Bug::no_wgmma_fence) ptx::wgmma_fence();
        multiply(sums, shared, stage, k > 0);
        ptx::wgmma_commit();
        if (bug == Bug::early_release) {
          release(shared, step);
        } else {
          ptx::wgmma_wait<1>();
          release(shared, step == first ? -1 : step - 1);
        }
      }
      if (bug != Bug::no_wgmma_wait) ptx::wgmma_wait<0>();
      if (bug != Bug::early_release) release(shared, step - 1);
      store_tile(p, shared, sums, tile % p.tiles_m * kM, tile / p.tiles_m * kN);
    }
  }

  static void run(const Params& p, unsigned char* memory) {
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    if (ptx::thread_index() == 0) {
      for (int stage = 0; stage < kStages; ++stage) {
        ptx::mbarrier_init(&shared.full[stage], 1);
        ptx::mbarrier_init(&shared.empty[stage], 8);
      }
      if (bug != Bug::no_init_fence) ptx::mbarrier_init_fence();
    }
    ptx::sync_threads();
    if (ptx::warpgroup_index() == 0) {
      ptx::return_registers<24>();
      if (ptx::warp_index() == 0 && ptx::elect_one()) produce(p, shared);
    } else {
      ptx::take_registers<240>();
      consume(p, shared);
    }
  }
};

// Writes what the product reads, in the launch before it.
template <class T>
struct Fill {
  struct Params {
    T* to;
    const T* from;
    int count;
  };
  static constexpr const char* name = "Fill";
  static constexpr int threads = 64, min_blocks = 1;
  static void run(const Params& p, unsigned char*) {
    for (int i = ptx::thread_index(); i < p.count; i += threads) ptx::store(p.to + i, ptx::load(p.from + i));
  }
};

// m, n, k fit no tile. Small integers: every sum is exact.
template <class T, int kN, Major a_major, Major b_major, Bug bug = Bug::none>
void check_product() {
  using Kernel = TensorProduct<T, kN, a_major, b_major, bug>;
  const int m = 144, n = kN + 24, k = 200, width = n + 8;
  Random random(17);
  const auto integers = [&](int count) {
    std::vector<T> values(count);
    for (T& value : values) value = ptx::from_float<T>(static_cast<float>(random.integer(-2, 2)));
    return values;
  };
  simt::Buffer<T> a("a", m * k), a_values("a_values", integers(m * k)), b("b", integers(n * k));
  StridedBuffer<T> out("out", m, n, width);
  cuda::launch<Fill<T>>(1, 0, kQueue, {a.data(), a_values.data(), m * k});
  const Matrix a_matrix = a_major == Major::k ? rows_of(a, m, k) : rows_of(a, k, m);
  const Matrix b_matrix = b_major == Major::k ? rows_of(b, n, k) : rows_of(b, k, n);
  const ProductParams params{cuda::tensor_map<T>(a_matrix, cuda::operand_box(a_major == Major::k ? 128 : 64)),
                             cuda::tensor_map<T>(b_matrix, cuda::operand_box(b_major == Major::k ? kN : 64)),
                             cuda::tensor_map<T>(out.view(), {16, 32, 64}),
                             k,
                             (m + 127) / 128,
                             (n + kN - 1) / kN};
  cuda::launch<Kernel>(3, sizeof(typename Kernel::Shared), kQueue, params, {.programmatic = true});
  std::vector<T> expected;
  for (int row = 0; row < m; ++row)
    for (int col = 0; col < n; ++col) {
      float sum = 0.0f;
      for (int i = 0; i < k; ++i)
        sum += ptx::to_float(a_major == Major::k ? a[row * k + i] : a[i * m + row]) *
               ptx::to_float(b_major == Major::k ? b[col * k + i] : b[i * n + col]);
      expected.push_back(ptx::from_float<T>(sum));
    }
  expect_equal("a b", out.values(), expected);
}

LOCAS_TEST(products, "warpgroup: tensor maps and wgmma") {
  for_each_seed(check_product<bf16, 64, Major::k, Major::k>);
  for_each_seed(check_product<f16, 96, Major::k, Major::k>);
  for_each_seed(check_product<bf16, 128, Major::k, Major::mn>);
  for_each_seed(check_product<f16, 192, Major::mn, Major::k>);
  for_each_seed(check_product<bf16, 256, Major::mn, Major::mn>);
  return "5 products, 10 seeds";
}

template <Bug bug>
void wrong_product() {
  check_product<bf16, 128, Major::k, Major::mn, bug>();
}

LOCAS_TEST(planted_bugs, "warpgroup: planted bugs") {
  std::string counts;
  const auto plant = [&](const char* bug, const char* reason, const std::function<void()>& body) {
    counts += std::string(counts.empty() ? "" : ", ") + bug + " found by " +
              std::to_string(seeds_that_find(bug, reason, body));
  };
  plant("no wait for a full stage", "", wrong_product<Bug::no_full_wait>);
  plant("no wait for an empty stage", "", wrong_product<Bug::no_empty_wait>);
  plant("early release", "", wrong_product<Bug::early_release>);
  plant("no wgmma fence", "without wgmma_fence", wrong_product<Bug::no_wgmma_fence>);
  plant("no wgmma wait", "", wrong_product<Bug::no_wgmma_wait>);
  plant("wrong expected bytes", "", wrong_product<Bug::wrong_bytes>);
  plant("wrong stride in a descriptor", "", wrong_product<Bug::wrong_stride>);
  plant("wrong k step of a descriptor", "", check_product<bf16, 128, Major::k, Major::k, Bug::wrong_k_step>);
  plant("no fence of the mbarriers", "without mbarrier_init_fence", wrong_product<Bug::no_init_fence>);
  plant("no fence before a bulk store", "without fence_async_shared", wrong_product<Bug::no_proxy_fence>);
  plant("no barrier before a bulk store", "", wrong_product<Bug::no_store_barrier>);
  plant("no wait for a bulk store", "", wrong_product<Bug::no_store_wait>);
  plant("no wait for the launch before", "without having waited", wrong_product<Bug::no_grid_wait>);
  return counts + " of 10 seeds";
}

}  // namespace
}  // namespace locas::test
