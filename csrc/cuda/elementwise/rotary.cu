// The rotary embedding of query and key, with the norm of each head before it where a host has one, and the copy of the
// value into its place: one launch. And the way back: the turn back, then the backward of the heads' norms.
// rotary.cuh has the layout.
#include "cuda/elementwise/rotary.cuh"

namespace locas::cuda {
namespace {

template <class Params>
struct RotaryLaunch {
  Params p;
  int queries, keys, values;  // heads
};

// One head of a row: of the query, the key or the value.
template <class T>
struct Head {
  int part;                              // 0, 1 or 2 of these
  int64_t col;                           // where it begins in its matrix
  const T *from, *weight, *x = nullptr;  // weight: null without a norm; x: the backward's, what was normed
  T* to;

  template <class Params>
  LOCAS_DEVICE Head(const RotaryLaunch<Params>& launch, int index) {
    const RotaryTurn& turn = launch.p.turn;
    part = index < launch.queries ? 0 : index < launch.queries + launch.keys ? 1 : 2;
    const int before = part == 0 ? 0 : part == 1 ? launch.queries : launch.queries + launch.keys;
    col = static_cast<int64_t>(index - before) * turn.head_size;
    weight = static_cast<const T*>(part == 0 ? turn.query_weight : part == 1 ? turn.key_weight : nullptr);
  }
  LOCAS_DEVICE bool turns() const { return part < 2; }
  LOCAS_DEVICE T* in(const Matrix& query, const Matrix& key, const Matrix& value, int64_t row) const {
    return (part == 0 ? query : part == 1 ? key : value).at<T>(row, col);
  }
};

struct RotaryForward {
  using Params = RotaryForwardParams;
  static constexpr const char* name = "rotary_forward";
  static constexpr const char* any_head = "rotary_forward_any_head";
  static constexpr bool norms_first = true;

  template <class T>
  static LOCAS_DEVICE void place(const Params& p, int64_t row, Head<T>& head) {
    head.from = head.in(p.query, p.key, p.value, row);
    head.to = head.in(p.query_out, p.key_out, p.value_out, row);
  }
  template <class Angle>
  static LOCAS_DEVICE Pair turned(Pair x, Pair cos, Pair sin) {
    return turn<Angle>(x, cos, sin);
  }
  // All lanes take part in the sum.
  template <class T, int kLanes>
  static LOCAS_DEVICE void norm(const RotaryTurn& turn, const Unit<kLanes>& unit, const Head<T>& head, bool here,
                                Vectors& x) {
    const float inverse = inverse_rms(head_sum<kLanes>(x, x), turn.head_size, turn.eps);
    if (!here || !head.weight) return;
    Vectors weight;
    unit.load(head.weight, weight);
#pragma unroll
    for (int i = 0; i < kVector; ++i) x.set(i, normed<T>(turn, x.pair(i), inverse, weight.pair(i)));
  }
  template <class T, class Turned>
  static LOCAS_DEVICE void norm_by_pairs(const RotaryTurn& turn, const Head<T>& head, Turned&& turned) {
    float squares = 0.0f;
    for_each_pair(turn, [&](PairPlace place) {
      const Pair x = place.load(head.from);
      squares += x.low * x.low + x.high * x.high;
    });
    const float inverse = inverse_rms(lane_sum<32>(squares), turn.head_size, turn.eps);
    for_each_pair(turn, [&](PairPlace place) {
      const Pair x = normed<T>(turn, place.load(head.from), inverse, place.load(head.weight));
      place.store(turned(place, x), head.to);
    });
  }

 private:
  template <class T>
  static LOCAS_DEVICE Pair normed(const RotaryTurn& turn, Pair x, float inverse, Pair weight) {
    return {rounded<T>(normalized<T>(x.low, inverse, weight.low, turn.weight_offset)),
            rounded<T>(normalized<T>(x.high, inverse, weight.high, turn.weight_offset))};
  }
};

struct RotaryBackward {
  using Params = RotaryBackwardParams;
  static constexpr const char* name = "rotary_backward";
  static constexpr const char* any_head = "rotary_backward_any_head";
  static constexpr bool norms_first = false;

  template <class T>
  static LOCAS_DEVICE void place(const Params& p, int64_t row, Head<T>& head) {
    head.from = head.in(p.d_query, p.d_key, p.d_key, row);
    head.to = head.in(p.query_grad, p.key_grad, p.key_grad, row);
    if (head.weight) head.x = head.in(p.query, p.key, p.key, row);
  }
  template <class Angle>
  static LOCAS_DEVICE Pair turned(Pair d, Pair cos, Pair sin) {
    return turn_back<Angle>(d, cos, sin);
  }
  // All lanes take part in the sums.
  template <class T, int kLanes>
  static LOCAS_DEVICE void norm(const RotaryTurn& turn, const Unit<kLanes>& unit, const Head<T>& head, bool here,
                                Vectors& d) {
    Vectors x, weight;
    x.clear();
    weight.clear();
    if (here) {
      unit.load(head.x, x);
      unit.load(head.weight, weight);
    }
    const float inverse = inverse_rms(head_sum<kLanes>(x, x), turn.head_size, turn.eps);
#pragma unroll
    for (int i = 0; i < kVector; ++i) d.set(i, weighted(turn, d.pair(i), weight.pair(i)));
    const float shift = head_sum<kLanes>(d, x) * inverse * inverse / static_cast<float>(turn.head_size);
#pragma unroll
    for (int i = 0; i < kVector; ++i) d.set(i, gradient(d.pair(i), x.pair(i), inverse, shift));
  }
  template <class T, class Turned>
  static LOCAS_DEVICE void norm_by_pairs(const RotaryTurn& turn, const Head<T>& head, Turned&& turned) {
    const auto weighted_at = [&](PairPlace place) {
      return weighted(turn, turned(place, place.load(head.from)), place.load(head.weight));
    };
    float squares = 0.0f, dot = 0.0f;
    for_each_pair(turn, [&](PairPlace place) {
      const Pair x = place.load(head.x), d = weighted_at(place);
      squares += x.low * x.low + x.high * x.high;
      dot += d.low * x.low + d.high * x.high;
    });
    const float inverse = inverse_rms(lane_sum<32>(squares), turn.head_size, turn.eps);
    const float shift = lane_sum<32>(dot) * inverse * inverse / static_cast<float>(turn.head_size);
    for_each_pair(turn, [&](PairPlace place) {
      place.store(gradient(weighted_at(place), place.load(head.x), inverse, shift), head.to);
    });
  }

 private:
  // The gradient of the normed head times the weight.
  static LOCAS_DEVICE Pair weighted(const RotaryTurn& turn, Pair d, Pair weight) {
    return {d.low * (turn.weight_offset + weight.low), d.high * (turn.weight_offset + weight.high)};
  }
  static LOCAS_DEVICE Pair gradient(Pair d, Pair x, float inverse, float shift) {
    return {inverse * (d.low - x.low * shift), inverse * (d.high - x.high * shift)};
  }
};

// Heads of whole vectors.
template <class Way, class T, class Angle, int kLanes>
struct RotaryOfVectors {
  using Params = RotaryLaunch<typename Way::Params>;
  static constexpr const char* name = Way::name;
  static constexpr int threads = kRotaryThreads, min_blocks = 1;

  static LOCAS_DEVICE void run(const Params& launch, unsigned char*) {
    const RotaryTurn& turn = launch.p.turn;
    const int64_t row = ptx::block_index();
    const Unit<kLanes> unit(turn);
    Vectors cos, sin;
    if (unit.turns) {
      unit.template load_angles<Angle>(turn.cos, row, cos);
      unit.template load_angles<Angle>(turn.sin, row, sin);
    }
    const int heads = launch.queries + launch.keys + launch.values;
    for (int first = 0; first < heads; first += Unit<kLanes>::groups) {
      const bool here = unit.exists && first + unit.group < heads;
      Head<T> head(launch, here ? first + unit.group : 0);
      Way::place(launch.p, row, head);
      Vectors x;
      x.clear();
      if (here) unit.load(head.from, x);
      if (Way::norms_first && turn.query_weight) Way::norm(turn, unit, head, here, x);
      if (here && unit.turns && head.turns()) {
        if (turn.interleaved) x.part();
#pragma unroll
        for (int i = 0; i < kVector; ++i) x.set(i, Way::template turned<Angle>(x.pair(i), cos.pair(i), sin.pair(i)));
        if (turn.interleaved) x.join();
      }
      if (!Way::norms_first && turn.query_weight) Way::norm(turn, unit, head, here, x);
      if (here) unit.store(x, head.to);
    }
  }
};

template <class Way, class T, class Angle>
struct RotaryOfPairs {
  using Params = RotaryLaunch<typename Way::Params>;
  static constexpr const char* name = Way::any_head;
  static constexpr int threads = kRotaryThreads, min_blocks = 1;

  static LOCAS_DEVICE void run(const Params& launch, unsigned char*) {
    const RotaryTurn& turn = launch.p.turn;
    const int64_t row = ptx::block_index();
    for_each_head_of_warp(launch.queries + launch.keys + launch.values, [&](int index) {
      Head<T> head(launch, index);
      Way::place(launch.p, row, head);
      const auto turned = [&](PairPlace place, Pair x) {
        if (!place.turns || !head.turns()) return x;
        return Way::template turned<Angle>(x, place.template load_angles<Angle>(turn.cos, row),
                                           place.template load_angles<Angle>(turn.sin, row));
      };
      if (head.weight) return Way::norm_by_pairs(turn, head, turned);
      for_each_pair(turn, [&](PairPlace place) { place.store(turned(place, place.load(head.from)), head.to); });
    });
  }
};

// query, key, value: whose heads are gone through; inputs and outputs: every matrix of the heads' type
template <class Way>
void launch_rotary(const typename Way::Params& p, const Matrix& query, const Matrix& key, const Matrix& value,
                   std::initializer_list<Matrix> matrices, Queue queue) {
  const RotaryTurn& turn = p.turn;
  const auto heads = [&](const Matrix& m) { return static_cast<int>(m.cols / turn.head_size); };
  const RotaryLaunch<typename Way::Params> params{p, heads(query), heads(key), heads(value)};
  with_rotary_types(turn, [&]<class T, class Angle>() {
    bool vectors = has_whole_vectors(turn.head_size, turn.cos.cols) && is_aligned<Angle>(turn.cos) &&
                   is_aligned<Angle>(turn.sin) && is_aligned(turn.query_weight) && is_aligned(turn.key_weight);
    for (const Matrix& m : matrices) vectors = vectors && is_aligned<T>(m);
    if (!vectors) return launch<RotaryOfPairs<Way, T, Angle>>(query.rows, 0, queue, params);
    with_lanes(turn.head_size,
               [&]<int kLanes>() { launch<RotaryOfVectors<Way, T, Angle, kLanes>>(query.rows, 0, queue, params); });
  });
}

}  // namespace

void rotary_forward(const RotaryForwardParams& p, Queue queue) {
  launch_rotary<RotaryForward>(p, p.query, p.key, p.value,
                               {p.query, p.key, p.value, p.query_out, p.key_out, p.value_out}, queue);
}

void rotary_backward(const RotaryBackwardParams& p, Queue queue) {
  launch_rotary<RotaryBackward>(p, p.d_query, p.d_key, {},
                                {p.d_query, p.d_key, p.query, p.key, p.query_grad, p.key_grad}, queue);
}

}  // namespace locas::cuda
