// glu_ffn_forward as one kernel (D): what D1 and D2 do (decode.cuh) for at most 8 tokens, by CTAs that are all resident and
// wait for each other between the two products. More tokens, which each CTA reads whole, cost it more than the second
// launch does.
//
//      CTA     its share of the neurons, 8 at a time     sync_grid     its share of the channels, 16 at a time
//      queue   gate, up | gate, up | ...            W_down | W_down | ...
//
// The weights of both products are one stream through a queue in shared memory: behind those of the first product come
// those of the second, which keep the memory busy while the CTAs wait for `hidden`. Nothing but weights is in it.
#include "cuda/ffn/sm80/decode.cuh"
#include "cuda/ptx/grid.cuh"

namespace locas::cuda::sm80 {
namespace {

constexpr int kWarps = kResidentThreads / 32, kStride = kWarps * kStep;
constexpr int kTokenBlocks = 1, kGroups = 1;

// The rows of a matrix that a CTA takes, in whole strips.
struct Range {
  int first, end;
};
LOCAS_DEVICE Range share_of(int64_t rows) {
  const int64_t strips = rows / kStrip, block = ptx::block_index(), blocks = ptx::block_count();
  return {static_cast<int>(strips * block / blocks) * kStrip, static_cast<int>(strips * (block + 1) / blocks) * kStrip};
}

// A lane's weights of all that its CTA does.
template <class T>
class WeightQueue {
 public:
  static constexpr int kRows = 2 * kGroups, kDepth = kResidentPieces / kRows;
  using Queue = PieceQueue<T, kRows, kDepth, kResidentThreads>;
  using Shared = typename Queue::Shared;

  LOCAS_DEVICE WeightQueue(Shared& shared, const FfnWeights& w, const Range& neurons, const Range& channels)
      : queue_(shared), w_(w), at_(neurons), channels_(channels) {
    begin_pass();
#pragma unroll 1
    for (int i = 0; i < kDepth; ++i) copy_next();
  }

  // The weights of the next step.
  LOCAS_DEVICE void take(Vec16 (&pieces)[kRows]) {
    queue_.take(pieces);
    copy_next();
  }

 private:
  // Copies the next step, if there is one.
  LOCAS_DEVICE void copy_next() {
    if (at_.first < at_.end) {
      queue_.copy(rows_, k_, k_ < width());
      k_ += kStride;
      if (k_ - lane_offset() >= width()) {
        at_.first += (down_ ? 2 : 1) * kGroups * kStrip;
        begin_pass();
      }
    }
    queue_.advance();
  }

  LOCAS_DEVICE int width() const { return static_cast<int>(down_ ? w_.m() : w_.d()); }

  // The first step of the rows from at_.first on; of the second product where the first has none left for this warp.
  LOCAS_DEVICE void begin_pass() {
    k_ = ptx::warp_index() * kStep + lane_offset();
    const bool empty = at_.first >= at_.end || ptx::warp_index() * kStep >= width();
    if (empty && !down_) {
      down_ = true;
      at_ = channels_;
    }
    if (ptx::warp_index() * kStep >= width()) at_.first = at_.end;
    if (down_) rows_of_down<T, kGroups>(w_, at_.first, at_.end, rows_);
    else rows_of_hidden<T, kGroups>(w_, at_.first, at_.end, rows_);
  }

  Queue queue_;
  const FfnWeights& w_;
  Range at_, channels_;  // what is left of the product that is copied; all of the second one
  bool down_ = false;
  const T* rows_[kRows];  // null: zeros
  int k_;
};

template <class T_>
struct GluFfnDecode {
  using T = T_;
  using Params = GluFfnForwardParams;
  static constexpr const char* name = "glu_ffn_decode";
  static constexpr int threads = kResidentThreads, min_blocks = 1;
  using Weights = WeightQueue<T>;
  struct Shared {
    typename Weights::Shared queue;
    WarpSums<kGroups, kWarps> sums;
  };

  static LOCAS_DEVICE void run(const Params& p, unsigned char* dynamic) {
    Shared& shared = *reinterpret_cast<Shared*>(dynamic);
    const FfnWeights& w = p.weights;
    const Range neurons = share_of(w.m() + w.padded_r()), channels = share_of(w.d());
    Weights weights(shared.queue, w, neurons, channels);
    const auto take = [&](Vec16(&pieces)[Weights::kRows]) { weights.take(pieces); };

    const TokenRows<T> x(p.x, p.tokens(), w.d());
    for (int first = neurons.first; first < neurons.end; first += kGroups * kStrip) {
      Sums<kTokenBlocks, kGroups> sums;
      add_steps<T, kStride>(sums, x, take);
      finish_hidden<T>(p, shared.sums, sums, first, neurons.end);
    }
    MemoryValues<T, kGroups, kWarps> values;
    values.load(w, channels.first, channels.end);
    ptx::sync_grid();

    const TokenRows<T> hidden(p.hidden, p.tokens(), w.m());
    for (int first = channels.first; first < channels.end;) {
      Sums<kTokenBlocks, kGroups> sums;
      add_steps<T, kStride>(sums, hidden, take);
      values.add_to(sums, p, first, channels.end);
      finish_down<T>(p, shared.sums, sums, first, channels.end);
      first += 2 * kGroups * kStrip;
      values.load(w, first, channels.end);
    }
  }
};

}  // namespace

bool glu_ffn_forward_decode_cooperative(const GluFfnForwardParams& p, Queue queue) {
  return with_half_type(p.dtype, [&]<class T>() { return launch_resident<GluFfnDecode<T>>(p, queue); });
}

}  // namespace locas::cuda::sm80
