// What the products of this family share: sums [kM, kN] = A B by wgmma, on operands that TMA brings to shared memory.
//
//      384 threads                     a CTA stays and takes the units of work that are its turn, one after the other
//        producer warp                 waits until a stage is empty and starts its copies; runs ahead over the units
//        2 consumer warpgroups         wait until a stage is full, multiply, and release it when the next one multiplies
//
//      cooperative: both consumers have their half of the rows of one unit
//      ping-pong:   each has a unit of its own, so that one stores its sums while the other multiplies
//
// A stage holds the A and the B tile of one K-block of 64, in slabs of 8192 bytes with the 128-byte swizzle of
// ptx/wgmma.cuh:
//
//      a   kM / 64 slabs        K-major    64 rows of A or columns of B, 128 bytes each: 64 of K
//      b   kBRows / 64 slabs    MN-major   64 of K, 128 bytes each: 64 rows of A or columns of B
//
// Whatever lies outside a matrix arrives as 0, and stores do nothing there: no size has to be a multiple of a tile's.
#pragma once

#include "cuda/common/elements.cuh"
#include "cuda/launch.cuh"
#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/bulk_tensor.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/thread.cuh"
#include "cuda/ptx/warpgroup.cuh"
#include "cuda/ptx/wgmma.cuh"
#include "cuda/tensor_map.cuh"

namespace locas::cuda::sm90 {

using ptx::Major;

constexpr int kBlockK = 64;

enum class Schedule { cooperative, ping_pong };

template <class T_, int M, int N, int Stages, Schedule schedule_>
struct Tile {
  using T = T_;
  static constexpr int kM = M, kN = N, kStages = Stages;
  static constexpr Schedule schedule = schedule_;
  static constexpr bool kPingPong = schedule == Schedule::ping_pong;
  static constexpr int kThreads = 384, kConsumers = 2;
  static constexpr int kRows = kPingPong ? M : M / kConsumers;  // of a consumer
  static constexpr int kRowBlocks = kRows / 64;
  static constexpr int kConsumerWarps = kPingPong ? 4 : 8;  // that use a stage
  static constexpr int kBRows = (N + 63) / 64 * 64;         // whole slabs of 64, also where B is K-major
  static_assert(kRows % 64 == 0 && kRowBlocks * N / 2 <= 192, "the sums must fit the registers of a consumer");

  struct Stage {
    alignas(1024) T a[kM * kBlockK];
    alignas(1024) T b[kBRows * kBlockK];
  };
  static constexpr uint32_t kStageBytes = sizeof(Stage);
  static_assert(kStageBytes == (kM + kBRows) * kBlockK * sizeof(T));

  struct Shared {
    Stage stages[kStages];
    alignas(8) uint64_t full[kStages], empty[kStages];
    uint64_t turn[kConsumers];  // ping-pong: whose multiplications are next
  };
  using Sums = float[kRowBlocks][kN / 2];
};

// Which stage is next, and how often the ring has gone round.
template <int kStages>
struct RingPosition {
  int stage = 0;
  uint32_t phase = 0;

  LOCAS_DEVICE void next() {
    if (++stage == kStages) {
      stage = 0;
      phase ^= 1;
    }
  }
  LOCAS_DEVICE void skip(int count) {
    const int position = stage + count;
    phase ^= position / kStages & 1;
    stage = position % kStages;
  }
};

template <class Tile>
LOCAS_DEVICE void initialise(typename Tile::Shared& shared) {
  if (ptx::thread_index() == 0) {
    for (int stage = 0; stage < Tile::kStages; ++stage) {
      ptx::mbarrier_init(&shared.full[stage], 1);
      ptx::mbarrier_init(&shared.empty[stage], Tile::kConsumerWarps);
    }
    for (uint64_t& turn : shared.turn) ptx::mbarrier_init(&turn, Tile::kConsumerWarps);
    ptx::mbarrier_init_fence();
  }
  ptx::sync_threads();
}

// Consumer 0 or 1, or -1 for the producer.
LOCAS_DEVICE int consumer_index() { return ptx::uniform(ptx::warpgroup_index()) - 1; }

// The units of a CTA: every block_count()-th.
struct EachInTurn {
  int units;
  LOCAS_DEVICE int first_unit() const { return ptx::block_index(); }
  LOCAS_DEVICE int next_unit(int unit) const { return unit + ptx::block_count(); }
  LOCAS_DEVICE int turn(int unit) const { return unit / ptx::block_count(); }
};

// The producer's part, which one thread runs: loads_of(unit) gives a function load(block, stage, full) that starts the
// copies of a K-block of the unit, work.stage_bytes(unit) in all; its blocks are work.first_block(unit) to
// work.last_block(unit) - 1. What a unit alone decides belongs into loads_of: the divisions of a tile's place would take a
// good part of a K-block's time.
template <class Tile, class Work, class LoadsOf>
LOCAS_DEVICE void produce(typename Tile::Shared& shared, const Work& work, LoadsOf&& loads_of) {
  RingPosition<Tile::kStages> ring;
  for (int unit = work.first_unit(); unit < work.units; unit = work.next_unit(unit)) {
    const int last = work.last_block(unit);
    const uint32_t bytes = work.stage_bytes(unit);
    auto load = loads_of(unit);
    for (int block = work.first_block(unit); block < last; ++block) {
      ptx::mbarrier_wait(&shared.empty[ring.stage], ring.phase ^ 1);
      uint64_t* full = &shared.full[ring.stage];
      ptx::mbarrier_arrive_expect(full, bytes);
      load(block, shared.stages[ring.stage], full);
      ring.next();
    }
  }
}

// The rows of a K-major tile that are loaded: not more than the operand has, as what a box has outside its matrix takes
// its time too. The others stay what they are, and nothing stores their sums.
inline int loaded_rows(int of_tile, int64_t of_operand) {
  return of_operand < of_tile ? static_cast<int>(of_operand) : of_tile;
}
// What comes into a stage by so many rows of A and of B.
template <class T>
constexpr uint32_t bytes_of_rows(int a, int b) {
  return (a + b) * kBlockK * sizeof(T);
}

// The B tile of rows of K, whole.
template <class Tile>
constexpr Box k_major_box = operand_box(Tile::kBRows);

// The B tile of columns of K, by slabs of 64.
constexpr Box kMnMajorBox = operand_box(64);
template <class Tile>
LOCAS_DEVICE void load_mn_major(typename Tile::Stage& stage, const ptx::TensorMap& from, int col, int k,
                                uint64_t* full) {
#pragma unroll
  for (int slab = 0; slab < Tile::kBRows / 64; ++slab)
    ptx::bulk_tensor_load(stage.b + slab * 64 * kBlockK, from, col + slab * 64, k, full);
}

// The consumers' part: multiply(unit, ring, sums, pass_turn) goes over the K-blocks of a unit and calls pass_turn when its
// last multiplications have begun; store(unit, sums) gets the sums of this consumer's rows.
//
// In ping-pong the turns also keep a consumer from waiting for a stage that is two rounds of the ring ahead, which its
// parity would take for filled.
template <class Tile, class Work, class Multiply, class Store>
LOCAS_DEVICE void consume(typename Tile::Shared& shared, const Work& work, int consumer, Multiply&& multiply,
                          Store&& store) {
  RingPosition<Tile::kStages> ring;
  int turn = 0;
  for (int unit = work.first_unit(); unit < work.units; unit = work.next_unit(unit), ++turn) {
    const int first = work.first_block(unit), last = work.last_block(unit);
    if (Tile::kPingPong && turn % 2 != consumer) {
      ring.skip(last - first);
      continue;
    }
    if constexpr (Tile::kPingPong) ptx::mbarrier_wait(&shared.turn[consumer], turn / 2 % 2 ^ (consumer == 0 ? 1 : 0));
    typename Tile::Sums sums;
    multiply(unit, ring, sums, [&] {
      if (Tile::kPingPong && ptx::lane_index() == 0) ptx::mbarrier_arrive(&shared.turn[1 - consumer]);
    });
    store(unit, sums);
  }
}

template <class Tile>
LOCAS_DEVICE void release(typename Tile::Shared& shared, int stage) {
  if (ptx::lane_index() == 0) ptx::mbarrier_arrive(&shared.empty[stage]);
}

template <class Tile>
LOCAS_DEVICE void hold(typename Tile::Sums& sums) {
#pragma unroll
  for (int row_block = 0; row_block < Tile::kRowBlocks; ++row_block) ptx::hold(sums[row_block]);
}

// sums (+)= A B over `count` K-blocks, which have been multiplied and released at the end. begun() is called before the
// last of them has.
template <class Tile, Major a_major, Major b_major, class Begun>
LOCAS_DEVICE void multiply_blocks(typename Tile::Shared& shared, RingPosition<Tile::kStages>& ring,
                                  typename Tile::Sums& sums, int consumer, int count, bool accumulate, Begun&& begun) {
  using T = typename Tile::T;
  const int first_row = Tile::kPingPong ? 0 : consumer * Tile::kRows;
  int held = -1;  // the stage that the batch under way reads
  for (int block = 0; block < count; ++block) {
    typename Tile::Stage& stage = shared.stages[ring.stage];
    ptx::mbarrier_wait(&shared.full[ring.stage], ring.phase);
    const uint64_t a = ptx::operand_descriptor<a_major>(stage.a + first_row * kBlockK);
    const uint64_t b = ptx::operand_descriptor<b_major>(stage.b);
    hold<Tile>(sums);
    ptx::wgmma_fence();
#pragma unroll
    for (int k = 0; k < kBlockK / 16; ++k)
#pragma unroll
      for (int row_block = 0; row_block < Tile::kRowBlocks; ++row_block)
        // 64 rows of a K-major, or 64 columns of an MN-major tile, are 8192 bytes.
        ptx::wgmma<T, Tile::kN, a_major, b_major>(sums[row_block],
                                                  a + row_block * (8192 >> 4) + k * ptx::kNextK16<a_major>,
                                                  b + k * ptx::kNextK16<b_major>, k > 0 || block > 0 || accumulate);
    ptx::wgmma_commit();
    hold<Tile>(sums);
    ptx::wgmma_wait<1>();
    if (held >= 0) release<Tile>(shared, held);
    held = ring.stage;
    ring.next();
  }
  begun();
  ptx::wgmma_wait<0>();
  hold<Tile>(sums);
  if (held >= 0) release<Tile>(shared, held);
}

// The kernel's frame: `producer` runs in one thread, `consumer(index)` in the two warpgroups, and a `fetcher`, if there is
// one, in a thread of another warp.
template <class Tile, class Producer, class Consumer, class... Fetcher>
LOCAS_DEVICE void specialise(typename Tile::Shared& shared, Producer&& producer, Consumer&& consumer,
                             Fetcher&&... fetcher) {
  static_assert(sizeof...(fetcher) <= 1);
  initialise<Tile>(shared);
  const int index = consumer_index();
  if (index < 0) {
    ptx::return_registers<24>();
    const int warp = ptx::uniform(ptx::warp_index());
    if (warp <= static_cast<int>(sizeof...(fetcher)) && ptx::elect_one()) {
      if (warp == 0) producer();
      else (fetcher(), ...);
    }
  } else {
    ptx::take_registers<240>();
    consumer(index);
  }
}

// The tile of unit `index` of a grid of tiles. Neighbours go down kGroup tiles of the tokens before they go on along
// the weights, so that what runs at one time shares operands in the L2 cache.
struct TileIndex {
  int m, n;
};
LOCAS_DEVICE TileIndex tile_index(int index, int tiles_m, int tiles_n) {
  constexpr int kGroup = 8;
  const int group_tiles = kGroup * tiles_n;
  const int first_m = index / group_tiles * kGroup;
  const int group_m = tiles_m - first_m < kGroup ? tiles_m - first_m : kGroup;
  const int within = index % group_tiles;
  return {first_m + within % group_m, within / group_m};
}

// There are at most as many CTAs as multiprocessors: a CTA fills one, and stays.
inline int block_count_for(int units, Queue queue) {
  const int most = multiprocessor_count(queue);
  return units < most ? units : most;
}
template <class Kernel>
void launch_units(const typename Kernel::Params& p, bool programmatic, Queue queue) {
  static_assert(sizeof(typename Kernel::Shared) <= 227 * 1024, "what a block can have on sm_90");
  launch<Kernel>(block_count_for(p.units, queue), sizeof(typename Kernel::Shared), queue, p,
                 {.programmatic = programmatic});
}

}  // namespace locas::cuda::sm90
