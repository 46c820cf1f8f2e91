// What the two directions of the rotary embedding share: the turn of a pair, and which thread holds what of a head.
//
//      head [head_size]    [ u0 | u1 | u0 | u1 | u2 | u2 ]    A unit is two vectors of 8 elements: in the part that turns
//                           turns, R elements  | copied       two that lie R / 2 apart, so that a thread has both
//                                                             partners; behind it, and where partners are interleaved,
//                                                             two neighbours.
//
// CTA b owns row b. kLanes neighbouring threads own a head, each a unit of it, and go over the row's heads; so a thread
// loads its part of cos and sin once. Heads whose halves are no whole vectors, or not aligned, go by single elements: a
// warp owns a head, and its lanes stride over the pairs.
#pragma once

#include "common/rotary_params.h"
#include "cuda/common/block_sum.cuh"
#include "cuda/common/elements.cuh"
#include "cuda/elementwise/rms_norm.cuh"
#include "cuda/launch.cuh"
#include "cuda/ptx/arithmetic.cuh"
#include "cuda/ptx/thread.cuh"

namespace locas::cuda {

constexpr int kRotaryThreads = 128;

struct Pair {
  float low, high;
};

// Each product is rounded to the angles' type Angle and, by the caller's store, each sum to the heads', as in transformers.
template <class Angle>
LOCAS_DEVICE float rounded_product(float a, float b) {
  return rounded<Angle>(ptx::multiply(a, b));
}
template <class Angle>
LOCAS_DEVICE Pair turn(Pair x, Pair cos, Pair sin) {
  return {rounded_product<Angle>(x.low, cos.low) - rounded_product<Angle>(x.high, sin.low),
          rounded_product<Angle>(x.high, cos.high) + rounded_product<Angle>(x.low, sin.high)};
}
// Its transpose.
template <class Angle>
LOCAS_DEVICE Pair turn_back(Pair d, Pair cos, Pair sin) {
  return {rounded_product<Angle>(d.low, cos.low) + rounded_product<Angle>(d.high, sin.high),
          rounded_product<Angle>(d.high, cos.high) - rounded_product<Angle>(d.low, sin.low)};
}

// Two vectors of a head or of a row of cos and sin.
struct Vectors {
  float low[kVector], high[kVector];

  LOCAS_DEVICE Pair pair(int i) const { return {low[i], high[i]}; }
  LOCAS_DEVICE void set(int i, Pair pair) {
    low[i] = pair.low;
    high[i] = pair.high;
  }
  LOCAS_DEVICE void clear() {
#pragma unroll
    for (int i = 0; i < kVector; ++i) low[i] = high[i] = 0.0f;
  }
  // Puts interleaved partners into low and high, and back.
  LOCAS_DEVICE void part() {
    const Vectors from = *this;
#pragma unroll
    for (int i = 0; i < kVector / 2; ++i) {
      set(i, {from.low[2 * i], from.low[2 * i + 1]});
      set(i + kVector / 2, {from.high[2 * i], from.high[2 * i + 1]});
    }
  }
  LOCAS_DEVICE void join() {
    const Vectors from = *this;
#pragma unroll
    for (int i = 0; i < kVector / 2; ++i) {
      low[2 * i] = from.low[i];
      low[2 * i + 1] = from.high[i];
      high[2 * i] = from.low[i + kVector / 2];
      high[2 * i + 1] = from.high[i + kVector / 2];
    }
  }
};

// Where a thread's unit lies in each head, and its angles in a row of cos and sin.
template <int kLanes>
struct Unit {
  static constexpr int groups = kRotaryThreads / kLanes;
  int group, low, high;  // columns within the head
  int angle_low, angle_high;
  bool exists, turns;

  LOCAS_DEVICE explicit Unit(const RotaryTurn& turn) : group(ptx::thread_index() / kLanes) {
    const int index = ptx::thread_index() % kLanes, rotated = static_cast<int>(turn.cos.cols);
    exists = index < turn.head_size / (2 * kVector);
    turns = exists && index < rotated / (2 * kVector);
    const bool halves = turns && !turn.interleaved;
    low = index * (halves ? kVector : 2 * kVector);
    high = low + (halves ? rotated / 2 : kVector);
    angle_low = index * kVector;
    angle_high = angle_low + (turn.interleaved ? 0 : rotated / 2);
  }
  template <class Angle>
  LOCAS_DEVICE void load_angles(const Matrix& angles, int64_t row, Vectors& to) const {
    load_piece(angles.at<const Angle>(row, angle_low), to.low);
    load_piece(angles.at<const Angle>(row, angle_high), to.high);
  }
  template <class T>
  LOCAS_DEVICE void load(const T* head, Vectors& to) const {
    load_piece(head + low, to.low);
    load_piece(head + high, to.high);
  }
  template <class T>
  LOCAS_DEVICE void store(const Vectors& from, T* head) const {
    store_piece(from.low, head + low);
    store_piece(from.high, head + high);
  }
};

// The sum of products over a head, of which each of kLanes lanes holds a unit.
template <int kLanes>
LOCAS_DEVICE float head_sum(const Vectors& a, const Vectors& b) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kVector; ++i) sum += a.low[i] * b.low[i] + a.high[i] * b.high[i];
  return lane_sum<kLanes>(sum);
}

// Whether heads take the kernels of whole vectors.
inline bool has_whole_vectors(int head_size, int64_t rotated) {
  return head_size % (2 * kVector) == 0 && rotated % (2 * kVector) == 0;
}

// Calls f with the number of lanes that hold a head of whole vectors.
template <class F>
void with_lanes(int head_size, F&& f) {
  const int units = head_size / (2 * kVector);
  if (units <= 4) f.template operator()<4>();
  else if (units <= 8) f.template operator()<8>();
  else if (units <= 16) f.template operator()<16>();
  else f.template operator()<32>();
}

// ---- Single elements -------------------------------------------------------------------------------------------
// Two elements of a head that turn together, and their angles' columns; or one that is copied.
struct PairPlace {
  int low, high, angle_low, angle_high;
  bool turns;

  LOCAS_DEVICE PairPlace(const RotaryTurn& turn, int i) {
    const int half = static_cast<int>(turn.cos.cols) / 2;
    turns = i < half;
    low = !turns ? i + half : turn.interleaved ? 2 * i : i;
    high = turn.interleaved ? low + 1 : i + half;
    angle_low = i;
    angle_high = turn.interleaved ? i : i + half;
  }
  // The others read as 0.
  template <class T>
  LOCAS_DEVICE Pair load(const T* head) const {
    return {ptx::to_float(ptx::load(head + low)), turns ? ptx::to_float(ptx::load(head + high)) : 0.0f};
  }
  template <class T>
  LOCAS_DEVICE void store(Pair pair, T* head) const {
    ptx::store(head + low, ptx::from_float<T>(pair.low));
    if (turns) ptx::store(head + high, ptx::from_float<T>(pair.high));
  }
  template <class Angle>
  LOCAS_DEVICE Pair load_angles(const Matrix& angles, int64_t row) const {
    return {ptx::to_float(ptx::load(angles.at<const Angle>(row, angle_low))),
            ptx::to_float(ptx::load(angles.at<const Angle>(row, angle_high)))};
  }
};

// Calls f(place) for each that this lane owns.
template <class F>
LOCAS_DEVICE void for_each_pair(const RotaryTurn& turn, F&& f) {
  const int places = turn.head_size - static_cast<int>(turn.cos.cols) / 2;
  for (int i = ptx::lane_index(); i < places; i += 32) f(PairPlace(turn, i));
}

// Calls f(head) for each head of the row that this warp owns.
template <class F>
LOCAS_DEVICE void for_each_head_of_warp(int heads, F&& f) {
  for (int head = ptx::warp_index(); head < heads; head += kRotaryThreads / 32) f(head);
}

}  // namespace locas::cuda
