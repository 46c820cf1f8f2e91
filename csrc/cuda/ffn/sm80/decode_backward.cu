// glu_ffn_backward to x as one kernel, for at most 32 tokens, by CTAs that are all resident and wait for each other.
//
//      CTA     32 neurons at a time:      sync_grid   32 channels and a range of K at a time:    sync_grid   dx, the sum
//              d_gate, d_up from dy                   d_gate W_gate + d_up W_up + memory                     of the ranges
//      queue   W_down | W_down | ...                  W_gate | G | W_up | K | ...
//
// Both products run down the rows of the weights. A warp takes a square of them at once, 32 rows (of K) x 32 columns,
// through a queue in shared memory, and ldmatrix turns it into the A operand of mma.sync; tokens are its 8 columns
// (decode.cuh).
//
//      square   rows  0 to  7   pieces 0 1 2 3       rows 16 to 23   pieces 2 3 0 1       a piece: 8 columns, 16 bytes
//               rows  8 to 15   pieces 1 0 3 2       rows 24 to 31   pieces 3 2 1 0
//
// As in the forward the grid's barrier does not stop the queue. V, which lies the other way round, is not in it.
// The warps' sums, and the ranges, are added in their order: the result repeats bit for bit.
#include "cuda/ffn/sm80/decode.cuh"
#include "cuda/ptx/copy_async.cuh"
#include "cuda/ptx/grid.cuh"
#include "cuda/ptx/warpgroup.cuh"

namespace locas::cuda::sm80 {
namespace {

constexpr int kWarps = kResidentThreads / 32;
constexpr int kSide = 32;   // of a warp's square of weights
constexpr int kGroups = 2;  // fragments of 16 columns in it
constexpr int kLanePieces = kSide * kSide / 32 / kPiece;

// What a CTA does of a product, item by item: the columns from `col` on and some squares of K, of which its warps take
// one in turn.
struct Item {
  int col, first, last;
};

// A square of K: which rows of which weights, and the columns of the tokens that they meet.
struct Square {
  Matrix weights;
  int first, rows;  // of the weights
  Matrix tokens;
  int before, width;  // columns of the tokens in front of this source, and in it
};

struct HiddenGradItems {
  const GluFfnBackwardParams& p;
  LOCAS_DEVICE int count() const { return static_cast<int>(divide_up(p.weights.m(), kSide)); }
  LOCAS_DEVICE int columns() const { return static_cast<int>(p.weights.m()); }
  LOCAS_DEVICE Item at(int index) const {
    return {index * kSide, 0, static_cast<int>(divide_up(p.weights.d(), kSide))};
  }
  LOCAS_DEVICE Square square(int index) const {
    const int d = static_cast<int>(p.weights.d());
    return {p.weights.down, index * kSide, d, p.dy, 0, d};
  }
};

struct InputGradItems {
  const GluFfnBackwardParams& p;
  int splits;
  LOCAS_DEVICE int host() const { return static_cast<int>(divide_up(p.weights.m(), kSide)); }
  LOCAS_DEVICE int half() const { return host() + static_cast<int>(divide_up(p.weights.r(), kSide)); }
  LOCAS_DEVICE int count() const { return static_cast<int>(divide_up(p.weights.d(), kSide)) * splits; }
  LOCAS_DEVICE int columns() const { return static_cast<int>(p.weights.d()); }
  LOCAS_DEVICE Item at(int index) const {
    const int split = index % splits;
    return {index / splits * kSide, 2 * half() * split / splits, 2 * half() * (split + 1) / splits};
  }
  LOCAS_DEVICE Square square(int index) const {
    const FfnWeights& w = p.weights;
    const bool of_up = index >= half();
    const int within = of_up ? index - half() : index;
    const Matrix& tokens = of_up ? p.d_up : p.d_gate;
    const int m = static_cast<int>(w.m());
    if (within < host()) return {of_up ? w.up : w.gate, within * kSide, m, tokens, 0, m};
    return {of_up ? w.memory_key : w.memory_gate, (within - host()) * kSide, static_cast<int>(w.r()), tokens, m,
            static_cast<int>(w.padded_r())};
  }
};

// A warp's squares of all that its CTA does, kDepth steps ahead of their use.
template <class T>
class SquareQueue {
 public:
  static constexpr int kDepth = kResidentPieces / kLanePieces;
  struct Shared {
    Vec16 squares[kDepth][kWarps][kSide * kSide / kPiece];
  };

  LOCAS_DEVICE SquareQueue(Shared& shared, const HiddenGradItems& first, const InputGradItems& second)
      : shared_(shared), first_(first), second_(second), item_(ptx::block_index()) {
    begin_item();
#pragma unroll 1
    for (int i = 0; i < kDepth; ++i) copy_next();
  }

  // The A operands of the next square: of its kGroups times 16 columns for two times 16 rows.
  LOCAS_DEVICE void take(uint32_t (&columns)[2][kGroups][4]) {
    ptx::cp_async_wait<kDepth - 1>();
    ptx::sync_warp();
    const int matrix = ptx::lane_index() / 8, row = ptx::lane_index() % 8;
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int group = 0; group < kGroups; ++group)
        ptx::ldmatrix_x4_trans(
            columns[half][group],
            &square()[place_of(row / 2 * 8 + row % 2 + matrix / 2 * 2 + half * 4, group * 2 + matrix % 2)]);
    ptx::sync_warp();
    copy_next();  // into the place that has just been read
  }

 private:
  LOCAS_DEVICE Vec16* square() { return shared_.squares[place_][ptx::warp_index()]; }

  // Of a row's pieces, so that the rows of a matrix that ldmatrix reads lie in different banks.
  static LOCAS_DEVICE int place_of(int row, int piece) { return row * 4 + (piece ^ row / 8); }

  // Copies the next square and advances. Behind the last one there are empty groups, so that the wait counts right.
  LOCAS_DEVICE void copy_next() {
    if (item_ < count()) {
      const Square from = in_second_ ? second_.square(step_) : first_.square(step_);
      const int col = at_.col + lane_offset(), columns = in_second_ ? second_.columns() : first_.columns();
#pragma unroll
      for (int i = 0; i < kLanePieces; ++i) {
        const int row = i * 8 + ptx::lane_index() / 4;
        const bool valid = from.first + row < from.rows && col < columns;
        const T* source = static_cast<const T*>(from.weights.data) + (from.first + row) * from.weights.stride + col;
        ptx::cp_async_16(&square()[place_of(row, ptx::lane_index() % 4)], source, valid);
      }
      step_ += kWarps;
      if (step_ >= at_.last) {
        item_ += ptx::block_count();
        begin_item();
      }
    }
    ptx::cp_async_commit();
    place_ = place_ + 1 == kDepth ? 0 : place_ + 1;
  }

  LOCAS_DEVICE int count() const { return in_second_ ? second_.count() : first_.count(); }

  // The next item from item_ on that has a square for this warp, of the second product when the first has none.
  LOCAS_DEVICE void begin_item() {
    for (;; item_ += ptx::block_count()) {
      if (item_ >= count()) {
        if (in_second_) return;
        in_second_ = true;
        item_ = ptx::block_index();
        if (item_ >= count()) return;
      }
      at_ = in_second_ ? second_.at(item_) : first_.at(item_);
      step_ = at_.first + ptx::warp_index();
      if (step_ < at_.last) return;
    }
  }

  Shared& shared_;
  const HiddenGradItems first_;
  const InputGradItems second_;
  bool in_second_ = false;
  int item_, step_ = 0, place_ = 0;
  Item at_;
};

struct DecodeBackwardParams {
  GluFfnBackwardParams ffn;
  int splits;  // ranges of the second product's K
};

template <class T_, int kTokenBlocks>
struct GluFfnDecodeBackward {
  using T = T_;
  using Params = DecodeBackwardParams;
  static constexpr const char* name = "glu_ffn_decode_backward";
  static constexpr int threads = kResidentThreads, min_blocks = 1;
  using Squares = SquareQueue<T>;
  using Sums = sm80::Sums<kTokenBlocks, kGroups>;
  struct Shared {
    typename Squares::Shared queue;
    WarpSums<kGroups, kWarps> sums;
  };

  static LOCAS_DEVICE void run(const Params& p, unsigned char* dynamic) {
    Shared& shared = *reinterpret_cast<Shared*>(dynamic);
    const HiddenGradItems hidden{p.ffn};
    const InputGradItems input{p.ffn, p.splits};
    Squares squares(shared.queue, hidden, input);
    const int block = ptx::block_index(), blocks = ptx::block_count();
    // From the last CTA on, which has least of the host.
    for (int slot = (blocks - 1 - block) * kSide; slot < p.ffn.weights.padded_r(); slot += blocks * kSide)
      memory_hidden_grad(p.ffn, shared.sums, slot);
    for (int item = block; item < hidden.count(); item += blocks) {
      Sums sums;
      add(squares, hidden, hidden.at(item), sums);
      finish_hidden_grad(p.ffn, shared.sums, sums, item * kSide, hidden.columns());
    }
    ptx::sync_grid();
    for (int item = block; item < input.count(); item += blocks) {
      Sums sums;
      add(squares, input, input.at(item), sums);
      finish_input_grad(p, shared.sums, sums, input.at(item).col, item % p.splits);
    }
    if (p.splits == 1) return;
    ptx::sync_grid();
    add_ranges(p);
  }

 private:
  template <class Items>
  static LOCAS_DEVICE void add(Squares& squares, const Items& items, const Item& at, Sums& sums) {
#pragma unroll 1
    for (int step = at.first + ptx::warp_index(); step < at.last; step += kWarps) {
      const Square square = items.square(step);
      Matrix from = square.tokens;
      from.data = static_cast<T*>(from.data) + square.before;
      const TokenRows<T> tokens(from, items.p.tokens(), square.width);
      Vec16 pieces[kTokenBlocks];  // under way while the square is taken
      tokens.template at<kTokenBlocks>(square.first + lane_offset(),
                                       [&](int block, const Vec16& piece) { pieces[block] = piece; });
      uint32_t columns[2][kGroups][4];
      squares.take(columns);
#pragma unroll
      for (int block = 0; block < kTokenBlocks; ++block)
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
          for (int group = 0; group < kGroups; ++group)
            ptx::mma_m16n8k16<T>(sums.at[block][group], columns[half][group], pieces[block].word[2 * half],
                                 pieces[block].word[2 * half + 1]);
    }
  }

  // dy V^T, which runs along the rows of V, for 32 slots.
  static LOCAS_DEVICE void memory_hidden_grad(const GluFfnBackwardParams& p, WarpSums<kGroups, kWarps>& shared,
                                              int slot) {
    const FfnWeights& w = p.weights;
    const TokenRows<T> dy(p.dy, p.tokens(), w.d());
    Sums sums;
#pragma unroll 1
    for (int k = ptx::warp_index() * kStep + lane_offset(); k - lane_offset() < w.d(); k += kWarps * kStep) {
      Vec16 rows[2 * kGroups];
#pragma unroll
      for (int i = 0; i < 2 * kGroups; ++i) {
        const int64_t row = slot + i * kStrip + ptx::lane_index() / 4;
        rows[i] = row < w.r() && k < w.d()
                      ? ptx::load(reinterpret_cast<const Vec16*>(static_cast<const T*>(w.memory_value.data) +
                                                                 row * w.memory_value.stride + k))
                      : zeros();
      }
      dy.template at<kTokenBlocks>(k, [&](int block, const Vec16& token) { sums.template add<T>(block, rows, token); });
    }
    const int m = static_cast<int>(w.m());
    finish_hidden_grad(p, shared, sums, m + slot, m + static_cast<int>(w.padded_r()));
  }

  // From the warps' sums to the gradients of the pre-activations of a neuron, of the host or of the memory, and a token.
  static LOCAS_DEVICE void finish_hidden_grad(const GluFfnBackwardParams& p, WarpSums<kGroups, kWarps>& shared,
                                              const Sums& sums, int first, int end) {
    const int m = static_cast<int>(p.weights.m());
    const bool memory = first >= m;
    const float scale = memory ? p.scale : 1.0f;
    with_activation(p.activation, [&]<Activation act>() {
      shared.finish(sums, kSide, [&](int token, int within) {
        const int neuron = first + within;
        if (token >= p.tokens() || neuron >= end) return;
        const auto at = [&](const Matrix& matrix) {
          return static_cast<T*>(matrix.data) + token * matrix.stride + neuron;
        };
        const float d = scale * shared.total(within / 16, within % 16, token, 0.0f);
        const float up = ptx::to_float(ptx::load(at(p.up)));
        const ValueAndSlope a = activate<act>(ptx::to_float(ptx::load(at(p.gate))));
        ptx::store(at(p.d_gate), ptx::from_float<T>(d * up * a.slope));
        ptx::store(at(p.d_up), ptx::from_float<T>(d * a.value));
        if (memory)
          ptx::store(static_cast<T*>(p.memory_hidden.data) + token * p.memory_hidden.stride + neuron - m,
                     ptx::from_float<T>(scale * a.value * up));
      });
    });
  }

  static LOCAS_DEVICE void finish_input_grad(const Params& p, WarpSums<kGroups, kWarps>& shared, const Sums& sums,
                                             int first, int split) {
    const int64_t d = p.ffn.weights.d();
    shared.finish(sums, kSide, [&](int token, int within) {
      const int channel = first + within;
      if (token >= p.ffn.tokens() || channel >= d) return;
      const float sum = shared.total(within / 16, within % 16, token, 0.0f);
      if (p.splits > 1) ptx::store(p.ffn.workspace + (split * p.ffn.tokens() + token) * d + channel, sum);
      else ptx::store(static_cast<T*>(p.ffn.dx.data) + token * p.ffn.dx.stride + channel, ptx::from_float<T>(sum));
    });
  }

  static LOCAS_DEVICE void add_ranges(const Params& p) {
    const int64_t d = p.ffn.weights.d(), size = p.ffn.tokens() * d;
    for (int64_t i = static_cast<int64_t>(ptx::block_index()) * threads + ptx::thread_index(); i < size;
         i += static_cast<int64_t>(ptx::block_count()) * threads) {
      float sum = 0.0f;
      for (int split = 0; split < p.splits; ++split) sum += ptx::load(p.ffn.workspace + split * size + i);
      ptx::store(static_cast<T*>(p.ffn.dx.data) + i / d * p.ffn.dx.stride + i % d, ptx::from_float<T>(sum));
    }
  }
};

}  // namespace

bool glu_ffn_input_grad_decode_cooperative(const GluFfnBackwardParams& p, Queue queue) {
  const DecodeBackwardParams params{p, decode_input_splits(p.weights.d())};
  return with_half_type(p.dtype, [&]<class T>() {
    if (p.tokens() <= 8) return launch_resident<GluFfnDecodeBackward<T, 1>>(params, queue);
    if (p.tokens() <= 16) return launch_resident<GluFfnDecodeBackward<T, 2>>(params, queue);
    return launch_resident<GluFfnDecodeBackward<T, 4>>(params, queue);
  });
}

}  // namespace locas::cuda::sm80
