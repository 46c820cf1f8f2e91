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
  void *dy, *d_gate, *d_up, *memory_hidden, *dx, *slots_grad;
  int64_t tokens, d, m, r;
  float scale;
  int32_t activation, dtype;
  int32_t device;
  void* stream;
};

Matrix rows(void* data, int64_t count, int64_t cols) { return {data, count, cols, cols}; }

locas::FfnWeights weights(const Arguments& a) {
  const auto slots = [&](int kind) {
    return rows(a.r > 0 ? static_cast<char*>(a.slots) + kind * a.r * a.d * 2 : nullptr, a.r, a.d);
  };
  return {rows(a.gate, a.m, a.d),
          rows(a.up, a.m, a.d),
          rows(a.down, a.d, a.m),
          a.gate_bias,
          a.up_bias,
          a.down_bias,
          slots(0),
          slots(1),
          slots(2)};
}

template <class Params>
Params params_of_both(const Arguments& a, int64_t width) {
  Params p{};
  p.weights = weights(a);
  p.x = rows(a.x, a.tokens, a.d);
  p.gate = rows(a.gate_out, a.tokens, width);
  p.up = rows(a.up_out, a.tokens, width);
  p.workspace = static_cast<float*>(a.workspace);
  p.scale = a.scale;
  p.activation = static_cast<locas::Activation>(a.activation);
  p.dtype = static_cast<locas::DType>(a.dtype);
  return p;
}

int64_t padded_r(const Arguments& a) { return (a.r + 7) / 8 * 8; }

locas::GluFfnForwardParams params(const Arguments& a) {
  auto p = params_of_both<locas::GluFfnForwardParams>(a, a.m + padded_r(a));
  p.hidden = rows(a.hidden, a.tokens, a.m + padded_r(a));
  p.y = rows(a.y, a.tokens, a.d);
  return p;
}

locas::GluFfnBackwardParams gradient_params(const Arguments& a) {
  auto p = params_of_both<locas::GluFfnBackwardParams>(a, a.m + padded_r(a));
  p.dy = rows(a.dy, a.tokens, a.d);
  p.d_gate = rows(a.d_gate, a.tokens, a.m + padded_r(a));
  p.d_up = rows(a.d_up, a.tokens, a.m + padded_r(a));
  p.memory_hidden = rows(a.memory_hidden, a.tokens, padded_r(a));
  p.dx = rows(a.dx, a.tokens, a.d);
  p.slots_grad = rows(a.slots_grad, 3 * a.r, a.d);
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
EXPORT const char* locas_hidden_grad(const Arguments* a, int tile) {
  return caught([&] { locas::cuda::sm90::glu_ffn_hidden_grad(gradient_params(*a), tile, {a->device, a->stream}); });
}
EXPORT const char* locas_input_grad(const Arguments* a, int tile, int splits, int slot_splits) {
  return caught([&] {
    locas::cuda::sm90::glu_ffn_input_and_slots_grad(gradient_params(*a), tile, splits, slot_splits,
                                                    {a->device, a->stream});
  });
}
EXPORT const char* locas_backward(const Arguments* a) {
  return caught([&] { locas::cuda::sm90::glu_ffn_backward_tiles(gradient_params(*a), {a->device, a->stream}); });
}
// plan: tile, slices and slices of the slots' gradients of each product, in the order of locas_instances.
EXPORT void locas_plan(int64_t tokens, int64_t d, int64_t m, int64_t r, int* plan) {
  using namespace locas::cuda::sm90;
  const locas::FfnSizes sizes{d, m, r};
  for (const Plan& of : {hidden_plan(tokens, sizes), down_plan(tokens, sizes), hidden_grad_plan(tokens, sizes),
                         input_grad_plan(tokens, sizes)}) {
    *plan++ = static_cast<int>(of.kind);
    *plan++ = of.splits;
    *plan++ = of.slot_splits;
  }
}
// Three numbers a tile: rows, columns, whether it is ping-pong.
EXPORT int locas_tiles(int* shapes) {
  using namespace locas::cuda::sm90;
  for (const TileShape& tile : kTiles)
    for (const int number : {tile.m, tile.n, int{tile.schedule == Schedule::ping_pong}}) *shapes++ = number;
  return kTileKinds;
}
// The tiles that K1 to K4, product 0 to 3, are compiled for.
EXPORT int locas_instances(int product, int* tiles) {
  using namespace locas::cuda::sm90;
  const auto listed = [&](const auto& kinds) {
    for (const TileKind kind : kinds) *tiles++ = static_cast<int>(kind);
    return static_cast<int>(std::size(kinds));
  };
  switch (product) {
    case 0: return listed(kHiddenTiles);
    case 1: return listed(kDownTiles);
    case 2: return listed(kHiddenGradTiles);
    default: return listed(kInputGradTiles);
  }
}
