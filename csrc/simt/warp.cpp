#include "simt/warp.h"

#include <algorithm>

#include "simt/numbers.h"
#include "simt/runner.h"

namespace locas::simt {

// ---- Shuffles ------------------------------------------------------------------------------------------------
namespace {

template <class T>
struct ShuffleLane {
  T value, result;
  int source;  // lane
};

template <class T>
void shuffle_lanes(void* const* lanes) {
  for (int i = 0; i < 32; ++i) {
    auto& to = *static_cast<ShuffleLane<T>*>(lanes[i]);
    to.result = static_cast<ShuffleLane<T>*>(lanes[to.source])->value;
  }
}

}  // namespace

template <class T>
T shuffle(const char* name, T value, int source_lane) {
  if (source_lane < 0 || source_lane >= 32) fail("%s from lane %d", name, source_lane);
  ShuffleLane<T> lane{value, 0, source_lane};
  warp_collective(name, &lane, &shuffle_lanes<T>);
  return lane.result;
}
template float shuffle(const char*, float, int);
template double shuffle(const char*, double, int);

// ---- ldmatrix ------------------------------------------------------------------------------------------------
namespace {

struct LdmatrixLane {
  uint32_t* registers;  // [4]
  const void* row;      // lane 8 i + j names row j of matrix i
};

// 8 x 8 matrices of 16-bit elements: lane l receives elements (l / 4, 2 (l % 4)) and the next one, or with transposed
// the pair (2 (l % 4), l / 4) and (2 (l % 4) + 1, l / 4).
uint64_t conflicts = 0;

// The eight rows of a matrix are read at once where they lie in different eighths of 128 bytes.
void count_conflicts(void* const* lanes) {
  for (int matrix = 0; matrix < 4; ++matrix) {
    int rows[8] = {}, most = 0;
    for (int row = 0; row < 8; ++row) {
      const void* address = static_cast<LdmatrixLane*>(lanes[matrix * 8 + row])->row;
      most = std::max(most, ++rows[reinterpret_cast<uintptr_t>(address) / 16 % 8]);
    }
    conflicts += most - 1;
  }
}

template <bool transposed>
void ldmatrix_lanes(void* const* lanes) {
  count_conflicts(lanes);
  for (int matrix = 0; matrix < 4; ++matrix)
    for (int lane = 0; lane < 32; ++lane) {
      const auto element = [&](int row, int col) -> uint32_t {
        return static_cast<const uint16_t*>(static_cast<LdmatrixLane*>(lanes[matrix * 8 + row])->row)[col];
      };
      const int major = lane / 4, minor = lane % 4 * 2;
      static_cast<LdmatrixLane*>(lanes[lane])->registers[matrix] =
          transposed ? element(minor, major) | element(minor + 1, major) << 16
                     : element(major, minor) | element(major, minor + 1) << 16;
    }
}

}  // namespace

void ldmatrix(uint32_t (&registers)[4], const void* row, bool transposed) {
  touch(row, 16, Access::read, Space::shared);
  LdmatrixLane lane{registers, row};
  if (transposed) warp_collective("ldmatrix_trans", &lane, &ldmatrix_lanes<true>);
  else warp_collective("ldmatrix", &lane, &ldmatrix_lanes<false>);
}

namespace {

void stmatrix_lanes(void* const* lanes) {
  count_conflicts(lanes);
  for (int matrix = 0; matrix < 4; ++matrix)
    for (int lane = 0; lane < 32; ++lane) {
      const uint32_t pair = static_cast<LdmatrixLane*>(lanes[lane])->registers[matrix];
      auto* row =
          static_cast<uint16_t*>(const_cast<void*>(static_cast<LdmatrixLane*>(lanes[matrix * 8 + lane / 4])->row));
      row[lane % 4 * 2] = static_cast<uint16_t>(pair);
      row[lane % 4 * 2 + 1] = static_cast<uint16_t>(pair >> 16);
    }
}

}  // namespace

void stmatrix(void* row, const uint32_t (&registers)[4]) {
  touch(row, 16, Access::write, Space::shared);
  uint32_t copy[4] = {registers[0], registers[1], registers[2], registers[3]};
  LdmatrixLane lane{copy, row};
  warp_collective("stmatrix", &lane, &stmatrix_lanes);
}

uint64_t ldmatrix_conflicts() { return conflicts; }

namespace {

void movmatrix_lanes(void* const* lanes) {
  uint16_t matrix[8][8];
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 2; ++i)
      matrix[lane / 4][lane % 4 * 2 + i] = static_cast<uint16_t>(*static_cast<uint32_t*>(lanes[lane]) >> 16 * i);
  for (int lane = 0; lane < 32; ++lane) {
    const int major = lane / 4, minor = lane % 4 * 2;
    *static_cast<uint32_t*>(lanes[lane]) = matrix[minor][major] | uint32_t{matrix[minor + 1][major]} << 16;
  }
}

}  // namespace

uint32_t movmatrix_trans(uint32_t pair) {
  warp_collective("movmatrix_trans", &pair, &movmatrix_lanes);
  return pair;
}

// ---- mma.sync ------------------------------------------------------------------------------------------------
namespace {

struct MmaLane {
  float* c;           // [4]
  const uint32_t* a;  // [4]
  uint32_t b[2];
};

// c [16, 8] += a [16, 16] b [16, 8] with fp32 sums. Lane l has, with row = l / 4 and col = 2 (l % 4), two neighbouring
// elements a register: a (row, col), (row + 8, col), (row, col + 8), (row + 8, col + 8); b (col, row), (col + 8, row),
// neighbours along k; c[0..1] (row, col), c[2..3] (row + 8, col).
template <float (*to_float)(uint16_t)>
void mma_lanes(void* const* lanes) {
  float a[16][16], b[8][16];
  for (int lane = 0; lane < 32; ++lane) {
    const MmaLane& from = *static_cast<MmaLane*>(lanes[lane]);
    const int row = lane / 4, col = lane % 4 * 2;
    for (int i = 0; i < 2; ++i) {
      for (int part = 0; part < 4; ++part)
        a[row + part % 2 * 8][col + part / 2 * 8 + i] = to_float(static_cast<uint16_t>(from.a[part] >> 16 * i));
      for (int part = 0; part < 2; ++part)
        b[row][col + part * 8 + i] = to_float(static_cast<uint16_t>(from.b[part] >> 16 * i));
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    float* c = static_cast<MmaLane*>(lanes[lane])->c;
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + i / 2 * 8, col = lane % 4 * 2 + i % 2;
      float sum = 0.0f;
      for (int k = 0; k < 16; ++k) sum += a[row][k] * b[col][k];
      c[i] += sum;
    }
  }
}

}  // namespace

void mma_m16n8k16(Half type, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  MmaLane lane{c, a, {b0, b1}};
  warp_collective("mma_m16n8k16", &lane, type == Half::bf16 ? &mma_lanes<bf16_to_float> : &mma_lanes<f16_to_float>);
}

}  // namespace locas::simt
