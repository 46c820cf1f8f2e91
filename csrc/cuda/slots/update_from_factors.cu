// adamw_slots_from_factors and sgd_slots_from_factors: the per-token update. The slots' gradient is formed row by row
// in registers and used on the spot, so that no gradient buffer is written, read or cleared. For at most 64 tokens; one
// launch after the backward, over all layers.
//
//      row (layer, kind, slot)      gradient = sum over tokens of coefficient[token] * source[token, :]
//                                   gate, key: d_gate, d_key with x;   value: hidden with dy
//
//      a CTA owns kSlots neighbouring slots of one kind, whole rows: one load of a source row serves them all
//
//           source [tokens, d]    thread t reads columns 4 (t + 256 k), k < kVectors, token after token
//           rows   [kSlots][d]    gradient, then the new row: 4 kVectors floats a thread and slot, in registers
//
// The tokens and the norm are added up in a fixed order: the result repeats bit for bit.
#include "cuda/common/elements.cuh"
#include "cuda/launch.cuh"
#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/convert.cuh"
#include "cuda/ptx/memory.cuh"
#include "cuda/ptx/shuffle.cuh"
#include "cuda/ptx/thread.cuh"
#include "cuda/slots/update_rules.cuh"

namespace locas::cuda {
namespace {

// LayerFactors without what every matrix repeats: kernel parameters end at 4 KB, and 32 layers of 5 `Matrix` take 6.
struct KernelFactors {
  struct Rows {
    const void* data;  // [tokens, r] or [tokens, d]
    int64_t stride;
  };
  struct Layer {
    Rows d_gate, d_key, hidden;  // [tokens, r]
    Rows x, dy;                  // [tokens, d]
  };
  Layer layers[kMostFactorLayers];
  int count;
  int64_t tokens, r;
  float scale;

  explicit KernelFactors(const LayerFactors& f) : count(f.count), tokens(f.tokens()), r(f.r()), scale(f.scale) {
    const auto rows = [](const Matrix& m) { return Rows{m.data, m.stride}; };
    for (int i = 0; i < count; ++i) {
      const SlotFactors& layer = f.layers[i];
      layers[i] = {rows(layer.d_gate), rows(layer.d_key), rows(layer.hidden), rows(layer.x), rows(layer.dy)};
    }
  }
};

template <class T_, class Rule, int kVectors>
struct UpdateSlotsFromFactors {
  using T = T_;
  struct Params {
    typename Rule::Params update;
    KernelFactors factors;
  };
  static_assert(sizeof(Params) <= 4096, "kernel parameters before CUDA 12.1");
  static constexpr const char* name = Rule::names.from_factors;
  static constexpr int threads = 256, min_blocks = 1;
  static constexpr int kWarps = threads / 32, kSlots = kVectors <= 4 ? 4 : 2;
  struct Shared {
    float coefficients[kMostFactorTokens][kSlots];
    float warp_sums[kSlots][kWarps];
  };

  static int64_t blocks(const KernelFactors& factors) { return factors.count * 3 * divide_up(factors.r, kSlots); }

  static LOCAS_DEVICE void run(const Params& p, unsigned char* dynamic) {
    Shared& shared = *reinterpret_cast<Shared*>(dynamic);
    const auto& update = p.update;
    if (update.finite.data && read(update.finite) == 0.0) return;
    const int groups = static_cast<int>(divide_up(p.factors.r, kSlots)), index = ptx::block_index();
    const int layer = index / (3 * groups), kind = index / groups % 3, first_slot = index % groups * kSlots;
    const int slots = p.factors.r - first_slot < kSlots ? static_cast<int>(p.factors.r) - first_slot : kSlots;
    const int64_t first = ((layer * 3 + kind) * p.factors.r + first_slot) * update.slots.cols;  // of the arena
    const KernelFactors::Layer& factors = p.factors.layers[layer];

    Float4 rows[kSlots][kVectors] = {};
    add_products(p, shared,
                 kind == 0   ? factors.d_gate
                 : kind == 1 ? factors.d_key
                             : factors.hidden,
                 kind == 2 ? factors.dy : factors.x, first_slot, slots, rows);

    float sums_of_squares[kSlots] = {};
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      if (slot >= slots) continue;
      const Rule rule(update, first + slot * update.slots.cols);
#pragma unroll
      for (int k = 0; k < kVectors; ++k) {
        const int64_t i = column(k);
        if (i >= update.slots.cols) continue;
        Float4& row = rows[slot][k];
#pragma unroll
        for (int j = 0; j < 4; ++j) row.at[j] *= p.factors.scale;
        row = rule.step(i, load4(static_cast<float*>(update.slots.data) + first + slot * update.slots.cols + i), row,
                        rule.load(i));
#pragma unroll
        for (int j = 0; j < 4; ++j) sums_of_squares[slot] += row.at[j] * row.at[j];
      }
    }
    if (update.clip) clip(shared, sums_of_squares, rows);
    T* copy = static_cast<T*>(update.compute.data);
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      if (slot >= slots) continue;
#pragma unroll
      for (int k = 0; k < kVectors; ++k) {
        const int64_t i = column(k);
        if (i >= update.slots.cols) continue;
        store4(static_cast<float*>(update.slots.data) + first + slot * update.slots.cols + i, rows[slot][k]);
        Elements<T, 4> rounded;
#pragma unroll
        for (int j = 0; j < 4; ++j) rounded.at[j] = ptx::from_float<T>(rows[slot][k].at[j]);
        ptx::store(reinterpret_cast<Elements<T, 4>*>(copy + first + slot * update.slots.cols + i), rounded);
      }
    }
  }

 private:
  static LOCAS_DEVICE int64_t column(int k) { return 4 * (ptx::thread_index() + static_cast<int64_t>(k) * threads); }

  // rows += the products of coefficients and source rows, token after token.
  static LOCAS_DEVICE void add_products(const Params& p, Shared& shared, const KernelFactors::Rows& coefficients,
                                        const KernelFactors::Rows& source, int first_slot, int slots,
                                        Float4 (&rows)[kSlots][kVectors]) {
    const int tokens = static_cast<int>(p.factors.tokens);
    for (int i = ptx::thread_index(); i < tokens * kSlots; i += threads) {
      const int token = i / kSlots, slot = i % kSlots;
      const T* from = static_cast<const T*>(coefficients.data) + token * coefficients.stride + first_slot;
      ptx::store(&shared.coefficients[token][slot], slot < slots ? ptx::to_float(ptx::load(from + slot)) : 0.0f);
    }
    ptx::sync_threads();
#pragma unroll 2
    for (int token = 0; token < tokens; ++token) {
      const T* from = static_cast<const T*>(source.data) + token * source.stride;
#pragma unroll
      for (int k = 0; k < kVectors; ++k) {
        if (column(k) >= p.update.slots.cols) continue;
        const auto values = ptx::load(reinterpret_cast<const Elements<T, 4>*>(from + column(k)));
#pragma unroll
        for (int slot = 0; slot < kSlots; ++slot) {
          const float coefficient = ptx::load(&shared.coefficients[token][slot]);
#pragma unroll
          for (int j = 0; j < 4; ++j) rows[slot][k].at[j] += coefficient * ptx::to_float(values.at[j]);
        }
      }
    }
  }

  static LOCAS_DEVICE void clip(Shared& shared, const float (&sums_of_squares)[kSlots],
                                Float4 (&rows)[kSlots][kVectors]) {
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      float sum = sums_of_squares[slot];
#pragma unroll
      for (int mask = 16; mask > 0; mask /= 2) sum += ptx::shuffle_xor(sum, mask);
      if (ptx::lane_index() == 0) ptx::store(&shared.warp_sums[slot][ptx::warp_index()], sum);
    }
    ptx::sync_threads();
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      float total = 0.0f;
#pragma unroll
      for (int warp = 0; warp < kWarps; ++warp) total += ptx::load(&shared.warp_sums[slot][warp]);
      const float factor = clip_factor(total);
#pragma unroll
      for (int k = 0; k < kVectors; ++k)
#pragma unroll
        for (int j = 0; j < 4; ++j) rows[slot][k].at[j] *= factor;
    }
  }
};

template <class Rule>
void update_from_factors(const typename Rule::Params& update, const LayerFactors& factors, Queue queue) {
  with_half_type(factors.dtype, [&]<class T>() {
    const auto launch_with = [&]<int kVectors>() {
      using Kernel = UpdateSlotsFromFactors<T, Rule, kVectors>;
      const typename Kernel::Params params{update, KernelFactors(factors)};
      launch<Kernel>(Kernel::blocks(params.factors), sizeof(typename Kernel::Shared), queue, params);
    };
    const int64_t d = update.slots.cols;
    if (d <= 1024) launch_with.template operator()<1>();
    else if (d <= 2048) launch_with.template operator()<2>();
    else if (d <= 4096) launch_with.template operator()<4>();
    else launch_with.template operator()<8>();
  });
}

}  // namespace

void adamw_slots_from_factors(const AdamwSlotsParams& p, const LayerFactors& factors, Queue queue) {
  update_from_factors<AdamwSlots>(p, factors, queue);
}

void sgd_slots_from_factors(const SgdSlotsParams& p, const LayerFactors& factors, Queue queue) {
  update_from_factors<SgdSlots>(p, factors, queue);
}

}  // namespace locas::cuda
