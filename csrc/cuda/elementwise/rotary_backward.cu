// The gradients of query and key from those of the turned ones: the turn back and the backward of the heads' norms, one
// launch. rotary.cuh has the layout.
#include "cuda/elementwise/rotary.cuh"

namespace locas::cuda {
namespace {

struct BackwardLaunch {
  RotaryBackwardParams rotary;
  int queries, keys;  // heads
};

// One head of a row: of the query or the key.
template <class T>
struct GradientHead {
  const T *d_out, *x, *weight;  // x and weight are null without a norm
  T* grad;

  LOCAS_DEVICE GradientHead(const BackwardLaunch& launch, int64_t row, int index) {
    const RotaryBackwardParams& p = launch.rotary;
    const bool query = index < launch.queries;
    const int64_t col = static_cast<int64_t>(query ? index : index - launch.queries) * p.head_size;
    const Matrix& input = query ? p.query : p.key;
    d_out = (query ? p.d_query : p.d_key).at<const T>(row, col);
    grad = (query ? p.query_grad : p.key_grad).at<T>(row, col);
    weight = static_cast<const T*>(query ? p.query_weight : p.key_weight);
    x = input.data ? input.at<const T>(row, col) : nullptr;
  }
};

template <class T, int kLanes>
struct RotaryBackward {
  using Params = BackwardLaunch;
  static constexpr const char* name = "rotary_backward";
  static constexpr int threads = kRotaryThreads, min_blocks = 1;

  static LOCAS_DEVICE void run(const Params& launch, unsigned char*) {
    const RotaryBackwardParams& p = launch.rotary;
    const int64_t row = ptx::block_index();
    const Unit<kLanes> unit(p.head_size, static_cast<int>(p.cos.cols));
    Vectors cos, sin;
    if (unit.turns) {
      unit.load(p.cos.at<const T>(row, 0), cos);
      unit.load(p.sin.at<const T>(row, 0), sin);
    }
    const int heads = launch.queries + launch.keys;
    for (int first = 0; first < heads; first += Unit<kLanes>::groups) {
      const bool here = unit.exists && first + unit.group < heads;
      const GradientHead<T> head(launch, row, here ? first + unit.group : 0);
      Vectors d;
      d.clear();
      if (here) unit.load(head.d_out, d);
      if (here && unit.turns) {
#pragma unroll
        for (int i = 0; i < kVector; ++i) d.set(i, turn_back<T>(d.pair(i), cos.pair(i), sin.pair(i)));
      }
      if (p.query_weight) norm_backward(p, unit, head, here, d);
      if (here) unit.store(d, head.grad);
    }
  }

  // All lanes take part in the sums.
  static LOCAS_DEVICE void norm_backward(const RotaryBackwardParams& p, const Unit<kLanes>& unit,
                                         const GradientHead<T>& head, bool here, Vectors& d) {
    Vectors x, weight;
    x.clear();
    weight.clear();
    if (here) {
      unit.load(head.x, x);
      unit.load(head.weight, weight);
    }
    const float inverse = inverse_rms(head_sum<kLanes>(x, x), p.head_size, p.eps);
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      d.low[i] *= p.weight_offset + weight.low[i];
      d.high[i] *= p.weight_offset + weight.high[i];
    }
    const float shift = head_sum<kLanes>(d, x) * inverse * inverse / static_cast<float>(p.head_size);
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      d.low[i] = inverse * (d.low[i] - x.low[i] * shift);
      d.high[i] = inverse * (d.high[i] - x.high[i] * shift);
    }
  }
};

template <class T>
struct RotaryBackwardAnyHead {
  using Params = BackwardLaunch;
  static constexpr const char* name = "rotary_backward_any_head";
  static constexpr int threads = kRotaryThreads, min_blocks = 1;

  static LOCAS_DEVICE void run(const Params& launch, unsigned char*) {
    const RotaryBackwardParams& p = launch.rotary;
    const int64_t row = ptx::block_index();
    const int rotated = static_cast<int>(p.cos.cols);
    for_each_head_of_warp(launch.queries + launch.keys, [&](int index) {
      const GradientHead<T> head(launch, row, index);
      const auto turned_back = [&](PairPlace place) {
        const Pair d = place.load(head.d_out);
        if (!place.turns) return d;
        return turn_back<T>(d, place.load(p.cos.at<const T>(row, 0)), place.load(p.sin.at<const T>(row, 0)));
      };
      // The gradient of the normed head times the weight.
      const auto weighted = [&](PairPlace place) {
        const Pair d = turned_back(place), weight = place.load(head.weight);
        return Pair{d.low * (p.weight_offset + weight.low), d.high * (p.weight_offset + weight.high)};
      };
      if (!head.weight) {
        for_each_pair(p.head_size, rotated, [&](PairPlace place) { place.store(turned_back(place), head.grad); });
        return;
      }
      float squares = 0.0f, dot = 0.0f;
      for_each_pair(p.head_size, rotated, [&](PairPlace place) {
        const Pair x = place.load(head.x), d = weighted(place);
        squares += x.low * x.low + x.high * x.high;
        dot += d.low * x.low + d.high * x.high;
      });
      const float inverse = inverse_rms(lane_sum<32>(squares), p.head_size, p.eps);
      const float shift = lane_sum<32>(dot) * inverse * inverse / static_cast<float>(p.head_size);
      for_each_pair(p.head_size, rotated, [&](PairPlace place) {
        const Pair x = place.load(head.x), d = weighted(place);
        place.store({inverse * (d.low - x.low * shift), inverse * (d.high - x.high * shift)}, head.grad);
      });
    });
  }
};

}  // namespace

void rotary_backward(const RotaryBackwardParams& p, Queue queue) {
  const auto heads = [&](const Matrix& m) { return static_cast<int>(m.cols / p.head_size); };
  const BackwardLaunch params{p, heads(p.d_query), heads(p.d_key)};
  with_type(p.dtype, [&]<class T>() {
    const bool vectors = has_whole_vectors(p.head_size, p.cos.cols) && is_aligned<T>(p.d_query) &&
                         is_aligned<T>(p.d_key) && is_aligned<T>(p.query) && is_aligned<T>(p.key) &&
                         is_aligned<T>(p.cos) && is_aligned<T>(p.sin) && is_aligned(p.query_weight) &&
                         is_aligned(p.key_weight) && is_aligned<T>(p.query_grad) && is_aligned<T>(p.key_grad);
    if (!vectors) return launch<RotaryBackwardAnyHead<T>>(p.d_query.rows, 0, queue, params);
    with_lanes(p.head_size, [&]<int kLanes>() { launch<RotaryBackward<T, kLanes>>(p.d_query.rows, 0, queue, params); });
  });
}

}  // namespace locas::cuda
