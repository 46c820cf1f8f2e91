// The rotary embedding of query and key, with the norm of each head before it where a host has one, and the copy of the
// value into its place: one launch. rotary.cuh has the layout.
#include "cuda/elementwise/rotary.cuh"

namespace locas::cuda {
namespace {

struct ForwardLaunch {
  RotaryForwardParams rotary;
  int queries, keys, values;  // heads
};

// One head of a row: of the query, the key or the value.
template <class T>
struct InputHead {
  const T *from, *weight;
  T* to;
  bool turns;

  LOCAS_DEVICE InputHead(const ForwardLaunch& launch, int64_t row, int index) {
    const RotaryForwardParams& p = launch.rotary;
    if (index < launch.queries) {
      set(p.query, p.query_out, row, index * p.head_size);
      weight = static_cast<const T*>(p.query_weight);
    } else if (index < launch.queries + launch.keys) {
      set(p.key, p.key_out, row, (index - launch.queries) * p.head_size);
      weight = static_cast<const T*>(p.key_weight);
    } else {
      set(p.value, p.value_out, row, (index - launch.queries - launch.keys) * p.head_size);
      weight = nullptr;
    }
    turns = index < launch.queries + launch.keys;
  }

 private:
  LOCAS_DEVICE void set(const Matrix& input, const Matrix& output, int64_t row, int64_t col) {
    from = input.at<const T>(row, col);
    to = output.at<T>(row, col);
  }
};

template <class T, int kLanes>
struct RotaryForward {
  using Params = ForwardLaunch;
  static constexpr const char* name = "rotary_forward";
  static constexpr int threads = kRotaryThreads, min_blocks = 1;

  static LOCAS_DEVICE void run(const Params& launch, unsigned char*) {
    const RotaryForwardParams& p = launch.rotary;
    const int64_t row = ptx::block_index();
    const Unit<kLanes> unit(p.head_size, static_cast<int>(p.cos.cols));
    Vectors cos, sin;
    if (unit.turns) {
      unit.load(p.cos.at<const T>(row, 0), cos);
      unit.load(p.sin.at<const T>(row, 0), sin);
    }
    const int heads = launch.queries + launch.keys + launch.values;
    for (int first = 0; first < heads; first += Unit<kLanes>::groups) {
      const bool here = unit.exists && first + unit.group < heads;
      const InputHead<T> head(launch, row, here ? first + unit.group : 0);
      Vectors x;
      x.clear();
      if (here) unit.load(head.from, x);
      if (p.query_weight) norm(p, unit, head, here && head.weight, x);
      if (!here) continue;
      if (head.turns && unit.turns) {
#pragma unroll
        for (int i = 0; i < kVector; ++i) x.set(i, turn<T>(x.pair(i), cos.pair(i), sin.pair(i)));
      }
      unit.store(x, head.to);
    }
  }

  // All lanes take part in the sum.
  static LOCAS_DEVICE void norm(const RotaryForwardParams& p, const Unit<kLanes>& unit, const InputHead<T>& head,
                                bool normed, Vectors& x) {
    const float inverse = inverse_rms(head_sum<kLanes>(x, x), p.head_size, p.eps);
    if (!normed) return;
    Vectors weight;
    unit.load(head.weight, weight);
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      x.low[i] = rounded<T>(normalized<T>(x.low[i], inverse, weight.low[i], p.weight_offset));
      x.high[i] = rounded<T>(normalized<T>(x.high[i], inverse, weight.high[i], p.weight_offset));
    }
  }
};

template <class T>
struct RotaryForwardAnyHead {
  using Params = ForwardLaunch;
  static constexpr const char* name = "rotary_forward_any_head";
  static constexpr int threads = kRotaryThreads, min_blocks = 1;

  static LOCAS_DEVICE void run(const Params& launch, unsigned char*) {
    const RotaryForwardParams& p = launch.rotary;
    const int64_t row = ptx::block_index();
    const int rotated = static_cast<int>(p.cos.cols);
    for_each_head_of_warp(launch.queries + launch.keys + launch.values, [&](int index) {
      const InputHead<T> head(launch, row, index);
      float inverse = 0.0f;
      if (head.weight) {
        float squares = 0.0f;
        for_each_pair(p.head_size, rotated, [&](PairPlace place) {
          const Pair x = place.load(head.from);
          squares += x.low * x.low + x.high * x.high;
        });
        inverse = inverse_rms(lane_sum<32>(squares), p.head_size, p.eps);
      }
      for_each_pair(p.head_size, rotated, [&](PairPlace place) {
        Pair x = place.load(head.from);
        if (head.weight) {
          const Pair weight = place.load(head.weight);
          x = {rounded<T>(normalized<T>(x.low, inverse, weight.low, p.weight_offset)),
               rounded<T>(normalized<T>(x.high, inverse, weight.high, p.weight_offset))};
        }
        if (head.turns && place.turns)
          x = turn<T>(x, place.load(p.cos.at<const T>(row, 0)), place.load(p.sin.at<const T>(row, 0)));
        place.store(x, head.to);
      });
    });
  }
};

}  // namespace

void rotary_forward(const RotaryForwardParams& p, Queue queue) {
  const auto heads = [&](const Matrix& m) { return static_cast<int>(m.cols / p.head_size); };
  const ForwardLaunch params{p, heads(p.query), heads(p.key), heads(p.value)};
  with_type(p.dtype, [&]<class T>() {
    const bool vectors = has_whole_vectors(p.head_size, p.cos.cols) && is_aligned<T>(p.query) && is_aligned<T>(p.key) &&
                         is_aligned<T>(p.value) && is_aligned<T>(p.cos) && is_aligned<T>(p.sin) &&
                         is_aligned(p.query_weight) && is_aligned(p.key_weight) && is_aligned<T>(p.query_out) &&
                         is_aligned<T>(p.key_out) && is_aligned<T>(p.value_out);
    if (!vectors) return launch<RotaryForwardAnyHead<T>>(p.query.rows, 0, queue, params);
    with_lanes(p.head_size, [&]<int kLanes>() { launch<RotaryForward<T, kLanes>>(p.query.rows, 0, queue, params); });
  });
}

}  // namespace locas::cuda
