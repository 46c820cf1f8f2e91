// The plans against what was fastest on a GPU (r = 64, bf16): of the Hopper family on an H100, of few tokens on an H200.
#include "cuda/ffn/sm80/plan.cuh"
#include "cuda/ffn/sm90/plan.cuh"
#include "simt/tests/harness.h"

namespace locas::test {
namespace {

using cuda::sm90::Plan;
using cuda::sm90::TileKind;

struct Winner {
  int64_t d, tokens;
  TileKind hidden;
  Plan down;
};
constexpr TileKind kWide = TileKind::m128n192_ping_pong, kNarrow = TileKind::m128n128_ping_pong,
                   kFew = TileKind::m128n64;
// By more than 1% nothing is faster; 128 x 64 columns were only measured in whole passes.
const Winner kWinners[] = {{1024, 128, kFew, {kFew, 4}},
                           {1024, 512, TileKind::m128n192, {kFew, 1}},
                           {1024, 2048, kNarrow, {TileKind::m128n128, 1}},
                           {1024, 8192, kWide, {kNarrow, 1}},
                           {2048, 128, TileKind::m128n128, {kFew, 4}},
                           {2048, 512, kNarrow, {kFew, 1}},
                           {2048, 2048, kWide, {kNarrow, 1}},
                           {2048, 8192, kWide, {kNarrow, 1}},
                           {4096, 512, kWide, {kNarrow, 1}},
                           {4096, 2048, kWide, {kNarrow, 1}},
                           {4096, 8192, kWide, {kNarrow, 1}}};

void expect_plan(const char* what, const Winner& at, const Plan& plan, const Plan& winner) {
  if (plan.kind != winner.kind || plan.splits != winner.splits)
    fail("%s, d %d, T %d: tile %d in %d slices is planned, tile %d in %d is faster", what, static_cast<int>(at.d),
         static_cast<int>(at.tokens), static_cast<int>(plan.kind), plan.splits, static_cast<int>(winner.kind),
         winner.splits);
}

LOCAS_TEST(plan, "plans of the sm90 family") {
  for (const Winner& at : kWinners) {
    const FfnSizes sizes{at.d, 3 * at.d, 64};
    expect_plan("hidden", at, hidden_plan(at.tokens, sizes, cuda::sm90::kH100), {at.hidden, 1});
    expect_plan("down", at, down_plan(at.tokens, sizes, cuda::sm90::kH100), at.down);
  }
  return std::to_string(std::size(kWinners)) + " shapes";
}

// Microseconds of each pass in two kernels and in one, from bench/results/decode_h200.json.
LOCAS_TEST(plan_decode, "plans of few tokens") {
  struct Measured {
    int64_t d, tokens;
    double forward[2], backward[2];
  };
  const Measured measured[] = {
      {1024, 1, {13.2, 14.0}, {30.7, 21.3}},  {1024, 8, {15.6, 16.3}, {28.5, 20.2}},
      {1024, 32, {19.8, 25.7}, {31.5, 28.1}}, {1024, 64, {26.6, 45.7}, {31.6, 38.8}},
      {2048, 1, {32.9, 27.9}, {54.2, 39.7}},  {2048, 8, {32.6, 31.5}, {56.3, 43.1}},
      {2048, 32, {40.8, 52.3}, {58.7, 60.5}}, {2048, 64, {59.2, 92.6}, {63.5, 87.9}},
  };
  for (const auto& [d, tokens, forward, backward] : measured)
    if (cuda::sm80::is_cooperative_forward(tokens, d) != (forward[1] < forward[0]) ||
        cuda::sm80::is_cooperative_backward(tokens, d) != (backward[1] < backward[0]))
      fail("d %d, T %d: the slower kernels are planned", static_cast<int>(d), static_cast<int>(tokens));
  return std::to_string(std::size(measured)) + " shapes";
}

}  // namespace
}  // namespace locas::test
