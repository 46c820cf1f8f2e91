// The Hopper family's launchers as C functions, for bench/sm90_library.py.
#include <cstring>
#include <string>

#include "cuda/ffn/sm90/launchers.h"
#include "cuda/ffn/sm90/plan.cuh"

namespace {

using locas::Matrix;

// As sm90_library.Arguments lays it out. Matrices are contiguous but for their stride; null: there is none.
struct Arguments {
  void *gate, *up, *down, *gate_bias, *up_bias, *down_bias, *slots;
  void *x, *hidden, *gate_out, *up_out, *y, *workspace;
  int64_t tokens, d, m, r;
  float scale;
  int32_t activation, dtype;
  int32_t device;
  void* stream;
};

locas::GluFfnForwardParams params(const Arguments& a) {
  const int64_t width = a.m + (a.r + 7) / 8 * 8;
  const auto rows = [](void* data, int64_t count, int64_t cols) { return Matrix{data, count, cols, cols}; };
  const auto slots = [&](int kind) {
    return rows(a.r > 0 ? static_cast<char*>(a.slots) + kind * a.r * a.d * 2 : nullptr, a.r, a.d);
  };
  locas::GluFfnForwardParams p{};
  p.weights = {rows(a.gate, a.m, a.d),
               rows(a.up, a.m, a.d),
               rows(a.down, a.d, a.m),
               a.gate_bias,
               a.up_bias,
               a.down_bias,
               slots(0),
               slots(1),
               slots(2)};
  p.x = rows(a.x, a.tokens, a.d);
  p.hidden = rows(a.hidden, a.tokens, width);
  p.gate = rows(a.gate_out, a.tokens, width);
  p.up = rows(a.up_out, a.tokens, width);
  p.y = rows(a.y, a.tokens, a.d);
  p.workspace = static_cast<float*>(a.workspace);
  p.scale = a.scale;
  p.activation = static_cast<locas::Activation>(a.activation);
  p.dtype = static_cast<locas::DType>(a.dtype);
  return p;
}

thread_local std::string error;

template <class F>
const char* caught(F&& f) {
  try {
    f();
    return nullptr;
  } catch (const std::exception& e) {
    error = e.what();
    return error.c_str();
  }
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

// Each returns null, or what went wrong.
EXPORT const char* locas_hidden(const Arguments* a, int tile) {
  return caught([&] { locas::cuda::sm90::glu_ffn_hidden(params(*a), tile, {a->device, a->stream}); });
}
EXPORT const char* locas_down(const Arguments* a, int tile, int splits) {
  return caught([&] { locas::cuda::sm90::glu_ffn_down(params(*a), tile, splits, {a->device, a->stream}); });
}
EXPORT const char* locas_forward(const Arguments* a) {
  return caught([&] { locas::cuda::sm90::glu_ffn_forward_tiles(params(*a), {a->device, a->stream}); });
}
// plan: hidden's tile, down's tile, down's slices.
EXPORT void locas_plan(int64_t tokens, int64_t d, int64_t m, int64_t r, int* plan) {
  const auto down = locas::cuda::sm90::down_plan(tokens, {d, m, r});
  plan[0] = static_cast<int>(locas::cuda::sm90::hidden_plan(tokens, {d, m, r}).kind);
  plan[1] = static_cast<int>(down.kind);
  plan[2] = down.splits;
}
EXPORT int locas_tiles(int* shapes) {
  for (int i = 0; i < locas::cuda::sm90::kTileKinds; ++i) {
    const auto& tile = locas::cuda::sm90::kTiles[i];
    shapes[3 * i] = tile.m;
    shapes[3 * i + 1] = tile.n;
    shapes[3 * i + 2] = tile.schedule == locas::cuda::sm90::Schedule::ping_pong;
  }
  return locas::cuda::sm90::kTileKinds;
}
