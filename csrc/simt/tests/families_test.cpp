// Which family of FFN kernels a GPU takes, and what is refused (cuda/ffn/ffn_kernels.h).
#include "cuda/ffn/ffn_kernels.h"
#include "simt/tests/harness.h"

namespace locas::test {
namespace {

using cuda::family_of;

void expect(bool holds, const char* what) {
  if (!holds) fail("families: not so: %s", what);
}

std::string refusal(int capability, bool has_sm90, int asked) {
  try {
    family_of(capability, has_sm90, asked);
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "";
}

LOCAS_TEST(families, "families") {
  struct Gpu {
    int capability, family, without_90a;
  };
  // T4, A100, RTX 3090, Orin, RTX 4090, H100, B200, B300, Thor, RTX 5090, GB10, and something that comes later.
  const Gpu gpus[] = {{75, 0, 0},    {80, 80, 80},  {86, 80, 80},  {87, 80, 80},  {89, 80, 80},  {90, 90, 80},
                      {100, 80, 80}, {103, 80, 80}, {110, 80, 80}, {120, 80, 80}, {121, 80, 80}, {140, 80, 80}};
  for (const Gpu& gpu : gpus) {
    if (family_of(gpu.capability, true) != gpu.family) fail("sm_%d takes another family", gpu.capability);
    expect(family_of(gpu.capability, false) == gpu.without_90a, "without 90a");
    const int portable = gpu.capability < 80 ? 0 : 80;
    expect(family_of(gpu.capability, true, 80) == portable, "80 runs wherever a kernel does");
    const bool takes_90 = gpu.capability == 90 || gpu.capability < 80;
    expect(refusal(gpu.capability, true, 90).empty() == takes_90, "90 is for 9.0 alone");
    expect(refusal(gpu.capability, false, 90).empty() == (gpu.capability < 80), "90 needs a build for 90a");
  }
  expect(refusal(86, true, 90) ==
             "LOCAS_CUDA_FAMILY is 90, whose kernels run on compute capability 9.0 only, and this GPU has 8.6; "
             "expected 80",
         refusal(86, true, 90).c_str());
  return std::to_string(std::size(gpus)) + " GPUs";
}

LOCAS_TEST(dispatch, "families by the device") {
  expect(cuda::families() == std::vector<std::string>{"sm90"}, "the runner's device is a Hopper");
  cuda::use_family(80);
  expect(cuda::families() == std::vector<std::string>{"sm80"}, "80 was asked for");
  expect(cuda::glu_ffn_backward_workspace(7, {264, 328, 65}, 0) ==
             cuda::sm80::table.glu_ffn_backward_workspace(7, {264, 328, 65}),
         "its own workspace");
  cuda::use_family(0);
  expect(cuda::families() == std::vector<std::string>{"sm90"}, "the device's own again");
  return "1 device";
}

}  // namespace
}  // namespace locas::test
