// The plans of the forward against what was measured on an H200 (r = 64, bf16).
#include <vector>

#include "cuda/ffn/sm90/plan.cuh"
#include "simt/tests/harness.h"

namespace locas::test {
namespace {

using cuda::sm90::Plan;
using cuda::sm90::TileKind;

constexpr TileKind kWide = TileKind::m128n192, kWidePp = TileKind::m128n192_ping_pong, kMedium = TileKind::m128n128,
                   kMediumPp = TileKind::m128n128_ping_pong, kNarrow = TileKind::m128n64;
struct Arm {
  TileKind kind;
  int splits;
  double us;
};
struct Measured {
  int64_t d, tokens;
  std::vector<Arm> arms;  // the fastest, and those within 10% of it
};
const Measured kHidden[] = {
    {1024, 128, {{kNarrow, 1, 8.1}}},
    {1024, 512, {{kWide, 1, 13.9}}},
    {1024, 2048, {{kMediumPp, 1, 38.7}, {kWidePp, 1, 40.4}}},
    {1024, 8192, {{kMediumPp, 1, 147.7}, {kWidePp, 1, 149.8}}},
    {2048, 128, {{kMedium, 1, 18.8}, {kMediumPp, 1, 19.7}}},
    {2048, 512, {{kMediumPp, 1, 40.2}, {kWidePp, 1, 40.8}, {kWide, 1, 41.1}, {kMedium, 1, 42.0}}},
    {2048, 2048, {{kMediumPp, 1, 152.3}, {kWidePp, 1, 153.5}, {kWide, 1, 163.5}, {kMedium, 1, 167.4}}},
    {2048, 8192, {{kMediumPp, 1, 594.0}, {kWidePp, 1, 594.6}}},
    {4096, 128, {{kWide, 1, 56.6}, {kWidePp, 1, 58.2}, {kNarrow, 1, 59.3}}},
    {4096, 512, {{kMediumPp, 1, 152.9}, {kWidePp, 1, 155.2}, {kWide, 1, 161.4}, {kMedium, 1, 162.6}}},
    {4096, 2048, {{kWidePp, 1, 601.9}, {kMediumPp, 1, 602.8}, {kWide, 1, 643.3}, {kMedium, 1, 652.3}}},
    {4096, 8192, {{kWidePp, 1, 2391.7}, {kMediumPp, 1, 2437.5}, {kWide, 1, 2524.3}, {kMedium, 1, 2541.0}}},
};
const Measured kDown[] = {
    {1024, 128, {{kNarrow, 4, 8.5}, {kNarrow, 8, 8.8}}},
    {1024, 512, {{kNarrow, 2, 11.5}, {kNarrow, 1, 11.9}}},
    {1024, 2048, {{kMedium, 1, 21.1}, {kMediumPp, 1, 21.7}}},
    {1024, 8192, {{kMediumPp, 1, 73.0}, {kMedium, 1, 75.9}}},
    {2048, 128, {{kNarrow, 4, 13.9}}},
    {2048, 512, {{kNarrow, 1, 21.9}}},
    {2048, 2048, {{kMediumPp, 1, 70.0}, {kMedium, 1, 71.0}}},
    {2048, 8192, {{kMediumPp, 1, 280.4}, {kMedium, 1, 291.8}}},
    {4096, 128, {{kNarrow, 2, 33.9}, {kMediumPp, 4, 35.5}, {kMedium, 4, 35.7}, {kNarrow, 4, 36.8}}},
    {4096, 512, {{kMedium, 1, 78.0}, {kMediumPp, 1, 79.8}, {kNarrow, 1, 84.9}}},
    {4096, 2048, {{kMediumPp, 1, 302.4}, {kMedium, 1, 307.2}}},
    {4096, 8192, {{kMediumPp, 1, 1230.9}, {kMedium, 1, 1253.5}}},
};

// What is planned takes at most 3% longer than the fastest.
template <class PlanOf>
void expect_fast(const char* what, const Measured& at, PlanOf&& plan_of) {
  const Plan plan = plan_of(at.tokens, FfnSizes{at.d, 3 * at.d, 64}, cuda::sm90::kH100);
  for (const Arm& arm : at.arms)
    if (arm.kind == plan.kind && arm.splits == plan.splits && arm.us <= 1.03 * at.arms.front().us) return;
  fail("%s, d %d, T %d: tile %d in %d slices is planned, tile %d in %d is faster", what, static_cast<int>(at.d),
       static_cast<int>(at.tokens), static_cast<int>(plan.kind), plan.splits, static_cast<int>(at.arms.front().kind),
       at.arms.front().splits);
}

LOCAS_TEST(plan, "plans of the sm90 family") {
  for (const Measured& at : kHidden) expect_fast("hidden", at, cuda::sm90::hidden_plan);
  for (const Measured& at : kDown) expect_fast("down", at, cuda::sm90::down_plan);
  return std::to_string(std::size(kHidden) + std::size(kDown)) + " products";
}

}  // namespace
}  // namespace locas::test
