// The matrix product under the FFN on processors with AVX-512: C = A P, with A [n, k] and P [k, tokens].
//
//           P: panels of 48 tokens                 `multiply_tile` makes 8 rows of C in one panel: 24 vector registers
//           +--------+--------+---+                of sums. A step of k loads three vectors of P and broadcasts eight
//         k |        |        |   |                elements of A.
//           +--------+--------+---+
//      k                                           Tokens lie along the vectors and A is only broadcast: a weight whose
//   +-------+--------+--------+---+                rows are contiguous along k is read where it lies, one that is
// 8 |   A   |  tile  |  tile  |   |                needed transposed is copied a block at a time, and all activations
//   +-------+--------+--------+---+                between the FFN's products stay in panels.
// 8 |       |        |        |   |
//   +-------+--------+--------+---+
//
// k is counted in words of 32 bits: one float, or two neighbouring bfloat16, which one vdpbf16ps multiplies and adds.
// A panel of P is [words of k][width], its width 48, or 16 or 32 where the tokens end; what pads it is zero.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <type_traits>

#include "cpu/half.h"

namespace locas::cpu::LOCAS_ISA {

constexpr int kTile = 8;     // rows of C in a tile
constexpr int kPanel = 48;   // tokens in a panel
constexpr int kVector = 16;  // words in a register
constexpr int kBlock = 64;   // rows of C that one task makes, for all panels of a chunk
// Words of k between two visits to the sums. Among 128 to 4096, within 3% of each other on an EPYC 9004 (Zen 4), the best:
// 220 of 230 GFLOP/s in float32 and 445 of 460 in bfloat16, where MKL and oneDNN reach 100 to 170 and 320 to 390.
constexpr int kDepth = 512;
// Words of k summed up in registers. In one run over k = 3072 the float32 error is 2.9 times torch's; in runs of 128,
// 0.85.
constexpr int kRun = 128;

// Words of k that packing prefetches ahead, into the second-level cache: 366 GFLOP/s in the case of packed_stride; into
// the first-level one 341, and 32 or 64 words were no better.
constexpr int kAhead = 16;

template <class T>
constexpr int kPerWord = 4 / sizeof(T);
template <class T>
constexpr int64_t words_of(int64_t elements) {
  return (elements + kPerWord<T> - 1) / kPerWord<T>;
}
constexpr int64_t panels_of(int64_t tokens) { return (tokens + kPanel - 1) / kPanel; }
// Only the last panel may be narrower than 48.
inline int panel_width(int64_t tokens, int64_t panel) {
  const int64_t rest = std::min<int64_t>(kPanel, tokens - panel * kPanel);
  return static_cast<int>((rest + kVector - 1) / kVector * kVector);
}

// A right-hand side: panel after panel, each [words][width].
struct Panels {
  uint32_t* data;
  int64_t words;  // of k

  uint32_t* at(int64_t panel, int width, int64_t word) const { return data + panel * kPanel * words + word * width; }
};

// One summand A P of a product: A's k runs over the words [first, first + words) of P.
struct Term {
  const void* a;
  int64_t stride;   // elements from one row of `a` to the next
  bool transposed;  // `a` is stored [k, n], not [n, k]
  int64_t k;        // elements
  Panels p;
  int64_t first;
};

template <class T>
inline __m512 multiply_add(__m512 sum, uint32_t word, __m512i p) {
#ifdef __AVX512BF16__
  if constexpr (std::is_same_v<T, bf16>)
    return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_epi32(static_cast<int>(word)), (__m512bh)p);
#endif
  return _mm512_fmadd_ps(_mm512_set1_ps(std::bit_cast<float>(word)), _mm512_castsi512_ps(p), sum);
}

// Eight rows of A: in place, each contiguous along k, or packed as [words of k][8].
struct RowsInPlace {
  const uint32_t* row[kTile];
  uint32_t word(int i, int64_t k) const { return row[i][k]; }
};
struct RowsPacked {
  const uint32_t* words;
  uint32_t word(int i, int64_t k) const { return words[k * kTile + i]; }
};

// sums [8][16 * vectors] = (sums +) A P over `words` steps of k. Every kRun steps start from zero and are added to the
// sums as a whole, which keeps the rounding error of long sums down.
template <class T, int vectors, class A>
void multiply_tile(const A a, const uint32_t* __restrict p, int64_t words, float* __restrict sums, bool accumulate) {
  constexpr int width = vectors * kVector;
  for (int64_t start = 0; start < words; start += kRun, accumulate = true) {
    __m512 sum[kTile][vectors];
    for (int i = 0; i < kTile; ++i)
      for (int v = 0; v < vectors; ++v) sum[i][v] = _mm512_setzero_ps();
    for (int64_t k = start; k < std::min<int64_t>(start + kRun, words); ++k, p += width) {
      __m512i p_vector[vectors];
      for (int v = 0; v < vectors; ++v) p_vector[v] = _mm512_loadu_si512(p + v * kVector);
      for (int i = 0; i < kTile; ++i) {
        const uint32_t word = a.word(i, k);
        for (int v = 0; v < vectors; ++v) sum[i][v] = multiply_add<T>(sum[i][v], word, p_vector[v]);
      }
    }
    for (int i = 0; i < kTile; ++i)
      for (int v = 0; v < vectors; ++v) {
        float* to = sums + i * width + v * kVector;
        _mm512_storeu_ps(to, accumulate ? _mm512_add_ps(sum[i][v], _mm512_loadu_ps(to)) : sum[i][v]);
      }
  }
}

template <class T, class A>
void multiply_tile(int width, const A& a, const uint32_t* p, int64_t words, float* sums, bool accumulate) {
  switch (width / kVector) {
    case 1: return multiply_tile<T, 1>(a, p, words, sums, accumulate);
    case 2: return multiply_tile<T, 2>(a, p, words, sums, accumulate);
    default: return multiply_tile<T, 3>(a, p, words, sums, accumulate);
  }
}

// 16 columns of two neighbouring rows of k as words; `mask` has a bit a column, and a null second row is zero.
template <class T>
inline __m512i load_words(const T* row, const T* next, __mmask16 mask) {
  if constexpr (std::is_same_v<T, float>) {
    return _mm512_maskz_loadu_epi32(mask, row);
  } else {
    const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, row));
    if (!next) return low;
    return _mm512_or_si512(low, _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, next)), 16));
  }
}

inline __mmask16 first_lanes(int64_t n) {
  return static_cast<__mmask16>((1u << std::clamp<int64_t>(n, 0, kVector)) - 1);
}

// Columns [0, columns) of a matrix [k, n] as words, in groups of `group` columns, each [words][group], `group_stride`
// words apart: the left-hand side of a transposed term (group 8), or a panel (group = its width).
template <class T>
void pack_columns(const T* from, int64_t stride, int64_t k, int64_t columns, int group, int64_t group_stride,
                  uint32_t* to) {
  const int64_t words = words_of<T>(k);
  constexpr int kHalf = kVector / 2;
  for (int64_t word = 0; word < words; ++word) {
    const T* row = from + word * kPerWord<T> * stride;
    const T* next = kPerWord<T> == 2 && 2 * word + 1 < k ? row + stride : nullptr;
    for (int i = 0; i < kPerWord<T>; ++i)
      for (int64_t column = 0; column < columns; column += 64 / static_cast<int>(sizeof(T)))
        _mm_prefetch(reinterpret_cast<const char*>(row + (kAhead * kPerWord<T> + i) * stride + column), _MM_HINT_T1);
    for (int64_t column = 0; column < columns; column += kVector) {
      const __m512i vector = load_words(row + column, next ? next + column : nullptr, first_lanes(columns - column));
      const auto place = [&](int64_t c) {
        return reinterpret_cast<__m256i*>(to + c / group * group_stride + word * group + c % group);
      };
      _mm256_storeu_si256(place(column), _mm512_castsi512_si256(vector));
      _mm256_storeu_si256(place(column + kHalf), _mm512_extracti64x4_epi64(vector, 1));
    }
  }
}

// ---- 16 values at a time between float and storage ----
template <class T>
inline __m512 load_values(const T* from) {
  if constexpr (std::is_same_v<T, float>) return _mm512_loadu_ps(from);
  else
    return _mm512_castsi512_ps(
        _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))), 16));
}

template <class T>
inline void store_values(T* to, __m512 values) {
#ifdef __AVX512BF16__
  if constexpr (std::is_same_v<T, bf16>)
    return _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh(values));
#endif
  _mm512_storeu_ps(to, values);
}

// Two neighbouring rows as words: `next` counts for bfloat16 only.
template <class T>
inline void store_words(uint32_t* to, __m512 row, [[maybe_unused]] __m512 next) {
#ifdef __AVX512BF16__
  if constexpr (std::is_same_v<T, bf16>)
    return _mm512_storeu_si512(
        to, _mm512_or_si512(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(row)),
                            _mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(next)), 16)));
#endif
  _mm512_storeu_ps(to, row);
}

// From one packed tile to the next: a line more than it holds, or all would start in the same set of the first-level
// cache. With it the bfloat16 backward at d = 1024, T = 128 runs at 341 GFLOP/s, without at 291 (that EPYC).
constexpr int64_t packed_stride(int64_t words) { return words * kTile + kVector; }

// What one thread needs for a block: sums of every panel, [panel][kBlock][width], and a packed piece of A.
struct Scratch {
  float* sums;
  uint32_t* packed;  // [kBlock / kTile * packed_stride(kDepth)]

  float* of(int64_t panel, int width, int64_t row) const { return sums + panel * kPanel * kBlock + row * width; }
};

// Rows [row, row + rows) of the sum of all terms, rows <= kBlock, for every panel.
template <class T>
void multiply_block(const Term* terms, int count, int64_t row, int64_t rows, int64_t tokens, const Scratch& scratch) {
  bool accumulate = false;
  for (const Term* term = terms; term != terms + count; ++term) {
    const T* a = static_cast<const T*>(term->a);
    const int64_t all = words_of<T>(term->k);
    for (int64_t k = 0; k < all; k += kDepth, accumulate = true) {
      const int64_t words = std::min<int64_t>(kDepth, all - k), element = k * kPerWord<T>;
      if (term->transposed)
        pack_columns<T>(a + element * term->stride + row, term->stride,
                        std::min(term->k - element, words * kPerWord<T>), rows, kTile, packed_stride(words),
                        scratch.packed);
      for (int64_t panel = 0; panel < panels_of(tokens); ++panel) {
        const int width = panel_width(tokens, panel);
        const uint32_t* p = term->p.at(panel, width, term->first + k);
        for (int64_t tile = 0; tile < rows; tile += kTile) {
          float* sums = scratch.of(panel, width, tile);
          if (term->transposed) {
            const RowsPacked packed{scratch.packed + tile / kTile * packed_stride(words)};
            multiply_tile<T>(width, packed, p, words, sums, accumulate);
          } else {
            RowsInPlace in_place;  // the last tile's missing rows repeat its last one; nobody reads their sums
            for (int i = 0; i < kTile; ++i)
              in_place.row[i] = reinterpret_cast<const uint32_t*>(
                  a + (row + std::min<int64_t>(tile + i, rows - 1)) * term->stride + element);
            multiply_tile<T>(width, in_place, p, words, sums, accumulate);
          }
        }
      }
    }
  }
}

// Transposes 16 x 16 words.
inline void transpose(__m512i (&r)[kVector]) {
  __m512i t[kVector];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  // Row 4 a + b of 128-bit lanes now holds columns 4 lane + b of rows 4 a .. 4 a + 3: transpose the 4 x 4 lanes.
  for (int b = 0; b < 4; ++b) {
    const __m512i low02 = _mm512_shuffle_i32x4(r[b], r[4 + b], 0x88),
                  high02 = _mm512_shuffle_i32x4(r[8 + b], r[12 + b], 0x88);
    const __m512i low13 = _mm512_shuffle_i32x4(r[b], r[4 + b], 0xdd),
                  high13 = _mm512_shuffle_i32x4(r[8 + b], r[12 + b], 0xdd);
    t[b] = _mm512_shuffle_i32x4(low02, high02, 0x88);
    t[4 + b] = _mm512_shuffle_i32x4(low13, high13, 0x88);
    t[8 + b] = _mm512_shuffle_i32x4(low02, high02, 0xdd);
    t[12 + b] = _mm512_shuffle_i32x4(low13, high13, 0xdd);
  }
  for (int i = 0; i < 16; ++i) r[i] = t[i];
}

// Token-major rows of `words` words -> as many rows of a panel.
template <class T>
void pack_panel(const T* from, int64_t stride, int64_t tokens, int width, int64_t words, uint32_t* to) {
  for (int64_t word = 0; word < words; word += kVector)
    for (int64_t token = 0; token < width; token += kVector) {
      __m512i r[kVector];
      for (int i = 0; i < kVector; ++i)
        r[i] = token + i < tokens ? _mm512_maskz_loadu_epi32(first_lanes(words - word),
                                                             from + (token + i) * stride + word * kPerWord<T>)
                                  : _mm512_setzero_si512();
      transpose(r);
      for (int i = 0; i < kVector && word + i < words; ++i) _mm512_storeu_si512(to + (word + i) * width + token, r[i]);
    }
}

// The other way: [words][width] -> token-major rows.
template <class T>
void unpack_panel(const uint32_t* from, int width, int64_t words, T* to, int64_t stride, int64_t tokens) {
  for (int64_t word = 0; word < words; word += kVector)
    for (int64_t token = 0; token < tokens; token += kVector) {
      __m512i r[kVector];
      for (int i = 0; i < kVector; ++i)
        r[i] = word + i < words ? _mm512_loadu_si512(from + (word + i) * width + token) : _mm512_setzero_si512();
      transpose(r);
      for (int i = 0; i < kVector && token + i < tokens; ++i)
        _mm512_mask_storeu_epi32(to + (token + i) * stride + word * kPerWord<T>, first_lanes(words - word), r[i]);
    }
}

}  // namespace locas::cpu::LOCAS_ISA
