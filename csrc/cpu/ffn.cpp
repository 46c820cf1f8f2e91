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
static_assert(kVector == kCpuTokenMultiple, "the bindings size `saved` by it");

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

// Neurons [first, first + count) of the host or of the memory.
struct Neurons {
  bool memory;
  int64_t first, count;
};

// The sizes of one call.
template <class T>
struct Sizes {
  int64_t d, m, r, tokens, saved_m;
  int64_t d_words, hidden_words;  // words of k of a panel over d and over the m + r neurons
  int64_t chunk;                  // tokens of a chunk: all are equal, none is small
  int64_t up_offset;              // of the saved up behind the saved gate, in elements

  template <class Params>
  explicit Sizes(const Params& p)
      : d(p.weights.d()), m(p.weights.m()), r(p.weights.r()), tokens(p.x.rows), saved_m(p.saved_m),
        d_words(words_of<T>(d)), hidden_words(words_of<T>(m) + words_of<T>(r)),
        up_offset((tokens + kVector - 1) / kVector * kVector * (saved_m + r)) {
    const int64_t chunks = std::max<int64_t>(1, (tokens + kChunk - 1) / kChunk);
    chunk = panels_of((tokens + chunks - 1) / chunks) * kPanel;
  }

  int64_t host_blocks() const { return blocks_of(m); }
  int64_t neuron_blocks() const { return blocks_of(m) + blocks_of(r); }
  int64_t channel_blocks() const { return blocks_of(d); }
  // Where neurons begin among the words of a panel over all of them.
  int64_t first_word(const Neurons& n) const { return (n.memory ? words_of<T>(m) : 0) + n.first / kPerWord<T>; }

 private:
  static int64_t blocks_of(int64_t rows) { return (rows + kBlock - 1) / kBlock; }
};

// Tokens [begin, begin + tokens).
struct Chunk {
  int64_t begin, tokens;
};
template <class T>
Chunk chunk_at(const Sizes<T>& s, int64_t begin) {
  return {begin, std::min(s.chunk, s.tokens - begin)};
}

template <class T>
Neurons neurons_of_block(const Sizes<T>& s, int64_t block) {
  const int64_t host = s.host_blocks();
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
void pack_tokens(const Matrix& from, const Chunk& c, const Panels& to) {
  constexpr int64_t kPiece = 128;
  const int64_t pieces = (to.words + kPiece - 1) / kPiece;
#pragma omp for schedule(static) collapse(2)
  for (int64_t panel = 0; panel < panels_of(c.tokens); ++panel)
    for (int64_t piece = 0; piece < pieces; ++piece) {
      const int width = panel_width(c.tokens, panel);
      const int64_t word = piece * kPiece;
      const T* rows = from.at<const T>(c.begin + panel * kPanel, word * kPerWord<T>);
      pack_panel<T>(rows, from.stride, c.tokens - panel * kPanel, width, std::min(kPiece, to.words - word),
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
void store_tokens(const Scratch& scratch, int64_t row, int64_t rows, const void* bias, const Matrix& to,
                  const Chunk& c) {
  alignas(64) uint32_t words[kBlock * kPanel];
  for (int64_t panel = 0; panel < panels_of(c.tokens); ++panel) {
    const int width = panel_width(c.tokens, panel);
    for (int64_t i = 0; i < rows; i += kPerWord<T>) {
      const int64_t j = i + kPerWord<T> - 1;
      const float *sums = scratch.of(panel, width, i), *next = scratch.of(panel, width, j);
      const __m512 first_bias = bias_of<T>(bias, row + i), next_bias = bias_of<T>(bias, row + j);
      for (int t = 0; t < width; t += kVector)
        store_words<T>(words + i / kPerWord<T> * width + t, _mm512_add_ps(_mm512_loadu_ps(sums + t), first_bias),
                       _mm512_add_ps(_mm512_loadu_ps(next + t), next_bias));
    }
    T* out = to.at<T>(c.begin + panel * kPanel, row);
    unpack_panel<T>(words, width, words_of<T>(rows), out, to.stride,
                    std::min<int64_t>(kPanel, c.tokens - panel * kPanel));
  }
}

// Where a neuron's pre-activations are saved: [panel][saved_m + r][width].
template <class T>
T* saved_row(void* saved, const Sizes<T>& s, int64_t token, int width, const Neurons& n, int64_t i) {
  return static_cast<T*>(saved) + token * (s.saved_m + s.r) + (n.first + i + (n.memory ? s.saved_m : 0)) * width;
}

Term term_of(const Matrix& a, bool transposed, int64_t k, const Panels& p, int64_t first_word) {
  return {a.data, a.stride, transposed, k, p, first_word};
}

// ---- The forward: hidden from x, then y from hidden ----------------------------------------------------------------
template <class T>
struct Forward {
  const CpuGluFfnForwardParams& p;
  const Sizes<T> s;
  Panels x, hidden;
  void* saved_up;  // null where nothing is saved

  explicit Forward(const CpuGluFfnForwardParams& p)
      : p(p), s(p), saved_up(p.saved ? static_cast<T*>(p.saved) + s.up_offset : nullptr) {
    Carver carver;
    carve(carver);
    carver = {static_cast<char*>(call_workspace.reserve(carver.used)), 0};
    carve(carver);
  }

 private:
  void carve(Carver& carver) {
    x = {carver.take<uint32_t>(s.chunk * s.d_words), s.d_words};
    hidden = {carver.take<uint32_t>(s.chunk * s.hidden_words), s.hidden_words};
  }
};

// scale * act(gate) * up of two neighbouring neurons (one in float32) and 16 tokens: from the sums at column t of a
// panel to a word of `hidden`, and to `saved` where these neurons are saved.
template <class T, Activation act>
void activate_word(const Forward<T>& f, const Neurons& n, int64_t i, int64_t token, int width, int t,
                   const float* gate_sums, const float* up_sums, uint32_t* to) {
  const bool saves = f.p.saved && (n.memory || f.s.saved_m);
  const float scale = n.memory ? f.p.scale : 1.0f;
  alignas(64) float h[2][kVector] = {};
  for (int j = 0; j < kPerWord<T> && i + j < n.count; ++j) {
    // Rounded first, so that reading, training and the backward see the same activations.
    T gate_unsaved[kVector], up_unsaved[kVector];
    T* gate_to = saves ? saved_row<T>(f.p.saved, f.s, token, width, n, i + j) + t : gate_unsaved;
    T* up_to = saves ? saved_row<T>(f.saved_up, f.s, token, width, n, i + j) + t : up_unsaved;
    const __m512 gate_bias = bias_of<T>(n.memory ? nullptr : f.p.weights.gate_bias, n.first + i + j);
    const __m512 up_bias = bias_of<T>(n.memory ? nullptr : f.p.weights.up_bias, n.first + i + j);
    store_values(gate_to, _mm512_add_ps(_mm512_loadu_ps(gate_sums + j * width), gate_bias));
    store_values(up_to, _mm512_add_ps(_mm512_loadu_ps(up_sums + j * width), up_bias));
    alignas(64) float g[kVector], u[kVector];
    _mm512_store_ps(g, load_values(gate_to));
    _mm512_store_ps(u, load_values(up_to));
#pragma omp simd
    for (int lane = 0; lane < kVector; ++lane) h[j][lane] = scale * activate<act>(g[lane]).value * u[lane];
  }
  store_words<T>(to, _mm512_load_ps(h[0]), _mm512_load_ps(h[1]));
}

// A block of neurons of `hidden`.
template <class T, Activation act>
void hidden_block(const Forward<T>& f, const Chunk& c, int64_t block, const Scratch& gates, const Scratch& ups) {
  const FfnWeights& w = f.p.weights;
  const Neurons n = neurons_of_block(f.s, block);
  const Term gate = term_of(n.memory ? w.memory_gate : w.gate, false, f.s.d, f.x, 0);
  const Term up = term_of(n.memory ? w.memory_key : w.up, false, f.s.d, f.x, 0);
  multiply_block<T>(&gate, 1, n.first, n.count, c.tokens, gates);
  multiply_block<T>(&up, 1, n.first, n.count, c.tokens, ups);
  for (int64_t panel = 0; panel < panels_of(c.tokens); ++panel) {
    const int width = panel_width(c.tokens, panel);
    for (int64_t i = 0; i < n.count; i += kPerWord<T>) {
      uint32_t* to = f.hidden.at(panel, width, f.s.first_word(n) + i / kPerWord<T>);
      for (int t = 0; t < width; t += kVector)
        activate_word<T, act>(f, n, i, c.begin + panel * kPanel, width, t, gates.of(panel, width, i) + t,
                              ups.of(panel, width, i) + t, to + t);
    }
  }
}

// A block of channels of y.
template <class T>
void down_block(const Forward<T>& f, const Chunk& c, int64_t block, const Scratch& scratch) {
  const FfnWeights& w = f.p.weights;
  const int64_t row = block * kBlock, rows = std::min<int64_t>(kBlock, f.s.d - row);
  const Term terms[] = {term_of(w.down, false, f.s.m, f.hidden, 0),
                        term_of(w.memory_value, true, f.s.r, f.hidden, words_of<T>(f.s.m))};
  multiply_block<T>(terms, 2, row, rows, c.tokens, scratch);
  store_tokens<T>(scratch, row, rows, w.down_bias, f.p.y, c);
}

template <class T, Activation act>
void forward_typed(const CpuGluFfnForwardParams& p) {
  const Forward<T> f(p);
#pragma omp parallel
  {
    float* up_sums;
    const Scratch gates = thread_scratch(f.s.chunk, &up_sums), ups{up_sums, gates.packed};
    for (int64_t begin = 0; begin < f.s.tokens; begin += f.s.chunk) {
      const Chunk c = chunk_at(f.s, begin);
      pack_tokens<T>(p.x, c, f.x);
#pragma omp for schedule(dynamic)
      for (int64_t block = 0; block < f.s.neuron_blocks(); ++block) hidden_block<T, act>(f, c, block, gates, ups);
#pragma omp for schedule(dynamic)
      for (int64_t block = 0; block < f.s.channel_blocks(); ++block) down_block<T>(f, c, block, gates);
    }
  }
}

// ---- The backward: the gradients of the pre-activations from dy, then dx and the slots' gradient --------------------
template <class T>
struct Backward {
  const CpuGluFfnBackwardParams& p;
  const Sizes<T> s;
  Panels dy, d_gate, d_up;
  T* rows;  // [3r, chunk]: d gate, d key and hidden of the memory, contiguous along the tokens
  void *saved_gate, *saved_up;

  explicit Backward(const CpuGluFfnBackwardParams& p)
      : p(p), s(p), saved_gate(const_cast<void*>(p.saved)), saved_up(static_cast<T*>(saved_gate) + s.up_offset) {
    Carver carver;
    carve(carver);
    carver = {static_cast<char*>(call_workspace.reserve(carver.used)), 0};
    carve(carver);
  }

 private:
  void carve(Carver& carver) {
    dy = {carver.take<uint32_t>(s.chunk * s.d_words), s.d_words};
    d_gate = {carver.take<uint32_t>(s.chunk * s.hidden_words), s.hidden_words};
    d_up = {carver.take<uint32_t>(s.chunk * s.hidden_words), s.hidden_words};
    rows = carver.take<T>(3 * s.r * s.chunk);
  }
};

// The gradients of gate and up of two neighbouring neurons (one in float32) and 16 tokens, from that of hidden: to a
// word of `d_gate` and one of `d_up`, and for the memory's neurons to `rows` at `column`, with hidden once more.
template <class T, Activation act>
void activate_word_backward(const Backward<T>& b, const Neurons& n, int64_t i, int64_t token, int width, int t,
                            const float* d_hidden_sums, int64_t column, uint32_t* gate_to, uint32_t* up_to) {
  const float scale = n.memory ? b.p.scale : 1.0f;
  alignas(64) float d_gates[2][kVector] = {}, d_ups[2][kVector] = {};
  for (int j = 0; j < kPerWord<T> && i + j < n.count; ++j) {
    alignas(64) float g[kVector], u[kVector], h[kVector];
    _mm512_store_ps(g, load_values(saved_row<T>(b.saved_gate, b.s, token, width, n, i + j) + t));
    _mm512_store_ps(u, load_values(saved_row<T>(b.saved_up, b.s, token, width, n, i + j) + t));
    const float* d_hidden = d_hidden_sums + j * width;
#pragma omp simd
    for (int lane = 0; lane < kVector; ++lane) {
      const ValueAndSlope a = activate<act>(g[lane]);
      const float d = scale * d_hidden[lane];
      d_gates[j][lane] = d * u[lane] * a.slope;
      d_ups[j][lane] = d * a.value;
      h[lane] = scale * a.value * u[lane];
    }
    if (n.memory) {
      const int64_t plane = b.s.r * b.s.chunk;
      T* to = b.rows + (n.first + i + j) * b.s.chunk + column;
      store_values(to, _mm512_load_ps(d_gates[j]));
      store_values(to + plane, _mm512_load_ps(d_ups[j]));
      store_values(to + 2 * plane, _mm512_load_ps(h));
    }
  }
  store_words<T>(gate_to, _mm512_load_ps(d_gates[0]), _mm512_load_ps(d_gates[1]));
  store_words<T>(up_to, _mm512_load_ps(d_ups[0]), _mm512_load_ps(d_ups[1]));
}

// A block of neurons of `d_gate` and `d_up`.
template <class T, Activation act>
void hidden_grad_block(const Backward<T>& b, const Chunk& c, int64_t block, const Scratch& scratch) {
  const FfnWeights& w = b.p.weights;
  const Neurons n = neurons_of_block(b.s, block);
  const Term term = term_of(n.memory ? w.memory_value : w.down, !n.memory, b.s.d, b.dy, 0);
  multiply_block<T>(&term, 1, n.first, n.count, c.tokens, scratch);
  for (int64_t panel = 0; panel < panels_of(c.tokens); ++panel) {
    const int width = panel_width(c.tokens, panel);
    for (int64_t i = 0; i < n.count; i += kPerWord<T>) {
      const int64_t word = b.s.first_word(n) + i / kPerWord<T>;
      uint32_t *gate_to = b.d_gate.at(panel, width, word), *up_to = b.d_up.at(panel, width, word);
      for (int t = 0; t < width; t += kVector)
        activate_word_backward<T, act>(b, n, i, c.begin + panel * kPanel, width, t, scratch.of(panel, width, i) + t,
                                       panel * kPanel + t, gate_to + t, up_to + t);
    }
  }
}

// A block of channels of dx.
template <class T>
void dx_block(const Backward<T>& b, const Chunk& c, int64_t block, const Scratch& scratch) {
  const FfnWeights& w = b.p.weights;
  const int64_t row = block * kBlock, rows = std::min<int64_t>(kBlock, b.s.d - row), memory = words_of<T>(b.s.m);
  const Term terms[] = {term_of(w.gate, true, b.s.m, b.d_gate, 0), term_of(w.up, true, b.s.m, b.d_up, 0),
                        term_of(w.memory_gate, true, b.s.r, b.d_gate, memory),
                        term_of(w.memory_key, true, b.s.r, b.d_up, memory)};
  multiply_block<T>(terms, 4, row, rows, c.tokens, scratch);
  store_tokens<T>(scratch, row, rows, nullptr, b.p.dx, c);
}

// 48 columns of the slots' gradient, which are added to: those of gate and key rows, with x, or those of value rows,
// with dy. Tokens are k, and `panel` holds the columns [words of the chunk's tokens][48].
template <class T>
void slots_grad_columns(const Backward<T>& b, const Chunk& c, int64_t column, bool values, uint32_t* panel,
                        const Scratch& scratch) {
  const int64_t columns = std::min<int64_t>(kPanel, b.s.d - column);
  const int width = panel_width(columns, 0);
  const Matrix& from = values ? b.p.dy : b.p.x;
  pack_columns<T>(from.at<const T>(c.begin, column), from.stride, c.tokens, columns, width, 0, panel);
  const int64_t first = values ? 2 * b.s.r : 0, last = values ? 3 * b.s.r : 2 * b.s.r;
  const Term term{b.rows, b.s.chunk, false, c.tokens, {panel, words_of<T>(c.tokens)}, 0};
  for (int64_t row = first; row < last; row += kBlock) {
    const int64_t count = std::min<int64_t>(kBlock, last - row);
    multiply_block<T>(&term, 1, row, count, columns, scratch);
    for (int64_t i = 0; i < count; ++i) {
      float* to = b.p.slots_grad.template at<float>(row + i, column);
      const float* sums = scratch.of(0, width, i);
#pragma omp simd
      for (int64_t j = 0; j < columns; ++j) to[j] += sums[j];
    }
  }
}

template <class T, Activation act>
void backward_typed(const CpuGluFfnBackwardParams& p) {
  const Backward<T> b(p);
  const bool needs_dx = p.dx.data != nullptr;
  const int64_t column_panels = panels_of(b.s.d);
#pragma omp parallel
  {
    float* more_sums;
    const Scratch scratch = thread_scratch(b.s.chunk, &more_sums);
    uint32_t* panel = reinterpret_cast<uint32_t*>(more_sums);
    for (int64_t begin = 0; begin < b.s.tokens; begin += b.s.chunk) {
      const Chunk c = chunk_at(b.s, begin);
      pack_tokens<T>(p.dy, c, b.dy);
#pragma omp for schedule(dynamic)
      for (int64_t block = needs_dx ? 0 : b.s.host_blocks(); block < b.s.neuron_blocks(); ++block)
        hidden_grad_block<T, act>(b, c, block, scratch);
      if (needs_dx) {
#pragma omp for schedule(dynamic) nowait
        for (int64_t block = 0; block < b.s.channel_blocks(); ++block) dx_block<T>(b, c, block, scratch);
      }
#pragma omp for schedule(dynamic)
      for (int64_t task = 0; task < 2 * column_panels; ++task)
        slots_grad_columns<T>(b, c, task % column_panels * kPanel, task >= column_panels, panel, scratch);
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
