// peer_sum: a sum over processes on GPUs that read each other's memory, in one launch.
//
//      rank 0   data --> own slot, "arrived" in the box of rank 1 | waits | own data + slot of rank 1 --> data
//      rank 1   data --> own slot, "arrived" in the box of rank 0 | waits | slot of rank 0 + own data --> data
//
// Block b of a process waits for block b of the others alone, which brings the same part: no block waits for another of
// its own grid, so it does not matter how many run at once. Counts go on from launch to launch: nothing is reset, and a
// launch that is replayed from a graph counts too.
#include <cmath>

#include "common/peer_params.h"
#include "cuda/common/elements.cuh"
#include "cuda/launch.cuh"
#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/memory.cuh"
#include "cuda/ptx/system.cuh"
#include "cuda/ptx/thread.cuh"

namespace locas::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kGroup = 4;          // vectors that a thread has under way at once
constexpr uint32_t kLooks = 4096;  // at a count before one at *stop, which lies in the host's memory

struct Launch {
  PeerSumParams sum;
  bool aligned;  // data takes 16-byte accesses
};

// Whether a count has come as far as `turn`; no longer waited for where *stop says so.
LOCAS_DEVICE bool arrives(const uint32_t* count, uint32_t turn, const int32_t* stop) {
  for (uint32_t looks = 1; static_cast<int32_t>(ptx::load_acquire(count) - turn) < 0; ++looks)
    if (looks % kLooks == 0 && ptx::load_acquire(reinterpret_cast<const uint32_t*>(stop)) != 0) return false;
  return true;
}

// What a thread has of the data at once: kGroup vectors that lie kStep apart.
struct Group {
  static constexpr int64_t kStep = int64_t{kPeerBlocks} * kThreads * kVector;
  float values[kGroup][kVector];

  // whole: all of them are there, aligned, so that nothing lies between their loads.
  template <bool whole, class T>
  LOCAS_DEVICE void load(const T* data, int64_t first, int64_t count, bool aligned) {
#pragma unroll
    for (int k = 0; k < kGroup; ++k) {
      const int64_t at = first + k * kStep;
      if constexpr (whole) load_piece(data + at, values[k]);
      else if (at < count) load_vector(data + at, values[k], elements(count - at), aligned);
    }
  }
  template <bool whole, class T>
  LOCAS_DEVICE void store(T* data, int64_t first, int64_t count, bool aligned) const {
#pragma unroll
    for (int k = 0; k < kGroup; ++k) {
      const int64_t at = first + k * kStep;
      if constexpr (whole) store_piece(values[k], data + at);
      else if (at < count) store_vector(values[k], data + at, elements(count - at), aligned);
    }
  }
  static LOCAS_DEVICE int elements(int64_t left) { return static_cast<int>(left < kVector ? left : kVector); }

  // Calls f<whole>(first) for each group of this thread.
  template <class F>
  static LOCAS_DEVICE void for_each(int64_t count, bool aligned, F&& f) {
    const int64_t thread = static_cast<int64_t>(ptx::block_index()) * kThreads + ptx::thread_index();
    for (int64_t first = thread * kVector; first < count; first += kGroup * kStep) {
      if (aligned && first + (kGroup - 1) * kStep + kVector <= count) f.template operator()<true>(first);
      else f.template operator()<false>(first);
    }
  }
};

template <class T>
struct PeerSum {
  using Params = Launch;
  static constexpr const char* name = "peer_sum";
  static constexpr int threads = kThreads, min_blocks = 1;

  static LOCAS_DEVICE PeerBox& box(const PeerSumParams& p, int rank) {
    return *reinterpret_cast<PeerBox*>(p.boxes[rank]);
  }

  static LOCAS_DEVICE void run(const Params& launch, unsigned char*) {
    const PeerSumParams& p = launch.sum;
    const int block = ptx::block_index(), thread = ptx::thread_index();
    const uint32_t turn = ptx::load(&box(p, p.rank).done[block]) + 1;
    const int64_t slot = sizeof(PeerBox) + turn % 2 * p.slot_bytes;
    T* const data = static_cast<T*>(p.data);
    const auto slot_of = [&](int rank) { return reinterpret_cast<T*>(p.boxes[rank] + slot); };

    Group::for_each(p.count, launch.aligned, [&]<bool whole>(int64_t first) {
      Group own;
      own.load<whole>(data, first, p.count, launch.aligned);
      own.store<whole>(slot_of(p.rank), first, p.count, true);
    });
    ptx::fence_system();
    ptx::sync_threads();
    bool alone = false;
    if (thread < p.peers && thread != p.rank) {
      ptx::store_release(&box(p, thread).arrived[p.rank][block], turn);
      alone = !arrives(&box(p, p.rank).arrived[thread][block], turn, p.stop);
    }
    if (thread == 0) ptx::store(&box(p, p.rank).done[block], turn);
    const float begin = ptx::sync_threads_or(alone) ? NAN : 0.0f;

    Group::for_each(p.count, launch.aligned, [&]<bool whole>(int64_t first) {
      Group sum;
#pragma unroll
      for (int i = 0; i < kGroup * kVector; ++i) sum.values[i / kVector][i % kVector] = begin;
      for (int rank = 0; rank < p.peers; ++rank) {
        Group part;
        part.load<whole>(slot_of(rank), first, p.count, true);
#pragma unroll
        for (int i = 0; i < kGroup * kVector; ++i)
          sum.values[i / kVector][i % kVector] += part.values[i / kVector][i % kVector];
      }
      sum.store<whole>(data, first, p.count, launch.aligned);
    });
  }
};

}  // namespace

void peer_sum(const PeerSumParams& p, Queue queue) {
  with_type(p.dtype,
            [&]<class T>() { launch<PeerSum<T>>(p.count == 0 ? 0 : kPeerBlocks, 0, queue, {p, is_aligned(p.data)}); });
}

}  // namespace locas::cuda
