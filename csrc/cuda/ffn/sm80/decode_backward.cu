// glu_ffn_backward as one kernel, for at most 16 tokens, by CTAs that are all resident and wait for each other.
//
//      CTA     64 neurons at a time:      sync_grid   the slots' gradients; 64 channels and a      sync_grid   dx, the sum
//              d_gate, d_up from dy                   range of K at a time: d_gate W_gate +                    of the ranges
//                                                     d_up W_up + memory
//      queue   W_down | W_down | ...                  W_gate | G | W_up | K | ...
//
// Both products run down the rows of the weights. A warp takes a panel of them at once, 32 rows (of K) x 64 columns,
// through a queue in shared memory, and ldmatrix turns it into the A operand of mma.sync; tokens are its 8 columns
// (decode.cuh). Wide panels, as each CTA reads all tokens for its columns, from the L2 cache.
//
//      row of a panel   0, 1    pieces 0 to 7 in place 0 ^ piece, 1 ^ piece      a piece: 8 columns, 16 bytes
//                       8, 9                           2 ^ piece, 3 ^ piece, ...
//
// The grid's barrier does not stop the queue. V, which lies the other way round, is not in it.
// The warps' sums, and the ranges, are added in their order: the result repeats bit for bit.
#include "cuda/ffn/sm80/decode.cuh"
#include "cuda/launch.cuh"
#include "cuda/ptx/copy_async.cuh"
#include "cuda/ptx/grid.cuh"
#include "cuda/ptx/warpgroup.cuh"

namespace locas::cuda::sm80 {
namespace {

// Bytes of weights that are on their way to a CTA.
#ifdef __CUDACC__
constexpr int kBytesAhead = 192 << 10;  // which GPUs of 8.0, 8.6 or 12.0 do not have
#else
constexpr int kBytesAhead = 128 << 10;  // small tests use each place several times
#endif

constexpr int kRows = 32, kColumns = 64;  // of a warp's panel of weights
constexpr int kGroups = kColumns / 16;    // fragments in it
constexpr int kRowPieces = kColumns / kPiece;
constexpr int kRowsEach = kRows * kRowPieces / 32;  // of which a lane copies a piece

// What a CTA does of a product, item by item: the columns from `col` on and some panels of K, of which its warps take
// one in turn.
struct Item {
  int col, first, last;
};

// A panel of K: which rows of which weights, and the columns of the tokens that they meet.
struct Panel {
  Matrix weights;
  int first, rows;  // of the weights
  Matrix tokens;
  int before, width;  // columns of the tokens in front of this source, and in it
};

struct HiddenGradItems {
  const GluFfnBackwardParams& p;
  LOCAS_DEVICE int count() const { return static_cast<int>(divide_up(p.weights.m(), kColumns)); }
  LOCAS_DEVICE int columns() const { return static_cast<int>(p.weights.m()); }
  LOCAS_DEVICE Item at(int index) const {
    return {index * kColumns, 0, static_cast<int>(divide_up(p.weights.d(), kRows))};
  }
  LOCAS_DEVICE Panel panel(int index) const {
    const int d = static_cast<int>(p.weights.d());
    return {p.weights.down, index * kRows, d, p.dy, 0, d};
  }
};

struct InputGradItems {
  const GluFfnBackwardParams& p;
  int splits;
  LOCAS_DEVICE int host() const { return static_cast<int>(divide_up(p.weights.m(), kRows)); }
  LOCAS_DEVICE int half() const { return host() + static_cast<int>(divide_up(p.weights.r(), kRows)); }
  LOCAS_DEVICE int count() const { return static_cast<int>(divide_up(p.weights.d(), kColumns)) * splits; }
  LOCAS_DEVICE int columns() const { return static_cast<int>(p.weights.d()); }
  LOCAS_DEVICE Item at(int index) const {
    const int split = index % splits;
    return {index / splits * kColumns, 2 * half() * split / splits, 2 * half() * (split + 1) / splits};
  }
  LOCAS_DEVICE Panel panel(int index) const {
    const FfnWeights& w = p.weights;
    const bool of_up = index >= half();
    const int within = of_up ? index - half() : index;
    const Matrix& tokens = of_up ? p.d_up : p.d_gate;
    const int m = static_cast<int>(w.m());
    if (within < host()) return {of_up ? w.up : w.gate, within * kRows, m, tokens, 0, m};
    return {of_up ? w.memory_key : w.memory_gate, (within - host()) * kRows, static_cast<int>(w.r()), tokens, m,
            static_cast<int>(w.padded_r())};
  }
};

// A warp's panels of all that its CTA does, kDepth steps ahead of their use.
template <class T, int kWarps>
class PanelQueue {
 public:
  static constexpr int kDepth = kBytesAhead / static_cast<int>(kWarps * kRows * kRowPieces * sizeof(Vec16));
  struct Shared {
    Vec16 panels[kDepth][kWarps][kRows * kRowPieces];
  };

  LOCAS_DEVICE PanelQueue(Shared& shared, const HiddenGradItems& first, const InputGradItems& second)
      : shared_(shared), first_(first), second_(second), item_(ptx::block_index()) {
    begin_item();
#pragma unroll 1
    for (int i = 0; i < kDepth; ++i) copy_next();
  }

  // use(half, columns) for 16 rows of the next panel and then 16 others: the A operands of its kGroups times 16 columns.
  template <class Use>
  LOCAS_DEVICE void take(Use&& use) {
    ptx::cp_async_wait<kDepth - 1>();
    ptx::sync_warp();
    const int matrix = ptx::lane_index() / 8, row = ptx::lane_index() % 8;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t columns[kGroups][4];
#pragma unroll
      for (int group = 0; group < kGroups; ++group)
        ptx::ldmatrix_x4_trans(
            columns[group],
            &panel()[place_of(row / 2 * 8 + row % 2 + matrix / 2 * 2 + half * 4, group * 2 + matrix % 2)]);
      use(half, columns);
    }
    ptx::sync_warp();
    copy_next();  // into the place that has just been read
  }

 private:
  LOCAS_DEVICE Vec16* panel() { return shared_.panels[place_][ptx::warp_index()]; }

  // Of a row's pieces, so that the rows of a matrix that ldmatrix reads lie in different banks.
  static LOCAS_DEVICE int place_of(int row, int piece) { return row * kRowPieces + (piece ^ (row % 2 + row / 8 * 2)); }

  // Copies the next panel and advances. Behind the last one there are empty groups, so that the wait counts right.
  LOCAS_DEVICE void copy_next() {
    if (item_ < count()) {
      const Panel from = in_second_ ? second_.panel(step_) : first_.panel(step_);
      const int piece = ptx::lane_index() % kRowPieces;
      const int col = at_.col + piece * kPiece, columns = in_second_ ? second_.columns() : first_.columns();
      const int first_row = ptx::lane_index() / kRowPieces * kRowsEach;
      const int64_t stride = from.weights.stride;
      const T* source = static_cast<const T*>(from.weights.data) + (from.first + first_row) * stride + col;
#pragma unroll
      for (int i = 0; i < kRowsEach; ++i, source += stride)
        ptx::cp_async_16(&panel()[place_of(first_row + i, piece)], source,
                         from.first + first_row + i < from.rows && col < columns);
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

  // The next item from item_ on that has a panel for this warp, of the second product when the first has none.
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
  static constexpr int threads = 512, min_blocks = 1, kWarps = threads / 32;
  using Panels = PanelQueue<T, kWarps>;
  using Sums = sm80::Sums<kTokenBlocks, kGroups>;
  struct Shared {
    typename Panels::Shared queue;
    union {
      WarpSums<1, kGroups, kWarps> sums;
      WarpSums<1, 1, kWarps> memory_sums;
    };
  };

  static LOCAS_DEVICE void run(const Params& p, unsigned char* dynamic) {
    Shared& shared = *reinterpret_cast<Shared*>(dynamic);
    const HiddenGradItems hidden{p.ffn};
    const InputGradItems input{p.ffn, p.splits};
    Panels panels(shared.queue, hidden, input);
    const int block = ptx::block_index(), blocks = ptx::block_count();
    // From the last CTA on, which has least of the host.
    for (int slot = (blocks - 1 - block) * 16; slot < p.ffn.weights.padded_r(); slot += blocks * 16)
      memory_hidden_grad(p.ffn, shared.memory_sums, slot);
    for (int item = block; item < hidden.count(); item += blocks) {
      Sums sums;
      add(panels, hidden, hidden.at(item), sums);
      finish_hidden_grad(p.ffn, shared.sums, sums, item * kColumns, hidden.columns());
    }
    ptx::sync_grid();
    if (p.ffn.slots_grad.data) add_slots_grad(p.ffn);  // while weights arrive
    for (int item = block; item < input.count(); item += blocks) {
      Sums sums;
      add(panels, input, input.at(item), sums);
      finish_input_grad(p, shared.sums, sums, input.at(item).col, item % p.splits);
    }
    if (p.splits == 1) return;
    ptx::sync_grid();
    add_ranges(p);
  }

 private:
  template <class Items>
  static LOCAS_DEVICE void add(Panels& panels, const Items& items, const Item& at, Sums& sums) {
#pragma unroll 1
    for (int step = at.first + ptx::warp_index(); step < at.last; step += kWarps) {
      const Panel panel = items.panel(step);
      Matrix from = panel.tokens;
      from.data = static_cast<T*>(from.data) + panel.before;
      const TokenRows<T> tokens(from, items.p.tokens(), panel.width);
      Vec16 pieces[kTokenBlocks];  // under way while the panel is taken
      tokens.template at<kTokenBlocks>(panel.first + lane_offset(),
                                       [&](int block, const Vec16& piece) { pieces[block] = piece; });
      panels.take([&](int half, const uint32_t (&columns)[kGroups][4]) {
#pragma unroll
        for (int block = 0; block < kTokenBlocks; ++block)
#pragma unroll
          for (int group = 0; group < kGroups; ++group)
            ptx::mma_m16n8k16<T>(sums.at[block][group], columns[group], pieces[block].word[2 * half],
                                 pieces[block].word[2 * half + 1]);
      });
    }
  }

  // dy V^T, which runs along the rows of V, for 16 slots.
  static LOCAS_DEVICE void memory_hidden_grad(const GluFfnBackwardParams& p, WarpSums<1, 1, kWarps>& shared, int slot) {
    const FfnWeights& w = p.weights;
    const T* values[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t row = slot + i * kStrip + ptx::lane_index() / 4;
      values[i] = row < w.r() ? static_cast<const T*>(w.memory_value.data) + row * w.memory_value.stride : nullptr;
    }
    int k = ptx::warp_index() * kStep + lane_offset();
    sm80::Sums<kTokenBlocks, 1> sums;
    add_steps<T, kWarps * kStep>(sums, TokenRows<T>(p.dy, p.tokens(), w.d()), [&](Vec16(&rows)[2]) {
#pragma unroll
      for (int i = 0; i < 2; ++i)
        rows[i] = values[i] && k < w.d() ? ptx::load(reinterpret_cast<const Vec16*>(values[i] + k)) : zeros();
      k += kWarps * kStep;
    });
    const int m = static_cast<int>(w.m());
    finish_hidden_grad(p, shared, sums, m + slot, m + static_cast<int>(w.padded_r()));
  }

  // From the warps' sums to the gradients of the pre-activations of a neuron, of the host or of the memory, and a token.
  template <int kOfGroups>
  static LOCAS_DEVICE void finish_hidden_grad(const GluFfnBackwardParams& p, WarpSums<1, kOfGroups, kWarps>& shared,
                                              const sm80::Sums<kTokenBlocks, kOfGroups>& sums, int first, int end) {
    const int m = static_cast<int>(p.weights.m());
    const bool memory = first >= m;
    const float scale = memory ? p.scale : 1.0f;
    const auto at = [&](const Matrix& matrix, const Place& place) {
      return static_cast<T*>(matrix.data) + place.token * matrix.stride + first + place.row;
    };
    const auto exists = [&](const Place& place) { return place.token < p.tokens() && first + place.row < end; };
    constexpr int kNeurons = 16 * kOfGroups, kTurns = WarpSums<1, kOfGroups, kWarps>::turns(kNeurons);
    T gate[kTokenBlocks * kTurns], up[kTokenBlocks * kTurns];  // under way while the sums meet
#pragma unroll
    for (int i = 0; i < kTokenBlocks * kTurns; ++i) {
      const Place place = shared.template place<kNeurons>(i);
      if (!exists(place)) continue;
      gate[i] = ptx::load(at(p.gate, place));
      up[i] = ptx::load(at(p.up, place));
    }
    with_activation(p.activation, [&]<Activation act>() {
      shared.template finish<kNeurons>(sums, [&](int i, const Place& place) {
        if (!exists(place)) return;
        const float d = scale * shared.total(place.row / 16, place.row % 16, place.token, 0.0f);
        const ValueAndSlope a = activate<act>(ptx::to_float(gate[i]));
        ptx::store(at(p.d_gate, place), ptx::from_float<T>(d * ptx::to_float(up[i]) * a.slope));
        ptx::store(at(p.d_up, place), ptx::from_float<T>(d * a.value));
        if (memory)
          ptx::store(at(p.memory_hidden, place) - m, ptx::from_float<T>(scale * a.value * ptx::to_float(up[i])));
      });
    });
  }

  // [d_gate | d_up]^T x and memory_hidden^T dy, added to what is there: a thread takes 8 channels of a slot. A CTA's
  // threads share their tokens' few channels and all slots.
  static LOCAS_DEVICE void add_slots_grad(const GluFfnBackwardParams& p) {
    const int r = static_cast<int>(p.weights.r()), m = static_cast<int>(p.weights.m());
    const int64_t d = p.weights.d(), parts = divide_up(d, kColumns);
    for (int64_t i = static_cast<int64_t>(ptx::block_index()) * threads + ptx::thread_index();
         i < 3 * parts * r * kRowPieces; i += static_cast<int64_t>(ptx::block_count()) * threads) {
      const int slot = static_cast<int>(i / kRowPieces % r), part = static_cast<int>(i / (kRowPieces * r));
      const int kind = static_cast<int>(part / parts);  // 0 gate, 1 key, 2 value
      const int64_t channel = part % parts * kColumns + i % kRowPieces * kPiece;
      if (channel >= d) continue;
      const Matrix& factors = kind == 0 ? p.d_gate : kind == 1 ? p.d_up : p.memory_hidden;
      const Matrix& rows = kind == 2 ? p.dy : p.x;
      const T* factor = static_cast<const T*>(factors.data) + (kind == 2 ? slot : m + slot);
      const T* row = static_cast<const T*>(rows.data) + channel;
      float* gradient = static_cast<float*>(p.slots_grad.data) + (static_cast<int64_t>(kind) * r + slot) * d + channel;
      float before[kPiece], sum[kPiece] = {};
      load_piece(gradient, before);
#pragma unroll 8
      for (int token = 0; token < p.tokens(); ++token, factor += factors.stride, row += rows.stride) {
        const float by = ptx::to_float(ptx::load(factor));
        float values[kPiece];
        load_piece(row, values);
#pragma unroll
        for (int j = 0; j < kPiece; ++j) sum[j] += by * values[j];
      }
#pragma unroll
      for (int j = 0; j < kPiece; ++j) sum[j] += before[j];
      store_piece(sum, gradient);
    }
  }

  static LOCAS_DEVICE void finish_input_grad(const Params& p, WarpSums<1, kGroups, kWarps>& shared, const Sums& sums,
                                             int first, int split) {
    const int64_t d = p.ffn.weights.d();
    shared.template finish<kColumns>(sums, [&](int, const Place& place) {
      const int token = place.token, channel = first + place.row;
      if (token >= p.ffn.tokens() || channel >= d) return;
      const float sum = shared.total(place.row / 16, place.row % 16, token, 0.0f);
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

// False, and nothing is launched, where the device does not hold a block on every multiprocessor at once.
template <class Kernel>
bool launch_resident(const typename Kernel::Params& p, Queue queue) {
  constexpr size_t kSharedBytes = sizeof(typename Kernel::Shared);
  const int blocks = multiprocessor_count(queue);
  if (resident_blocks<Kernel>(kSharedBytes, queue) < blocks) return false;
  launch<Kernel>(blocks, kSharedBytes, queue, p, {.cooperative = true});
  return true;
}

}  // namespace

bool glu_ffn_backward_decode_cooperative(const GluFfnBackwardParams& p, Queue queue) {
  const DecodeBackwardParams params{p, decode_input_splits(p.weights.d())};
  return with_half_type(p.dtype, [&]<class T>() {
    if (p.tokens() <= 8) return launch_resident<GluFfnDecodeBackward<T, 1>>(params, queue);
    return launch_resident<GluFfnDecodeBackward<T, 2>>(params, queue);
  });
}

}  // namespace locas::cuda::sm80
