// The plans against what was measured on an H200 (r = 64, bf16, bench/results/sm90_h200.json).
#include <vector>

#include "cuda/ffn/sm90/plan.cuh"
#include "simt/tests/harness.h"

namespace locas::test {
namespace {

using cuda::sm90::Plan;
using cuda::sm90::TileKind;

constexpr TileKind kWide = TileKind::m128n192, kMedium = TileKind::m128n128, kMediumPp = TileKind::m128n128_ping_pong,
                   kNarrow = TileKind::m128n64, kFewMedium = TileKind::m64n128_ping_pong,
                   kFewNarrow = TileKind::m64n64_ping_pong;
struct Arm {
  TileKind kind;
  int splits = 1, slot_splits = 1;
};
struct Measured {
  int64_t d, tokens;
  std::vector<Arm> arms;  // those within 4% of the fastest of all tiles that were tried, from the fastest on
};
const Measured kHidden[] = {
    {1024, 32, {{kFewNarrow}}},
    {1024, 64, {{kFewNarrow}}},
    {1024, 128, {{kNarrow}, {kFewMedium}}},
    {1024, 512, {{kFewMedium}, {kWide}}},
    {1024, 2048, {{kMediumPp}}},
    {1024, 8192, {{kMediumPp}}},
    {2048, 32, {{kFewNarrow}, {kFewMedium}}},
    {2048, 64, {{kFewNarrow}, {kFewMedium}}},
    {2048, 128, {{kFewNarrow}}},
    {2048, 512, {{kMediumPp}}},
    {2048, 2048, {{kMediumPp}}},
    {2048, 8192, {{kMediumPp}}},
    {4096, 32, {{kFewNarrow}}},
    {4096, 64, {{kFewNarrow}, {kWide}}},
    {4096, 128, {{kWide}, {kFewMedium}}},
    {4096, 512, {{kMediumPp}, {kFewMedium}}},
    {4096, 2048, {{kMediumPp}}},
    {4096, 8192, {{kMediumPp}}},
};
const Measured kDown[] = {
    {1024, 32, {{kFewNarrow, 4}, {kFewNarrow, 8}}},
    {1024, 64, {{kFewNarrow, 4}}},
    {1024, 128, {{kFewNarrow, 4}}},
    {1024, 512, {{kFewNarrow}}},
    {1024, 2048, {{kMedium}, {kMediumPp}}},
    {1024, 8192, {{kMediumPp}}},
    {2048, 32, {{kFewNarrow, 4}, {kFewMedium, 4}, {kFewNarrow, 2}}},
    {2048, 64, {{kFewNarrow, 2}, {kFewNarrow, 4}, {kFewMedium, 4}}},
    {2048, 128, {{kFewNarrow, 2}}},
    {2048, 512, {{kFewMedium}}},
    {2048, 2048, {{kMediumPp}, {kMedium}}},
    {2048, 8192, {{kMediumPp}}},
    {4096, 32, {{kFewNarrow}, {kFewNarrow, 2}}},
    {4096, 64, {{kFewNarrow}, {kFewNarrow, 2}}},
    {4096, 128, {{kFewNarrow}}},
    {4096, 512, {{kMedium}, {kMediumPp}, {kFewMedium}}},
    {4096, 2048, {{kMediumPp}, {kMedium}}},
    {4096, 8192, {{kMediumPp}, {kMedium}}},
};
const Measured kHiddenGrad[] = {
    {1024, 32, {{kFewNarrow}}},
    {1024, 64, {{kFewNarrow}}},
    {1024, 128, {{kFewNarrow}}},
    {1024, 512, {{kFewNarrow}}},
    {1024, 2048, {{kFewMedium}}},
    {1024, 8192, {{kMediumPp}}},
    {2048, 32, {{kFewNarrow}}},
    {2048, 64, {{kFewNarrow}}},
    {2048, 128, {{kNarrow}, {kFewMedium}}},
    {2048, 512, {{kFewMedium}}},
    {2048, 2048, {{kMediumPp}}},
    {2048, 8192, {{kMediumPp}}},
    {4096, 32, {{kFewNarrow}, {kFewMedium}}},
    {4096, 64, {{kFewMedium}}},
    {4096, 128, {{kFewNarrow}}},
    {4096, 512, {{kMediumPp}}},
    {4096, 2048, {{kMediumPp}}},
    {4096, 8192, {{kMediumPp}}},
};
const Measured kInputGrad[] = {
    {1024, 32, {{kFewNarrow, 4}}},
    {1024, 64, {{kFewNarrow, 4}}},
    {1024, 128, {{kFewNarrow, 4}}},
    {1024, 512, {{kFewMedium, 2}, {kFewNarrow}}},
    {1024, 2048, {{kMediumPp, 1, 4}}},
    {1024, 8192, {{kMediumPp, 1, 8}, {kMediumPp, 1, 16}, {kMediumPp}}},
    {2048, 32, {{kFewNarrow, 4}, {kFewMedium, 4}, {kFewNarrow, 2}, {kFewNarrow, 8}}},
    {2048, 64, {{kFewNarrow, 4}, {kFewNarrow, 2}, {kFewMedium, 4}}},
    {2048, 128, {{kFewNarrow, 2}, {kFewMedium, 4}}},
    {2048, 512, {{kFewMedium}}},
    {2048, 2048, {{kMediumPp}, {kMediumPp, 1, 4}, {kFewMedium}}},
    {2048, 8192, {{kMediumPp}, {kMediumPp, 1, 4}, {kMediumPp, 1, 8}, {kMediumPp, 1, 16}}},
    {4096, 32, {{kFewMedium, 2}, {kFewNarrow, 2}}},
    {4096, 64, {{kFewNarrow, 2}, {kFewNarrow, 4}}},
    {4096, 128, {{kFewMedium, 2}, {kFewNarrow}}},
    {4096, 512, {{kMediumPp}, {kFewMedium}}},
    {4096, 2048, {{kMediumPp}, {kMediumPp, 1, 4}, {kMediumPp, 1, 8}}},
    {4096, 8192, {{kMediumPp}, {kMediumPp, 1, 4}, {kMediumPp, 1, 8}, {kMediumPp, 1, 16}}},
};

template <class PlanOf>
void expect_fast(const char* what, const Measured& at, PlanOf&& plan_of) {
  const Plan plan = plan_of(at.tokens, FfnSizes{at.d, 3 * at.d, 64}, cuda::sm90::kH100);
  for (const Arm& arm : at.arms)
    if (arm.kind == plan.kind && arm.splits == plan.splits && arm.slot_splits == plan.slot_splits) return;
  fail("%s, d %d, T %d: tile %d in %d and %d slices is planned, tile %d in %d and %d is faster", what,
       static_cast<int>(at.d), static_cast<int>(at.tokens), static_cast<int>(plan.kind), plan.splits, plan.slot_splits,
       static_cast<int>(at.arms.front().kind), at.arms.front().splits, at.arms.front().slot_splits);
}

LOCAS_TEST(plan, "plans of the sm90 family") {
  for (const Measured& at : kHidden) expect_fast("hidden", at, cuda::sm90::hidden_plan);
  for (const Measured& at : kDown) expect_fast("down", at, cuda::sm90::down_plan);
  for (const Measured& at : kHiddenGrad) expect_fast("hidden gradient", at, cuda::sm90::hidden_grad_plan);
  for (const Measured& at : kInputGrad) expect_fast("input gradient", at, cuda::sm90::input_grad_plan);
  return std::to_string(std::size(kHidden) + std::size(kDown) + std::size(kHiddenGrad) + std::size(kInputGrad)) +
         " products";
}

}  // namespace
}  // namespace locas::test
