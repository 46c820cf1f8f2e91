// The whole FFN with memory, forward and backward, for processors with AVX-512 (gemm.h has the product itself).
//
// The memory is r more neurons behind the host's m, with weights of their own and the factor `scale`:
//
//   forward    x ->  panels X [d, T]                                       rows of C     terms
//              act([W_gate | G] X) * ([W_up | K] X)      -> H [m + r, T]   neurons       x
//              [W_down | V^T] H                          -> y              d             host, memory
//   backward   dy -> panels dY [d, T]
//              [W_down^T | V] dY, saved gate and up      -> dA, dU [m + r, T]            dy
//              [W_gate^T | G^T] dA + [W_up^T | K^T] dU   -> dx             d             gate, up of host and memory
//              [dA; dU; H of the memory] [x; dy]         -> dG, dK, dV     3r            added to, float32
//
// Tokens go through in chunks, so that the panels between two products stay in the cache; within a chunk every product
// is cut into blocks of rows, which the threads take from a queue. No sum depends on who computes it.
//
// `saved` holds the pre-activations, gate then up, each [panel][saved_m + r][width] elements.
#include <cstdlib>
#include <memory>
#include <new>

#include "common/activations.h"
#include "cpu/gemm.h"
#include "cpu/kernels.h"

namespace locas::cpu::LOCAS_ISA {
namespace {

constexpr int64_t kChunk = 11 * kPanel;

// Memory that a thread keeps between calls, so that a steady state allocates nothing.
class Workspace {
 public:
  void* reserve(size_t bytes) {
    if (bytes > size_) {
      data_.reset();
      size_ = 0;
      data_.reset(std::aligned_alloc(64, round_up(bytes)));
      if (!data_) throw std::bad_alloc();
      size_ = bytes;
    }
    return data_.get();
  }
  static size_t round_up(size_t bytes) { return (bytes + 63) / 64 * 64; }

 private:
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  std::unique_ptr<void, Free> data_;
  size_t size_ = 0;
};
thread_local Workspace call_workspace, thread_workspace;

// Hands out consecutive aligned pieces of one allocation; the first pass, without memory, only counts.
struct Carver {
  char* base = nullptr;
  size_t used = 0;

  template <class U>
  U* take(size_t count) {
    char* piece = base + used;
    used += Workspace::round_up(count * sizeof(U));
    return base ? reinterpret_cast<U*>(piece) : nullptr;
  }
};

// One call: its sizes, and where a chunk's panels lie.
template <class T>
struct Sizes {
  int64_t d, m, r, tokens, saved_m;
  int64_t d_words, hidden_words;  // words of k of a panel over d and over the m + r neurons

  template <class Params>
  explicit Sizes(const Params& p)
      : d(p.weights.d), m(p.weights.m), r(p.weights.r), tokens(p.tokens), saved_m(p.saved_m), d_words(words_of<T>(d)),
        hidden_words(words_of<T>(m) + words_of<T>(r)) {}

  int64_t chunk() const {  // equal chunks, none of them small
    const int64_t chunks = std::max<int64_t>(1, (tokens + kChunk - 1) / kChunk);
    return panels_of((tokens + chunks - 1) / chunks) * kPanel;
  }
  int64_t blocks_of(int64_t rows) const { return (rows + kBlock - 1) / kBlock; }
};

// Neurons [first, first + count) of the host or of the memory.
struct Neurons {
  bool memory;
  int64_t first, count;
};

template <class T>
Neurons neurons_of_block(const Sizes<T>& s, int64_t block) {
  const int64_t host = s.blocks_of(s.m);
  const bool memory = block >= host;
  const int64_t first = (memory ? block - host : block) * kBlock;
  return {memory, first, std::min<int64_t>(kBlock, (memory ? s.r : s.m) - first)};
}

Scratch thread_scratch(int64_t chunk, float** more_sums) {
  Carver carver;
  const auto carve = [&] {
    Scratch scratch{carver.take<float>(chunk * kBlock), carver.take<uint32_t>(kBlock / kTile * packed_stride(kDepth))};
    *more_sums = carver.take<float>(chunk * kBlock);
    return scratch;
  };
  carve();
  carver = {static_cast<char*>(thread_workspace.reserve(carver.used)), 0};
  return carve();
}

// Token-major rows [tokens, d] -> panels, split over the threads.
template <class T>
void pack_tokens(const Rows& from, int64_t begin, int64_t tokens, const Panels& to) {
  constexpr int64_t kPiece = 128;
  const int64_t pieces = (to.words + kPiece - 1) / kPiece;
#pragma omp for schedule(static) collapse(2)
  for (int64_t panel = 0; panel < panels_of(tokens); ++panel)
    for (int64_t piece = 0; piece < pieces; ++piece) {
      const int width = panel_width(tokens, panel);
      const int64_t word = piece * kPiece;
      const T* rows = static_cast<const T*>(from.data) + (begin + panel * kPanel) * from.stride + word * kPerWord<T>;
      pack_panel<T>(rows, from.stride, tokens - panel * kPanel, width, std::min(kPiece, to.words - word),
                    to.at(panel, width, word));
    }
}

template <class T>
__m512 bias_of(const void* bias, int64_t i) {
  float value = 0.0f;
  if (bias) load_block(static_cast<const T*>(bias) + i, &value, 1);
  return _mm512_set1_ps(value);
}

// The sums of rows [row, row + rows) -> columns of a token-major matrix.
template <class T>
void store_tokens(const Scratch& scratch, int64_t row, int64_t rows, const void* bias, const Rows& to, int64_t begin,
                  int64_t tokens) {
  alignas(64) uint32_t words[kBlock * kPanel];
  for (int64_t panel = 0; panel < panels_of(tokens); ++panel) {
    const int width = panel_width(tokens, panel);
    for (int64_t i = 0; i < rows; i += kPerWord<T>) {
      const int64_t j = i + kPerWord<T> - 1;
      const float *sums = scratch.of(panel, width, i), *next = scratch.of(panel, width, j);
      const __m512 first_bias = bias_of<T>(bias, row + i), next_bias = bias_of<T>(bias, row + j);
      for (int t = 0; t < width; t += kVector)
        store_words<T>(words + i / kPerWord<T> * width + t, _mm512_add_ps(_mm512_loadu_ps(sums + t), first_bias),
                       _mm512_add_ps(_mm512_loadu_ps(next + t), next_bias));
    }
    T* out = static_cast<T*>(to.data) + (begin + panel * kPanel) * to.stride + row;
    unpack_panel<T>(words, width, words_of<T>(rows), out, to.stride,
                    std::min<int64_t>(kPanel, tokens - panel * kPanel));
  }
}

// Where a neuron's pre-activations are saved: [panel][saved_m + r][width].
template <class T>
T* saved_row(void* saved, const Sizes<T>& s, int64_t token, int width, const Neurons& n, int64_t i) {
  return static_cast<T*>(saved) + token * (s.saved_m + s.r) + (n.first + i + (n.memory ? s.saved_m : 0)) * width;
}

template <class T, Activation act>
void forward_typed(const CpuGluFfnForwardParams& p) {
  const Sizes<T> s(p);
  const int64_t chunk = s.chunk(), up_offset = (s.tokens + kVector - 1) / kVector * kVector * (s.saved_m + s.r);
  Carver carver;
  Panels x, hidden;
  const auto carve = [&] {
    x = {carver.take<uint32_t>(chunk * s.d_words), s.d_words};
    hidden = {carver.take<uint32_t>(chunk * s.hidden_words), s.hidden_words};
  };
  carve();
  carver = {static_cast<char*>(call_workspace.reserve(carver.used)), 0};
  carve();
  void* saved_up = p.saved ? static_cast<T*>(p.saved) + up_offset : nullptr;

#pragma omp parallel
  {
    float* up_sums;
    const Scratch gates = thread_scratch(chunk, &up_sums), ups{up_sums, gates.packed};
    for (int64_t begin = 0; begin < s.tokens; begin += chunk) {
      const int64_t tokens = std::min(chunk, s.tokens - begin);
      pack_tokens<T>(p.x, begin, tokens, x);
#pragma omp for schedule(dynamic)
      for (int64_t block = 0; block < s.blocks_of(s.m) + s.blocks_of(s.r); ++block) {
        const Neurons n = neurons_of_block(s, block);
        const bool saves = p.saved && (n.memory || s.saved_m);
        const Rows gate = n.memory ? p.weights.memory_gate : p.weights.gate;
        const Rows up = n.memory ? p.weights.memory_key : p.weights.up;
        const Term gate_term{gate.data, gate.stride, false, s.d, x, 0}, up_term{up.data, up.stride, false, s.d, x, 0};
        multiply_block<T>(&gate_term, 1, n.first, n.count, tokens, gates);
        multiply_block<T>(&up_term, 1, n.first, n.count, tokens, ups);
        const float scale = n.memory ? p.scale : 1.0f;
        const int64_t first_word = (n.memory ? words_of<T>(s.m) : 0) + n.first / kPerWord<T>;
        for (int64_t panel = 0; panel < panels_of(tokens); ++panel) {
          const int width = panel_width(tokens, panel);
          const int64_t token = begin + panel * kPanel;
          for (int64_t i = 0; i < n.count; i += kPerWord<T>) {
            uint32_t* to = hidden.at(panel, width, first_word + i / kPerWord<T>);
            for (int t = 0; t < width; t += kVector) {
              alignas(64) float h[2][kVector] = {};
              for (int j = 0; j < kPerWord<T> && i + j < n.count; ++j) {
                // Rounded first, so that reading, training and the backward see the same activations.
                T gate_unsaved[kVector], up_unsaved[kVector];
                T* gate_to = saves ? saved_row<T>(p.saved, s, token, width, n, i + j) + t : gate_unsaved;
                T* up_to = saves ? saved_row<T>(saved_up, s, token, width, n, i + j) + t : up_unsaved;
                const __m512 gate_bias = bias_of<T>(n.memory ? nullptr : p.weights.gate_bias, n.first + i + j);
                const __m512 up_bias = bias_of<T>(n.memory ? nullptr : p.weights.up_bias, n.first + i + j);
                store_values(gate_to, _mm512_add_ps(_mm512_loadu_ps(gates.of(panel, width, i + j) + t), gate_bias));
                store_values(up_to, _mm512_add_ps(_mm512_loadu_ps(ups.of(panel, width, i + j) + t), up_bias));
                alignas(64) float g[kVector], u[kVector];
                _mm512_store_ps(g, load_values(gate_to));
                _mm512_store_ps(u, load_values(up_to));
#pragma omp simd
                for (int lane = 0; lane < kVector; ++lane) h[j][lane] = scale * activate<act>(g[lane]).value * u[lane];
              }
              store_words<T>(to + t, _mm512_load_ps(h[0]), _mm512_load_ps(h[1]));
            }
          }
        }
      }
#pragma omp for schedule(dynamic)
      for (int64_t block = 0; block < s.blocks_of(s.d); ++block) {
        const int64_t row = block * kBlock, rows = std::min<int64_t>(kBlock, s.d - row);
        const Rows down = p.weights.down, value = p.weights.memory_value;
        const Term terms[] = {{down.data, down.stride, false, s.m, hidden, 0},
                              {value.data, value.stride, true, s.r, hidden, words_of<T>(s.m)}};
        multiply_block<T>(terms, 2, row, rows, tokens, gates);
        store_tokens<T>(gates, row, rows, p.weights.down_bias, p.y, begin, tokens);
      }
    }
  }
}

template <class T, Activation act>
void backward_typed(const CpuGluFfnBackwardParams& p) {
  const Sizes<T> s(p);
  const int64_t chunk = s.chunk(), up_offset = (s.tokens + kVector - 1) / kVector * kVector * (s.saved_m + s.r);
  const bool needs_dx = p.dx.data != nullptr;
  Carver carver;
  Panels dy, d_gate, d_up;
  T* rows;  // [3r, chunk]: d gate, d key and hidden of the memory, contiguous along the tokens
  const auto carve = [&] {
    dy = {carver.take<uint32_t>(chunk * s.d_words), s.d_words};
    d_gate = {carver.take<uint32_t>(chunk * s.hidden_words), s.hidden_words};
    d_up = {carver.take<uint32_t>(chunk * s.hidden_words), s.hidden_words};
    rows = carver.take<T>(3 * s.r * chunk);
  };
  carve();
  carver = {static_cast<char*>(call_workspace.reserve(carver.used)), 0};
  carve();
  void* saved = const_cast<void*>(p.saved);
  void* saved_up = static_cast<T*>(saved) + up_offset;
  const int64_t host_blocks = s.blocks_of(s.m), memory_blocks = s.blocks_of(s.r);

#pragma omp parallel
  {
    float* unused;
    const Scratch scratch = thread_scratch(chunk, &unused);
    for (int64_t begin = 0; begin < s.tokens; begin += chunk) {
      const int64_t tokens = std::min(chunk, s.tokens - begin);
      pack_tokens<T>(p.dy, begin, tokens, dy);
#pragma omp for schedule(dynamic)
      for (int64_t block = needs_dx ? 0 : host_blocks; block < host_blocks + memory_blocks; ++block) {
        const Neurons n = neurons_of_block(s, block);
        const Rows down = n.memory ? p.weights.memory_value : p.weights.down;
        const Term term{down.data, down.stride, !n.memory, s.d, dy, 0};
        multiply_block<T>(&term, 1, n.first, n.count, tokens, scratch);
        const float scale = n.memory ? p.scale : 1.0f;
        const int64_t first_word = (n.memory ? words_of<T>(s.m) : 0) + n.first / kPerWord<T>;
        for (int64_t panel = 0; panel < panels_of(tokens); ++panel) {
          const int width = panel_width(tokens, panel);
          const int64_t token = begin + panel * kPanel;
          for (int64_t i = 0; i < n.count; i += kPerWord<T>) {
            const int64_t word = first_word + i / kPerWord<T>;
            uint32_t *gate_to = d_gate.at(panel, width, word), *up_to = d_up.at(panel, width, word);
            for (int t = 0; t < width; t += kVector) {
              alignas(64) float d_gates[2][kVector] = {}, d_ups[2][kVector] = {};
              for (int j = 0; j < kPerWord<T> && i + j < n.count; ++j) {
                alignas(64) float g[kVector], u[kVector], h[kVector];
                _mm512_store_ps(g, load_values(saved_row<T>(saved, s, token, width, n, i + j) + t));
                _mm512_store_ps(u, load_values(saved_row<T>(saved_up, s, token, width, n, i + j) + t));
                const float* d_hidden = scratch.of(panel, width, i + j) + t;
#pragma omp simd
                for (int lane = 0; lane < kVector; ++lane) {
                  const ValueAndSlope a = activate<act>(g[lane]);
                  const float d = scale * d_hidden[lane];
                  d_gates[j][lane] = d * u[lane] * a.slope;
                  d_ups[j][lane] = d * a.value;
                  h[lane] = scale * a.value * u[lane];
                }
                if (n.memory) {
                  T* to = rows + (n.first + i + j) * chunk + panel * kPanel + t;
                  store_values(to, _mm512_load_ps(d_gates[j]));
                  store_values(to + s.r * chunk, _mm512_load_ps(d_ups[j]));
                  store_values(to + 2 * s.r * chunk, _mm512_load_ps(h));
                }
              }
              store_words<T>(gate_to + t, _mm512_load_ps(d_gates[0]), _mm512_load_ps(d_gates[1]));
              store_words<T>(up_to + t, _mm512_load_ps(d_ups[0]), _mm512_load_ps(d_ups[1]));
            }
          }
        }
      }
      if (needs_dx) {
#pragma omp for schedule(dynamic) nowait
        for (int64_t block = 0; block < s.blocks_of(s.d); ++block) {
          const int64_t row = block * kBlock, count = std::min<int64_t>(kBlock, s.d - row), memory = words_of<T>(s.m);
          const FfnWeights& w = p.weights;
          const Term terms[] = {{w.gate.data, w.gate.stride, true, s.m, d_gate, 0},
                                {w.up.data, w.up.stride, true, s.m, d_up, 0},
                                {w.memory_gate.data, w.memory_gate.stride, true, s.r, d_gate, memory},
                                {w.memory_key.data, w.memory_key.stride, true, s.r, d_up, memory}};
          multiply_block<T>(terms, 4, row, count, tokens, scratch);
          store_tokens<T>(scratch, row, count, nullptr, p.dx, begin, tokens);
        }
      }
      // The slots' gradient: tokens are k, and a panel is 48 columns of x or dy.
      const int64_t column_panels = panels_of(s.d);
#pragma omp for schedule(dynamic)
      for (int64_t task = 0; task < 2 * column_panels; ++task) {
        const bool values = task >= column_panels;
        const int64_t column = (values ? task - column_panels : task) * kPanel;
        const int64_t columns = std::min<int64_t>(kPanel, s.d - column);
        const Rows from = values ? p.dy : p.x;
        const Panels panel{reinterpret_cast<uint32_t*>(unused), words_of<T>(tokens)};
        pack_columns<T>(static_cast<const T*>(from.data) + begin * from.stride + column, from.stride, tokens, columns,
                        panel_width(columns, 0), 0, panel.data);
        const int64_t first = values ? 2 * s.r : 0, last = values ? 3 * s.r : 2 * s.r;
        const Term term{rows, chunk, false, tokens, panel, 0};
        for (int64_t row = first; row < last; row += kBlock) {
          const int64_t count = std::min<int64_t>(kBlock, last - row);
          multiply_block<T>(&term, 1, row, count, columns, scratch);
          for (int64_t i = 0; i < count; ++i) {
            float* to = p.slots_grad + (row + i) * s.d + column;
            const float* sums = scratch.of(0, panel_width(columns, 0), i);
#pragma omp simd
            for (int64_t c = 0; c < columns; ++c) to[c] += sums[c];
          }
        }
      }
    }
  }
}

template <class F>
void with_types(DType dtype, Activation activation, F&& f) {
  with_activation(activation, [&]<Activation act>() {
#ifdef __AVX512BF16__
    if (dtype == DType::bf16) return f.template operator()<bf16, act>();
#endif
    (void)dtype;
    f.template operator()<float, act>();
  });
}

void forward(const CpuGluFfnForwardParams& p) {
  with_types(p.dtype, p.activation, [&]<class T, Activation act>() { forward_typed<T, act>(p); });
}

void backward(const CpuGluFfnBackwardParams& p) {
  with_types(p.dtype, p.activation, [&]<class T, Activation act>() { backward_typed<T, act>(p); });
}

}  // namespace

extern const GluFfnKernels glu_ffn_table;
#ifdef __AVX512BF16__
const GluFfnKernels glu_ffn_table = {true, forward, backward};
#else
const GluFfnKernels glu_ffn_table = {false, forward, backward};
#endif

}  // namespace locas::cpu::LOCAS_ISA
