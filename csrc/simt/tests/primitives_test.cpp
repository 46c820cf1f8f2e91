// The host twins of cuda/ptx/ against definitions written from the other end: rounding by division, matrices by index.
#include "cuda/ptx/copy_async.cuh"
#include "cuda/ptx/memory.cuh"
#include "cuda/ptx/mma.cuh"
#include "cuda/ptx/shuffle.cuh"
#include "cuda/ptx/thread.cuh"
#include "simt/tests/harness.h"
#include "simt/warp.h"

namespace locas::test {
namespace {

// ---- Conversions -------------------------------------------------------------------------------------------------
struct Format {
  int mantissa_bits, smallest_exponent;  // of a normal number
  double largest;
};
template <class T>
constexpr Format kFormat = std::is_same_v<T, bf16> ? Format{7, -126, 0x1.fep127} : Format{10, -14, 65504.0};

// x to the nearest multiple of the format's step at x, ties to even.
double nearest(double x, const Format& format) {
  if (x == 0.0 || std::isinf(x)) return x;
  const int exponent = std::max(std::ilogb(x), format.smallest_exponent);
  const double step = std::ldexp(1.0, exponent - format.mantissa_bits);
  const double result = std::nearbyint(x / step) * step;
  return std::abs(result) > format.largest ? std::copysign(INFINITY, x) : result;
}

template <class T>
void check_conversions() {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const T value{static_cast<uint16_t>(bits)};
    const float wide = ptx::to_float(value);
    const T back = ptx::from_float<T>(wide);
    if (std::isnan(wide) ? !std::isnan(ptx::to_float(back)) : back.bits != bits)
      fail("%04x becomes %g and then %04x", bits, wide, back.bits);
  }
  Random random(3);
  for (int i = 0; i < 200000; ++i) {
    const float x = std::bit_cast<float>(static_cast<uint32_t>(random.integer(0, UINT32_MAX)));
    if (std::isnan(x)) continue;
    // Halfway cases are rare among random numbers: every second one is made from 17 significant bits at most.
    const float value = i % 2 ? x : std::bit_cast<float>(std::bit_cast<uint32_t>(x) & 0xffff8000u);
    const double expected = nearest(value, kFormat<T>), ours = exact(ptx::from_float<T>(value));
    if (ours != expected) fail("%a rounds to %a instead of %a", value, ours, expected);
  }
}

LOCAS_TEST(conversions, "runner: bf16 and f16") {
  check_conversions<bf16>();
  check_conversions<f16>();
  return "all 65536 values, 200000 roundings each";
}

// ---- ldmatrix, movmatrix, mma, shuffles -------------------------------------------------------------------------------
// out [16, 8] = a [16, 16] b [16, 8] by one warp, from row-major shared memory, or from the transposes of both.
template <class T>
struct MmaParams {
  const T *a, *b;     // [16, 16], and [8, 16] as mma wants it (n, k); transposed: [16, 16] (k, m) and [16, 8] (k, n)
  float *out, *sums;  // [16, 8]; [32] its sum, in every lane
};

template <class T, bool transposed>
struct OneMma {
  using Params = MmaParams<T>;
  static constexpr const char* name = "OneMma";
  static constexpr int threads = 32, min_blocks = 1;
  struct alignas(16) Shared {
    T a[16][16], b[16 * 8];
  };

  static LOCAS_DEVICE void run(const Params& p, unsigned char* memory) {
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    const int lane = ptx::lane_index(), i = lane / 8, j = lane % 8;  // lane names row j of matrix i
    ptx::cp_async_16(&shared.a[0][0] + 8 * lane, p.a + 8 * lane, true);
    if (lane < 16) ptx::cp_async_16(shared.b + 8 * lane, p.b + 8 * lane, true);
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    simt::sync_warp();
    uint32_t a[4], b[4];  // of b only matrices 0 and 1 count: lanes 16 to 31 name their rows once more
    if (transposed) {
      ptx::ldmatrix_x4_trans(a, &shared.a[i / 2 * 8 + j][i % 2 * 8]);
      ptx::ldmatrix_x4(b, shared.b + (i % 2 * 8 + j) * 8);
      for (uint32_t& matrix : b) matrix = ptx::movmatrix_trans(matrix);
    } else {
      ptx::ldmatrix_x4(a, &shared.a[i % 2 * 8 + j][i / 2 * 8]);
      ptx::ldmatrix_x4(b, shared.b + j * 16 + i % 2 * 8);
    }
    float c[4] = {};
    ptx::mma_m16n8k16<T>(c, a, b[0], b[1]);
    float sum = 0.0f;
    for (int part = 0; part < 4; ++part) {
      ptx::store(p.out + (lane / 4 + part / 2 * 8) * 8 + lane % 4 * 2 + part % 2, c[part]);
      sum += c[part];
    }
    for (int mask = 16; mask > 0; mask /= 2) sum += ptx::shuffle_xor(sum, mask);
    ptx::store(p.sums + lane, sum);
  }
};

template <class T, bool transposed>
void check_mma() {
  Random random(11);
  std::vector<T> a(256), b(128);
  for (T& value : a) value = ptx::from_float<T>(static_cast<float>(random.integer(-8, 8)));
  for (T& value : b) value = ptx::from_float<T>(static_cast<float>(random.integer(-8, 8)));
  std::vector<float> expected(128, 0.0f);
  float total = 0.0f;
  for (int m = 0; m < 16; ++m)
    for (int n = 0; n < 8; ++n)
      for (int k = 0; k < 16; ++k) {
        const float product = ptx::to_float(transposed ? a[k * 16 + m] : a[m * 16 + k]) *
                              ptx::to_float(transposed ? b[k * 8 + n] : b[n * 16 + k]);
        expected[m * 8 + n] += product;
        total += product;
      }
  for_each_seed([&] {
    simt::Buffer<T> a_buffer("a", a), b_buffer("b", b);
    simt::Buffer<float> out("out", 128), sums("sums", 32);
    const uint64_t conflicts = simt::ldmatrix_conflicts();
    cuda::launch<OneMma<T, transposed>>(1, sizeof(typename OneMma<T, transposed>::Shared), kQueue,
                                        {a_buffer.data(), b_buffer.data(), out.data(), sums.data()});
    expect_equal("a b", out.values(), expected);
    expect_equal("its sum", sums.values(), std::vector<float>(32, total));
    // Rows of 32 bytes: row i and row i + 4 of a matrix share their banks. So in the 4 of a, and the 4 of b if stored
    // [n, k].
    const uint64_t expected_conflicts = transposed ? 4 : 8;
    if (simt::ldmatrix_conflicts() - conflicts != expected_conflicts) fail("bank conflicts are miscounted");
  });
}

LOCAS_TEST(matrices, "runner: ldmatrix, movmatrix, mma, shuffles") {
  check_mma<bf16, false>();
  check_mma<bf16, true>();
  check_mma<f16, false>();
  check_mma<f16, true>();
  return "4 cases, 10 seeds";
}

}  // namespace
}  // namespace locas::test
