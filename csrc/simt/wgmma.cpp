#include "simt/wgmma.h"

#include <cmath>

#include "simt/machine.h"
#include "simt/numbers.h"

namespace locas::simt {
namespace {

constexpr int kM = 64, kK = 16, kLargestN = 256;

// 16 bytes of shared memory that hold 8 elements of an operand, neighbours along k or, if mn, along rows or columns.
struct Piece {
  const unsigned char* at;
  int mn, k;
};

// The pieces of an operand with `size` rows (A) or columns (B). In a descriptor: bits 0-13 address / 16, 16-29 leading
// offset / 16, 32-45 stride offset / 16, 62-63 the swizzle. K-major: 8 rows of 128 bytes are an atom, atoms lie
// `stride` apart. MN-major: 8 k of 64 elements are an atom, along k they lie `stride` apart, along mn `leading`.
std::vector<Piece> pieces_of(uint64_t descriptor, int size, bool mn_major) {
  const auto field = [&](int bit) { return (descriptor >> bit & 0x3fff) << 4; };
  const uint64_t begin = field(0), leading = field(16), stride = field(32);
  if (descriptor >> 62 != 1) fail("wgmma: only operands with a swizzle of 128 bytes are modelled");
  std::vector<Piece> pieces;
  for (int mn = 0; mn < size; mn += mn_major ? 8 : 1)
    for (int k = 0; k < kK; k += mn_major ? 1 : 8) {
      const uint64_t offset = mn_major ? mn / 64 * leading + mn % 64 * 2 + k / 8 * stride + k % 8 * 128
                                       : mn / 8 * stride + mn % 8 * 128 + k * 2;
      pieces.push_back({swizzled(machine.shared.data() + begin + offset, 128), mn, k});
    }
  return pieces;
}

template <int columns>
void read(Half type, const std::vector<Piece>& pieces, bool mn_major, float (&to)[kK][columns]) {
  for (const Piece& piece : pieces)
    for (int i = 0; i < 8; ++i) {
      const uint16_t bits = reinterpret_cast<const uint16_t*>(piece.at)[i];
      to[piece.k + (mn_major ? 0 : i)][piece.mn + (mn_major ? i : 0)] =
          type == Half::bf16 ? bf16_to_float(bits) : f16_to_float(bits);
    }
}

// Thread t's register i lies at this row and column of the sums.
int row_of(int thread, int i) { return thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8; }
int column_of(int thread, int i) { return i / 4 * 8 + thread % 4 * 2 + i % 2; }

void multiply(const WgmmaArguments& w, const std::vector<Piece>& a_pieces, const std::vector<Piece>& b_pieces,
              std::vector<float>& sums) {
  static float a[kK][kM], b[kK][kLargestN];
  read(w.type, a_pieces, w.a_mn, a);
  read(w.type, b_pieces, w.b_mn, b);
  for (int row = 0; row < kM; ++row) {
    float* sum = &sums[row * w.n];
    if (!w.accumulate) std::fill(sum, sum + w.n, 0.0f);
    for (int k = 0; k < kK; ++k) {
      const float factor = a[k][row];
      for (int col = 0; col < w.n; ++col) sum[col] += factor * b[k][col];
    }
  }
}

// The sums that the threads' registers hold, which hold NaN from now on.
WgmmaSums& taken_sums(Warpgroup& warpgroup, void* const* lanes) {
  const auto& first = *static_cast<const WgmmaArguments*>(lanes[0]);
  WgmmaSums& sums = warpgroup.sums[first.registers];
  if (sums.values.empty()) {
    sums = {first.n, 0, std::vector<float>(kM * first.n), {}};
    for (int thread = 0; thread < 128; ++thread) {
      sums.registers[thread] = static_cast<const WgmmaArguments*>(lanes[thread])->registers;
      for (int i = 0; i < first.n / 2; ++i) {
        sums.values[row_of(thread, i) * first.n + column_of(thread, i)] = sums.registers[thread][i];
        sums.registers[thread][i] = NAN;
      }
    }
  }
  return sums;
}

void start(void* const* lanes) {
  const auto& w = *static_cast<const WgmmaArguments*>(lanes[0]);
  for (int thread = 1; thread < 128; ++thread) {
    const auto& other = *static_cast<const WgmmaArguments*>(lanes[thread]);
    if (other.a != w.a || other.b != w.b || other.accumulate != w.accumulate || other.n != w.n)
      fail("wgmma: the arguments of thread %d of the warpgroup differ", thread);
  }
  Warpgroup& warpgroup = current_warpgroup();
  if (!warpgroup.fenced) fail("wgmma without wgmma_fence since the last wgmma_commit");
  WgmmaSums& sums = taken_sums(warpgroup, lanes);
  ++sums.pending;
  auto a = pieces_of(w.a, kM, w.a_mn), b = pieces_of(w.b, w.n, w.b_mn);
  Wgmma operation{0, w.registers, {}};
  const int first_thread = thread_index() / 128 * 128;
  for (const auto* pieces : {&a, &b})
    for (const Piece& piece : *pieces) {
      machine.shared.begin_async_read(first_thread, 4, piece.at);
      operation.pieces.push_back(piece.at);
    }
  operation.operation =
      issue(first_thread / 128, [w, a = std::move(a), b = std::move(b), &sums] { multiply(w, a, b, sums.values); });
  warpgroup.open.push_back(std::move(operation));
}

// The sums go back into the registers once nothing is under way that adds to them.
void retire(Warpgroup& warpgroup, const Wgmma& operation) {
  finish(operation.operation);
  for (const void* piece : operation.pieces) machine.shared.end_async_read(thread_index() / 128 * 128, 4, piece);
  WgmmaSums& sums = warpgroup.sums.at(operation.key);
  if (--sums.pending > 0) return;
  for (int thread = 0; thread < 128; ++thread)
    for (int i = 0; i < sums.n / 2; ++i)
      sums.registers[thread][i] = sums.values[row_of(thread, i) * sums.n + column_of(thread, i)];
  warpgroup.sums.erase(operation.key);
}

void meet_warpgroup(const char* name, void* argument, WarpOperation operation) {
  if (machine.threads % 128 != 0) fail("%s in a block of %d threads; expected whole warpgroups", name, machine.threads);
  meet(current_warpgroup().meeting, 128, name, argument, operation);
}

}  // namespace

void wgmma(const WgmmaArguments& arguments) {
  WgmmaArguments copy = arguments;
  meet_warpgroup("wgmma", &copy, &start);
}

void wgmma_fence() {
  meet_warpgroup("wgmma_fence", nullptr, [](void* const*) { current_warpgroup().fenced = true; });
}

void wgmma_commit() {
  meet_warpgroup("wgmma_commit", nullptr, [](void* const*) {
    Warpgroup& warpgroup = current_warpgroup();
    warpgroup.committed.push_back(std::move(warpgroup.open));
    warpgroup.open.clear();
    warpgroup.fenced = false;
  });
}

void wgmma_wait(size_t pending_groups) {
  meet_warpgroup("wgmma_wait", &pending_groups, [](void* const* lanes) {
    Warpgroup& warpgroup = current_warpgroup();
    while (warpgroup.committed.size() > *static_cast<size_t*>(lanes[0])) {
      for (const Wgmma& operation : warpgroup.committed.front()) retire(warpgroup, operation);
      warpgroup.committed.pop_front();
    }
    for (int warp = 0; warp < 4; ++warp) machine.shared.sync_lanes(current_warp() / 4 * 4 + warp);
  });
}

void set_registers() { meet_warpgroup("setmaxnreg", nullptr, nullptr); }

}  // namespace locas::simt
