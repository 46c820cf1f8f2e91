// glu_ffn_backward (K3 and K4) on Hopper: the backward of an FFN with memory, for many tokens. The host is frozen.
//
//      K3 glu_ffn_hidden_grad   d_hidden = dy [W_down | scale * V^T] stays on chip and becomes d_gate and d_up
//
//           a second warp fetches gate and up, 64 x 64 at a time and as far ahead as a ring holds; the gradients take
//           their place in shared memory and leave from there. Memory tiles also write memory_hidden, which dV needs.
//
//      K4 glu_ffn_input_and_slots_grad       one grid, two kinds of unit
//
//           dx         d_gate W_gate + d_up W_up + d_gate_memory G + d_up_memory K, one sum over four ranges of K;
//                      where the tiles are few, K is cut into slices that AddSlices adds in their order
//           slots      [d_gate_memory | d_up_memory]^T x and memory_hidden^T dy, K = tokens, added to float32:
//                      kM slots of the gate and the key, or of the value, x kN channels. The CTAs
//                      that have a unit of dx less than others take the first (plan.cuh). K may be cut into slices
//                      here too.
//
// Without dx (the lowest layer with a memory) only the memory's units exist. One warpgroup alone adds to a sum: the result
// repeats bit for bit.
#include "common/activations.h"
#include "cuda/ffn/add_slices.cuh"
#include "cuda/ffn/sm90/epilogue.cuh"
#include "cuda/ffn/sm90/half_activations.cuh"
#include "cuda/ffn/sm90/launchers.h"
#include "cuda/ffn/sm90/neuron_tiles.cuh"
#include "cuda/ffn/sm90/output_tiles.cuh"
#include "cuda/ffn/sm90/plan.cuh"
#include "cuda/launch.cuh"
#include "cuda/ptx/grid.cuh"
#include "cuda/tensor_map.cuh"

namespace locas::cuda::sm90 {
namespace {

// gate and up on their way in, and what becomes of them on its way out: pieces [64, kGateUpCols] of a CTA's tiles, one
// behind the other in a ring. Those of a tile come column by column, of a column one row block behind the other.
template <class Tile>
struct GateUpRing {
  static constexpr int kRowBlocks = Tile::kM / 64, kColumns = Tile::kN / kGateUpCols;
  static constexpr int kOfTile = kRowBlocks * kColumns, kPieces = gate_up_pieces(Tile::kM, Tile::kN, Tile::schedule);
  using WarpRows = Slab<typename Tile::T, kGateUpCols>;
  struct Piece {
    WarpRows gate[4], up[4];
  };

  // A barrier for each place in a tile, in ping-pong for each consumer: those of the ring would also fill for the other
  // one, and who misses a phase takes an earlier one for its own.
  static constexpr int kOwners = Tile::kPingPong ? 2 : 1;

  Piece pieces[kPieces];
  uint64_t full[kOwners][kOfTile], empty[kPieces];

  LOCAS_DEVICE void initialise() {
    if (ptx::thread_index() != 0) return;
    for (auto& of_tile : full)
      for (uint64_t& barrier : of_tile) ptx::mbarrier_init(&barrier, 1);
    for (uint64_t& barrier : empty) ptx::mbarrier_init(&barrier, 4);
    ptx::mbarrier_init_fence();
  }
  LOCAS_DEVICE uint64_t* full_at(int turn, int index) { return &full[turn % kOwners][index]; }
  static LOCAS_DEVICE int parity_at(int turn) { return turn / kOwners % 2; }
};

template <class Tile>
struct GluFfnHiddenGrad {
  using T = typename Tile::T;
  static constexpr const char* name = "glu_ffn_hidden_grad_sm90";
  static constexpr int threads = Tile::kThreads, min_blocks = 1;
  static constexpr int kGroups = kGateUpCols / 16;  // of columns that ldmatrix reads
  using Ring = GateUpRing<Tile>;

  struct Source {
    ptx::TensorMap weight, gate, up, d_gate, d_up;
    int neurons;  // of the buffers
    uint32_t stage_bytes;
    float scale;
  };
  struct Params : NeuronTiles<Tile, Source, Tile::kN> {
    ptx::TensorMap dy, memory_hidden;
    Activation activation;
  };
  using Place = typename Params::Place;
  struct Shared {
    typename Tile::Shared tile;
    Ring ring;
  };

  static LOCAS_DEVICE void run(const Params& p, unsigned char* dynamic) {
    Shared& shared = *reinterpret_cast<Shared*>(dynamic);
    ptx::launch_dependents();
    shared.ring.initialise();
    specialise<Tile>(
        shared.tile,
        [&] {
          produce<Tile>(shared.tile, p, [&](int unit) {
            return [&p, at = p.place_of(unit)](int block, typename Tile::Stage& stage, uint64_t* full) {
              load(p, at, block * kBlockK, stage, full);
            };
          });
        },
        [&](int consumer) {
          consume<Tile>(
              shared.tile, p, consumer,
              [&](int unit, auto& stages, typename Tile::Sums& sums, auto&& pass_turn) {
                if (p.place_of(unit).memory)
                  multiply_blocks<Tile, Major::k, Major::k>(shared.tile, stages, sums, consumer, p.blocks, false,
                                                            pass_turn);
                else
                  multiply_blocks<Tile, Major::k, Major::mn>(shared.tile, stages, sums, consumer, p.blocks, false,
                                                             pass_turn);
              },
              [&](int unit, const typename Tile::Sums& sums) {
                const Place at = p.place_of(unit);
                with_activation(p.activation, [&]<Activation act>() {
                  write<act>(shared.ring, p, at, consumer, p.turn(unit), sums);
                });
              });
        },
        [&] { fetch_gate_and_up(shared.ring, p); });
  }

 private:
  static LOCAS_DEVICE void load(const Params& p, const Place& at, int k, typename Tile::Stage& stage, uint64_t* full) {
    ptx::bulk_tensor_load(stage.a, p.dy, k, at.token, full);
    if (at.memory) ptx::bulk_tensor_load(stage.b, at.source.weight, k, at.neuron, full);
    else load_mn_major<Tile>(stage, at.source.weight, at.neuron, k, full);
  }

  // Of pieces without neurons the ring only keeps the place.
  static LOCAS_DEVICE void fetch_gate_and_up(Ring& ring, const Params& p) {
    RingPosition<Ring::kPieces> to;
    for (int unit = p.first_unit(); unit < p.units; unit = p.next_unit(unit)) {
      const Place at = p.place_of(unit);
      for (int index = 0; index < Ring::kOfTile; ++index, to.next()) {
        const int row = at.token + index % Ring::kRowBlocks * 64;
        const int col = at.neuron + index / Ring::kRowBlocks * kGateUpCols;
        typename Ring::Piece& piece = ring.pieces[to.stage];
        uint64_t* full = ring.full_at(p.turn(unit), index);
        ptx::mbarrier_wait(&ring.empty[to.stage], to.phase ^ 1);
        if (col >= at.source.neurons) {
          ptx::mbarrier_arrive(full);
          continue;
        }
        ptx::mbarrier_arrive_expect(full, sizeof(typename Ring::Piece));
        ptx::bulk_tensor_load(piece.gate, at.source.gate, col, row, full);
        ptx::bulk_tensor_load(piece.up, at.source.up, col, row, full);
      }
    }
  }

  // A piece goes back to the ring when the next one has been worked on: its stores have read it by then.
  template <Activation act>
  static LOCAS_DEVICE void write(Ring& ring, const Params& p, const Place& at, int consumer, int turn,
                                 const typename Tile::Sums& sums) {
    const bool leads = ptx::lane_index() == 0;
    const int warp = ptx::uniform(ptx::warp_index()) % 4;
    int leaving = -1;
    const auto release = [&] {
      ptx::bulk_wait_read<0>();
      ptx::mbarrier_arrive(&ring.empty[leaving]);
    };
#pragma unroll
    for (int column = 0; column < Ring::kColumns; ++column)
#pragma unroll
      for (int row_block = 0; row_block < Tile::kRowBlocks; ++row_block) {
        const int of_tile = Tile::kPingPong ? row_block : consumer, index = column * Ring::kRowBlocks + of_tile;
        const int slot = (turn * Ring::kOfTile + index) % Ring::kPieces;
        const int row = at.token + of_tile * 64 + warp * 16, col = at.neuron + column * kGateUpCols;
        typename Ring::WarpRows &gate = ring.pieces[slot].gate[warp], &up = ring.pieces[slot].up[warp];
        const bool has_neurons = col < at.source.neurons;
        ptx::mbarrier_wait(ring.full_at(turn, index), Ring::parity_at(turn));
        if (has_neurons) {
          uint32_t gates[kGroups][4];
#pragma unroll
          for (int group = 0; group < kGroups; ++group) ptx::ldmatrix_x4(gates[group], gate.row(group));
          if (at.memory) write_hidden<act>(p, at.source.scale, gate, up, row, col);
          differentiate<act>(gates, at.source.scale, sums[row_block], column * kGateUpCols / 2, gate, up);
          ptx::fence_async_shared();
        }
        ptx::sync_warp();
        if (leads && leaving >= 0) release();
        if (leads && has_neurons) {
          ptx::bulk_tensor_store(at.source.d_gate, col, row, gate.at);
          ptx::bulk_tensor_store(at.source.d_up, col, row, up.at);
          ptx::bulk_commit();
        }
        leaving = slot;
      }
    if (leads) release();
  }

  // Uses the place of gate.
  template <Activation act>
  static LOCAS_DEVICE void write_hidden(const Params& p, float scale, typename Ring::WarpRows& gate_rows,
                                        typename Ring::WarpRows& up_rows, int row, int col) {
    // Few tiles come here: small code rather than fast. It reads gate again, as the compiler would keep, and spill, what
    // differentiate makes of the same registers.
#pragma unroll 1
    for (int group = 0; group < kGroups; ++group) {
      uint32_t gate[4], up[4];
      ptx::ldmatrix_x4(gate, gate_rows.row(group));
      ptx::ldmatrix_x4(up, up_rows.row(group));
#pragma unroll
      for (int i = 0; i < 4; ++i)
        up[i] = ptx::pack<T>(scale * half_activation<act>(ptx::first_of<T>(gate[i])).value * ptx::first_of<T>(up[i]),
                             scale * half_activation<act>(ptx::second_of<T>(gate[i])).value * ptx::second_of<T>(up[i]));
      ptx::stmatrix_x4(gate_rows.row(group), up);
    }
    ptx::fence_async_shared();
    ptx::sync_warp();
    if (ptx::lane_index() == 0) {
      ptx::bulk_tensor_store(p.memory_hidden, col, row, gate_rows.at);
      ptx::bulk_commit();
      ptx::bulk_wait_read<0>();
    }
    ptx::sync_warp();
  }

  // The gradients of `gates` and of what is in up_rows; sums from `first` on are d_hidden before its scale.
  template <Activation act>
  static LOCAS_DEVICE void differentiate(const uint32_t (&gates)[kGroups][4], float scale,
                                         const float (&sums)[Tile::kN / 2], int first,
                                         typename Ring::WarpRows& d_gate_rows, typename Ring::WarpRows& up_rows) {
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      uint32_t up[4], d_gate[4];
      ptx::ldmatrix_x4(up, up_rows.row(group));
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int of = first + 2 * (4 * group + i);
        const uint32_t g = gates[group][i], u = up[i];
        const ValueAndSlope a0 = half_activation<act>(ptx::first_of<T>(g));
        const ValueAndSlope a1 = half_activation<act>(ptx::second_of<T>(g));
        const float d0 = scale * sums[of], d1 = scale * sums[of + 1];
        d_gate[i] = ptx::pack<T>(d0 * ptx::first_of<T>(u) * a0.slope, d1 * ptx::second_of<T>(u) * a1.slope);
        up[i] = ptx::pack<T>(d0 * a0.value, d1 * a1.value);
      }
      ptx::stmatrix_x4(d_gate_rows.row(group), d_gate);
      ptx::stmatrix_x4(up_rows.row(group), up);
    }
  }
};

template <class Tile, bool sliced>
struct GluFfnInputAndSlotsGrad {
  using T = typename Tile::T;
  static constexpr const char* name = "glu_ffn_input_and_slots_grad_sm90";
  static constexpr int threads = Tile::kThreads, min_blocks = 1;
  using Output = OutputTiles<Tile, sliced>;
  using Stores = typename Output::Stores;

  struct Segment {
    ptx::TensorMap gradient, weight;
    int blocks;
  };
  struct Params : Output {
    Segment segments[4];             // gate, up, memory's gate, memory's key
    ptx::TensorMap coefficients[3];  // [tokens, slots]: d_gate, d_up and memory_hidden of the memory
    ptx::TensorMap x, dy;
    float* slots_grad;  // [3, r, d]
    float* slot_sums;   // [slot_splits, 3, r, d] where there are slices
    int r, units;
    int slot_blocks, token_blocks;  // 64 slots, 64 tokens
    int slot_units, slot_splits;    // of a slice; slices
    int busy, ahead;                // CTAs with a unit of dx more; units of the slots that the others take first

    LOCAS_DEVICE bool is_dx(int unit) const { return unit < this->tile_units(); }
    LOCAS_DEVICE int first_unit() const { return is_dx(ptx::block_index()) ? ptx::block_index() : first_slot_unit(); }
    LOCAS_DEVICE int next_unit(int unit) const {
      if (is_dx(unit)) return is_dx(unit + ptx::block_count()) ? unit + ptx::block_count() : first_slot_unit();
      const int of_slots = unit - this->tile_units(), others = ptx::block_count() - busy;
      if (of_slots >= ahead) return unit + ptx::block_count();
      return of_slots + others < ahead ? unit + others : first_unit_behind();
    }
    LOCAS_DEVICE int first_block(int unit) const {
      return is_dx(unit) ? Output::first_block(unit) : token_blocks * slot_slice(unit) / slot_splits;
    }
    LOCAS_DEVICE int last_block(int unit) const {
      return is_dx(unit) ? Output::last_block(unit) : token_blocks * (slot_slice(unit) + 1) / slot_splits;
    }
    LOCAS_DEVICE uint32_t stage_bytes(int unit) const {
      return is_dx(unit) ? Output::stage_bytes(unit) : Tile::kStageBytes;
    }
    LOCAS_DEVICE int slot_slice(int unit) const { return (unit - this->tile_units()) / slot_units; }

   private:
    LOCAS_DEVICE int first_slot_unit() const {
      const int other = ptx::block_index() - busy;
      return other >= 0 && other < ahead ? this->tile_units() + other : first_unit_behind();
    }
    LOCAS_DEVICE int first_unit_behind() const { return this->tile_units() + ahead + ptx::block_index(); }
  };
  struct Shared {
    typename Tile::Shared tile;
    typename Output::Stores::Shared stores[Tile::kConsumers * 4];
  };

  // A unit of the slots: kM / 64 neighbours of the blocks of 64 slots, those of the gate before the key's and the value's.
  // Gate and key are an even number: no unit of two has one of theirs and one of the value's.
  static constexpr int kSlotBlocks = Tile::kM / 64;
  struct SlotUnit {
    int first, of_a_kind, channel, slice;

    LOCAS_DEVICE int kind(int i) const { return (first + i >= of_a_kind) + (first + i >= 2 * of_a_kind); }
    LOCAS_DEVICE int slot(int i) const { return (first + i - kind(i) * of_a_kind) * 64; }
  };
  static LOCAS_DEVICE SlotUnit slot_unit(const Params& p, int unit) {
    const int slice = p.slot_slice(unit), index = unit - p.tile_units() - slice * p.slot_units;
    return {index / p.tiles_n * kSlotBlocks, p.slot_blocks, index % p.tiles_n * Tile::kN, slice};
  }

  static LOCAS_DEVICE void run(const Params& p, unsigned char* dynamic) {
    Shared& shared = *reinterpret_cast<Shared*>(dynamic);
    specialise<Tile>(
        shared.tile,
        [&] {
          ptx::wait_for_launch_before();
          produce<Tile>(shared.tile, p, [&](int unit) { return Loads(p, unit); });
        },
        [&](int consumer) {
          Stores stores{shared.stores[ptx::uniform(ptx::warp_index()) - 4]};
          consume<Tile>(
              shared.tile, p, consumer,
              [&](int unit, auto& ring, typename Tile::Sums& sums, auto&& pass_turn) {
                const int count = p.last_block(unit) - p.first_block(unit);
                if (p.is_dx(unit))
                  multiply_blocks<Tile, Major::k, Major::mn>(shared.tile, ring, sums, consumer, count, false,
                                                             pass_turn);
                else
                  multiply_blocks<Tile, Major::mn, Major::mn>(shared.tile, ring, sums, consumer, count, false,
                                                              pass_turn);
              },
              [&](int unit, const typename Tile::Sums& sums) {
                if (p.is_dx(unit)) p.write(stores, unit, sums, consumer);
                else write_slots(p, slot_unit(p, unit), sums, consumer);
              });
          stores.finish();
        });
  }

 private:
  // The copies of a unit, whose K-blocks come in their order.
  struct Loads {
    const Params& p;
    const bool is_dx;
    TileIndex tile;
    SlotUnit slots;
    const Segment* segment;
    int segment_begin = 0;  // its first K-block

    LOCAS_DEVICE Loads(const Params& p, int unit) : p(p), is_dx(p.is_dx(unit)), segment(p.segments) {
      if (is_dx) tile = p.tile(unit);
      else slots = slot_unit(p, unit);
    }
    LOCAS_DEVICE void operator()(int block, typename Tile::Stage& stage, uint64_t* full) {
      if (is_dx) load_dx(block, stage, full);
      else load_slots(block * kBlockK, stage, full);
    }
    LOCAS_DEVICE void load_dx(int block, typename Tile::Stage& stage, uint64_t* full) {
      while (block - segment_begin >= segment->blocks) segment_begin += segment++->blocks;
      const int k = (block - segment_begin) * kBlockK;
      ptx::bulk_tensor_load(stage.a, segment->gradient, k, tile.m * Tile::kM, full);
      load_mn_major<Tile>(stage, segment->weight, tile.n * Tile::kN, k, full);
    }
    LOCAS_DEVICE void load_slots(int token, typename Tile::Stage& stage, uint64_t* full) {
#pragma unroll
      for (int i = 0; i < kSlotBlocks; ++i) {
        // Where the value has no second block, the first takes its place: a box outside the matrix would take longer.
        const int slot = slots.slot(i) < p.r ? slots.slot(i) : slots.slot(0);
        ptx::bulk_tensor_load(stage.a + i * 64 * kBlockK, p.coefficients[slots.kind(i)], slot, token, full);
      }
      load_mn_major<Tile>(stage, slots.kind(0) == 2 ? p.dy : p.x, slots.channel, token, full);
    }
  };

  static LOCAS_DEVICE void write_slots(const Params& p, const SlotUnit& at, const typename Tile::Sums& sums,
                                       int consumer) {
#pragma unroll
    for (int row_block = 0; row_block < Tile::kRowBlocks; ++row_block) {
      const int i = Tile::kPingPong ? row_block : consumer;
      const int64_t kind = int64_t{p.r} * p.d;
      if (p.slot_splits > 1)
        put_floats<false>(p.slot_sums + (3 * at.slice + at.kind(i)) * kind, sums[row_block], at.slot(i), p.r,
                          at.channel, p.d, p.one);
      else put_floats<true>(p.slots_grad + at.kind(i) * kind, sums[row_block], at.slot(i), p.r, at.channel, p.d, p.one);
    }
  }
};

template <class Tile>
void launch_hidden_grad(const GluFfnBackwardParams& ffn, Queue queue) {
  using Kernel = GluFfnHiddenGrad<Tile>;
  using T = typename Tile::T;
  const FfnWeights& w = ffn.weights;
  const int rows = loaded_rows(Tile::kM, ffn.tokens()), slots = loaded_rows(Tile::kBRows, w.padded_r());
  const auto source = [&](const ptx::TensorMap& weight, int weight_rows, int64_t first, int64_t neurons, float scale) {
    const auto part = [&](const Matrix& of, Box box) { return map_or_none<T>(columns_of<T>(of, first, neurons), box); };
    constexpr Box kPiece = operand_box(64), kWarpRows = slab_box<kGateUpCols>;
    return typename Kernel::Source{weight,
                                   part(ffn.gate, kPiece),
                                   part(ffn.up, kPiece),
                                   part(ffn.d_gate, kWarpRows),
                                   part(ffn.d_up, kWarpRows),
                                   static_cast<int>(neurons),
                                   bytes_of_rows<T>(rows, weight_rows),
                                   scale};
  };
  typename Kernel::Params p;
  p.dy = tensor_map<T>(ffn.dy, operand_box(rows));
  p.memory_hidden = map_or_none<T>(ffn.memory_hidden, slab_box<kGateUpCols>);
  p.host = source(tensor_map<T>(w.down, kMnMajorBox), Tile::kBRows, 0, w.m(), 1.0f);
  p.memory = source(map_or_none<T>(w.memory_value, operand_box(slots)), slots, w.m(), w.padded_r(), ffn.scale);
  p.set_sizes(ffn.tokens(), w.d(), ffn.dx.data ? w.m() : 0, w.padded_r());
  p.activation = ffn.activation;
  launch_units<Kernel>(p, false, queue);
}

// The slots' slices lie behind those of dx.
float* slot_sums(const GluFfnBackwardParams& ffn, int splits) {
  return ffn.workspace + (splits > 1 ? splits * ffn.tokens() * ffn.weights.d() : 0);
}

template <class Kernel, class Tile>
typename Kernel::Params input_grad_params(const GluFfnBackwardParams& ffn, int splits, int slot_splits, Queue queue) {
  using T = typename Tile::T;
  const FfnWeights& w = ffn.weights;
  const auto memory_columns = [&](const Matrix& of) { return columns_of<T>(of, w.m(), w.padded_r()); };
  const int rows = loaded_rows(Tile::kM, ffn.tokens());
  const auto segment = [&](const Matrix& gradient, const Matrix& weight) {
    return typename Kernel::Segment{map_or_none<T>(gradient, operand_box(rows)), map_or_none<T>(weight, kMnMajorBox),
                                    static_cast<int>(divide_up(weight.rows, kBlockK))};
  };
  typename Kernel::Params p{};
  p.segments[0] = segment(columns_of<T>(ffn.d_gate, 0, w.m()), w.gate);
  p.segments[1] = segment(columns_of<T>(ffn.d_up, 0, w.m()), w.up);
  p.segments[2] = segment(memory_columns(ffn.d_gate), w.memory_gate);
  p.segments[3] = segment(memory_columns(ffn.d_up), w.memory_key);
  p.coefficients[0] = map_or_none<T>(memory_columns(ffn.d_gate), kMnMajorBox);
  p.coefficients[1] = map_or_none<T>(memory_columns(ffn.d_up), kMnMajorBox);
  p.coefficients[2] = map_or_none<T>(ffn.memory_hidden, kMnMajorBox);
  p.x = tensor_map<T>(ffn.x, kMnMajorBox);
  p.dy = tensor_map<T>(ffn.dy, kMnMajorBox);
  p.slots_grad = static_cast<float*>(ffn.slots_grad.data);
  p.slot_sums = slot_sums(ffn, splits);
  p.r = static_cast<int>(w.r());
  int blocks = 0;
  for (const auto& of : p.segments) blocks += of.blocks;
  p.set(ffn.dx, nullptr, w.d(), blocks, splits, ffn.workspace);
  p.slot_blocks = ffn.slots_grad.data ? static_cast<int>(divide_up(w.r(), 64)) : 0;
  p.token_blocks = static_cast<int>(divide_up(ffn.tokens(), kBlockK));
  p.slot_splits = slot_splits;
  const Units slots = slot_units(Tile::kM, Tile::kN, ffn.tokens(), w.d(), 64 * p.slot_blocks, slot_splits);
  p.slot_units = static_cast<int>(slots.count) / slot_splits;
  p.units = p.tile_units() + static_cast<int>(slots.count);
  const Turns turns = turns_of({p.tile_units(), divide_up(p.blocks, p.splits)}, slots, block_count_for(p.units, queue));
  p.busy = turns.busy;
  p.ahead = static_cast<int>(turns.ahead);
  return p;
}

}  // namespace

void glu_ffn_hidden_grad(const GluFfnBackwardParams& p, int tile, Queue queue) {
  with_half_type(p.dtype, [&]<class T>() {
    with_tile<T, kHiddenGradTiles, hidden_grad_stage_bytes>(static_cast<TileKind>(tile),
                                                            [&]<class Tile>() { launch_hidden_grad<Tile>(p, queue); });
  });
}

void glu_ffn_input_and_slots_grad(const GluFfnBackwardParams& p, int tile, int splits, int slot_splits, Queue queue) {
  with_half_type(p.dtype, [&]<class T>() {
    with_tile<T, kInputGradTiles, output_stage_bytes>(static_cast<TileKind>(tile), [&]<class Tile>() {
      with_sliced(splits, [&]<bool sliced>() {
        using Kernel = GluFfnInputAndSlotsGrad<Tile, sliced>;
        launch_units<Kernel>(input_grad_params<Kernel, Tile>(p, splits, slot_splits, queue), true, queue);
      });
    });
    if (splits > 1 && p.dx.data) add_slices<T>({p.workspace, splits, nullptr, p.dx}, queue);
  });
  if (slot_splits > 1 && p.slots_grad.data) {
    const int64_t floats = 3 * p.weights.r() * p.weights.d();
    add_slices<float>({slot_sums(p, splits), slot_splits, p.slots_grad.data, {p.slots_grad.data, 1, floats, floats}},
                      queue);
  }
}

int64_t glu_ffn_backward_workspace(int64_t tokens, const FfnSizes& sizes) {
  const Plan plan = input_grad_plan(tokens, sizes);
  return (plan.splits > 1 ? plan.splits * tokens * sizes.d : 0) +
         (plan.slot_splits > 1 ? plan.slot_splits * 3 * sizes.r * sizes.d : 0);
}

void glu_ffn_backward_tiles(const GluFfnBackwardParams& p, Queue queue) {
  const FfnSizes sizes = p.weights.sizes();
  const bool needs_dx = p.dx.data != nullptr;
  const FfnSizes of_hidden{sizes.d, needs_dx ? sizes.m : 0, sizes.r};
  glu_ffn_hidden_grad(p, static_cast<int>(hidden_grad_plan(p.tokens(), of_hidden).kind), queue);
  const Plan input = input_grad_plan(p.tokens(), sizes);
  glu_ffn_input_and_slots_grad(p, static_cast<int>(input.kind), needs_dx ? input.splits : 1,
                               needs_dx ? input.slot_splits : 1, queue);
}

}  // namespace locas::cuda::sm90
