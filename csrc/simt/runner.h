// Runs a CUDA kernel on the CPU: one fiber a thread, one block after the other (those of a cooperative launch from one
// grid barrier to the next), in an order drawn from a seed, and aborts with kernel, block, thread and reason where the
// kernel does what a GPU would not forgive. docs/kernels.md is the tour.
//
// Of the kernels only csrc/cuda/ptx/ includes this.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

#include "simt/memory.h"

namespace locas::simt {

// The seed draws the order of threads and blocks and when asynchronous copies land. Seed 0: threads in order, copies at
// once. Seed 1: threads backwards, copies as late as the waits allow. Others: at random.
void set_seed(uint64_t seed);

// programmatic: the blocks may begin before the launch before this one has ended, and must wait for it themselves.
// cooperative: all blocks are resident at once and may wait for each other.
enum class LaunchKind { ordinary, programmatic, cooperative };
void run_grid(const char* kernel, int64_t blocks, int threads, size_t shared_bytes,
              const std::function<void(unsigned char* shared)>& body, LaunchKind kind = LaunchKind::ordinary);

constexpr int kMultiprocessors = 3;  // few, so that small tests see a block take several tiles
// How many blocks are resident at once: one a multiprocessor, or none on a device without cooperative launches.
int most_resident_blocks();
void set_cooperative_launches(bool has);

[[noreturn, gnu::format(printf, 1, 2)]] void fail(const char* reason, ...);

// ---- Called from inside a kernel ----------------------------------------------------------------------------
int thread_index();
int block_index();
int block_count();

// The address of shared memory that instructions take: bytes from its begin.
uint32_t shared_offset(const void* shared);

// Checks alignment, bounds and, in shared memory, races.
enum class Space { any, global, shared };
void touch(const void* address, size_t bytes, Access access, Space space = Space::any);

// All 32 lanes of the warp meet; the last to arrive runs the operation on their arguments, by lane. Lanes that meet
// with different operations abort.
using WarpOperation = void (*)(void* const* arguments);
void warp_collective(const char* name, void* argument, WarpOperation operation);
void sync_warp();

// bar.sync: returns whether the predicate held in any of the threads that met.
bool barrier(const char* name, int id, int threads, bool predicate = false);
bool sync_threads(bool predicate = false);

// cp.async: into shared memory, 16 bytes; zeros where not valid.
void copy_async(void* shared, const void* global, bool valid);
void commit_copies();
void wait_for_copies(size_t pending_groups);

// An mbarrier counts the arrivals of a phase and the bytes of bulk copies that the arrivals announced. wait(parity)
// returns when the phase of that parity is complete; the first phase has parity 0, so waiting for 1 on a fresh mbarrier
// returns at once. One thread initialises, fences so that bulk copies may use it, and a barrier tells the others.
// bulk_copy (cp.async.bulk): addresses and size are multiples of 16; its bytes count on the mbarrier.
void mbarrier_init(uint64_t* barrier, int count);
void mbarrier_init_fence();
void mbarrier_arrive(uint64_t* barrier, uint32_t expected_bytes);
void mbarrier_wait(uint64_t* barrier, uint32_t parity);
void bulk_copy(void* shared, const void* global, uint32_t bytes, uint64_t* barrier);

// A row-major matrix in global memory and the box of it that one copy moves. Outside the matrix a load yields zeros
// and a store does nothing. In shared memory the box's rows follow each other; with a swizzle of 32, 64 or 128 bytes
// the 16-byte pieces of each such span are permuted by the address bits from 7 on.
struct TensorMap {
  void* data;
  int64_t rows, cols, stride;  // elements
  int element_bytes, box_rows, box_cols, swizzle_bytes;
};
void bulk_tensor_load(void* shared, const TensorMap& map, int col, int row, uint64_t* barrier);
void bulk_tensor_store(const TensorMap& map, int col, int row, const void* shared);
// A group is what a thread stored since its last commit. The wait returns when at most `pending` of the thread's own
// groups have still to read shared memory.
void bulk_commit();
void bulk_wait_read(size_t pending_groups);

// fence.proxy.async: what this thread wrote to shared memory by ordinary stores may, from its next barrier on, be read
// by bulk copies and wgmma.
void fence_async_shared();

// The grid waits for the launch before it (griddepcontrol.wait).
void wait_for_launch_before();

// All threads of a cooperative launch meet.
void sync_grid();

}  // namespace locas::simt
