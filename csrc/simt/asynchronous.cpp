// What a thread starts and something else finishes: cp.async, bulk copies, and the mbarriers that count their bytes.
#include "simt/machine.h"

namespace locas::simt {

// ---- cp.async ------------------------------------------------------------------------------------------------
namespace {

void land(AsyncCopy& copy) {
  if (copy.landed) return;
  if (copy.global) std::memcpy(copy.shared, copy.global, 16);
  else std::memset(copy.shared, 0, 16);
  copy.landed = true;
}

void finish_copies(std::vector<AsyncCopy>& group) {
  SharedMemory& shared = machine.shared;
  for (AsyncCopy& copy : group) {
    land(copy);
    shared.end_copy(thread_index(), copy.shared, 16, shared.time(current_warp()), Proxy::generic);
  }
  group.clear();
}

}  // namespace

void copy_async(void* shared, const void* global, bool valid) {
  if (reinterpret_cast<uintptr_t>(shared) % 16 != 0 || (valid && reinterpret_cast<uintptr_t>(global) % 16 != 0))
    fail("cp_async_16 from %p to %p: both must be aligned to 16 bytes", global, shared);
  if (valid) touch_global(global, 16, Access::read);
  machine.shared.begin_copy(thread_index(), shared, 16, "cp_async_wait", Proxy::generic);
  AsyncCopy copy{shared, valid ? global : nullptr, false};
  if (machine.order == Order::in_turn || chance()) land(copy);
  machine.current->open_copies.push_back(copy);
}

void commit_copies() {
  Thread& self = *machine.current;
  self.committed_copies.push_back(std::move(self.open_copies));
  self.open_copies.clear();
}

void wait_for_copies(size_t pending_groups) {
  auto& groups = machine.current->committed_copies;
  while (groups.size() > pending_groups) {
    finish_copies(groups.front());
    groups.erase(groups.begin());
  }
}

void forget_copies() {
  wait_for_copies(0);
  finish_copies(machine.current->open_copies);
  if (!machine.current->open_stores.empty() || !machine.current->committed_stores.empty())
    fail("exits while its bulk stores still read shared memory (no bulk_wait_read)");
}

// ---- mbarrier ------------------------------------------------------------------------------------------------
namespace {

MBarrier& find_mbarrier(uint64_t* address) {
  const auto found = machine.mbarriers.find(address);
  if (found == machine.mbarriers.end()) fail("an mbarrier at %p that nobody initialised", static_cast<void*>(address));
  machine.shared.check_barrier(thread_index(), address);
  return found->second;
}

void complete_phase(MBarrier& barrier) {
  if (barrier.pending > 0 || barrier.bytes != 0) return;
  barrier.parity ^= 1;
  barrier.pending = barrier.count;
  barrier.released = barrier.gathered;
  wake(barrier.waiting);
}

}  // namespace

void mbarrier_init(uint64_t* address, int count) {
  if (reinterpret_cast<uintptr_t>(address) % 8 != 0)
    fail("an mbarrier at %p, which is not aligned to 8 bytes", static_cast<void*>(address));
  if (count <= 0) fail("mbarrier_init with a count of %d", count);
  machine.shared.claim_barrier(thread_index(), address);
  MBarrier barrier;
  barrier.count = barrier.pending = count;
  barrier.initialiser = thread_index();
  machine.mbarriers[address] = barrier;
}

void mbarrier_init_fence() {
  for (auto& [address, barrier] : machine.mbarriers)
    if (barrier.initialiser == thread_index()) barrier.fenced = true;
}

void mbarrier_arrive(uint64_t* address, uint32_t expected_bytes) {
  MBarrier& barrier = find_mbarrier(address);
  if (barrier.pending == 0) fail("mbarrier over-arrival: all %d threads of this phase have arrived", barrier.count);
  join(barrier.gathered, machine.shared.clock(current_warp()));
  machine.shared.tick(current_warp());
  barrier.bytes += expected_bytes;
  --barrier.pending;
  complete_phase(barrier);
}

void mbarrier_wait(uint64_t* address, uint32_t parity) {
  MBarrier& barrier = find_mbarrier(address);
  while (barrier.parity == (parity & 1)) wait_in("mbarrier_wait", barrier.waiting);
  machine.shared.learn(current_warp(), barrier.released);
  machine.shared.sync_lanes(current_warp());
}

// ---- Bulk copies ---------------------------------------------------------------------------------------------
namespace {

// A copy into shared memory whose bytes count on an mbarrier. `move` does it.
void issue_load(void* shared, uint32_t bytes, uint64_t* address, std::function<void()> move) {
  MBarrier& barrier = find_mbarrier(address);
  if (!barrier.fenced) fail("a bulk copy on an mbarrier without mbarrier_init_fence");
  machine.shared.begin_copy(thread_index(), shared, bytes, "mbarrier_wait", Proxy::async);
  join(barrier.gathered, machine.shared.clock(current_warp()));
  const int thread = thread_index();
  const uint32_t time = machine.shared.time(current_warp());
  machine.shared.tick(current_warp());
  issue(kNoQueue, [=, move = std::move(move), &barrier] {
    move();
    machine.shared.end_copy(thread, shared, bytes, time, Proxy::async);
    barrier.bytes -= bytes;
    complete_phase(barrier);
  });
}

uint32_t box_bytes(const TensorMap& map) { return map.box_rows * map.box_cols * map.element_bytes; }

void check_box(const char* name, const TensorMap& map, const void* shared) {
  const int row_bytes = map.box_cols * map.element_bytes;
  const size_t aligned = map.swizzle_bytes ? map.swizzle_bytes * 8 : 128;
  if (reinterpret_cast<uintptr_t>(shared) % aligned != 0)
    fail("%s: the box in shared memory is not aligned to %zu bytes", name, aligned);
  if (reinterpret_cast<uintptr_t>(map.data) % 16 != 0 || map.stride * map.element_bytes % 16 != 0)
    fail("%s: the matrix and its rows must begin at multiples of 16 bytes", name);
  if (row_bytes % 16 != 0 || map.box_rows < 1 || map.box_rows > 256 || map.box_cols > 256 ||
      (map.swizzle_bytes && row_bytes != map.swizzle_bytes))
    fail("%s: a box of %d x %d with a swizzle of %d bytes", name, map.box_rows, map.box_cols, map.swizzle_bytes);
}

// Calls f(16 bytes of shared memory, their place in global memory, how many bytes of them lie in the matrix).
template <class F>
void for_each_piece(const TensorMap& map, int col, int row, const void* shared, F&& f) {
  const int elements = 16 / map.element_bytes;
  for (int i = 0; i < map.box_rows; ++i)
    for (int j = 0; j < map.box_cols; j += elements) {
      const int64_t from_row = row + i, from_col = col + j;
      const size_t offset = (static_cast<size_t>(i) * map.box_cols + j) * map.element_bytes;
      const int64_t left = from_row >= 0 && from_row < map.rows && from_col >= 0 ? map.cols - from_col : 0;
      const int64_t inside = left < 0 ? 0 : left < elements ? left : elements;
      const auto* global =
          static_cast<unsigned char*>(map.data) + (from_row * map.stride + from_col) * map.element_bytes;
      f(swizzled(static_cast<const unsigned char*>(shared) + offset, map.swizzle_bytes), global,
        inside * map.element_bytes);
    }
}

}  // namespace

const unsigned char* swizzled(const unsigned char* shared, int swizzle_bytes) {
  const size_t offset = shared - machine.shared.data();
  const size_t permuted = swizzle_bytes ? offset ^ ((offset >> 7 & (swizzle_bytes / 16 - 1)) << 4) : offset;
  return machine.shared.data() + permuted;
}

void bulk_copy(void* shared, const void* global, uint32_t bytes, uint64_t* address) {
  if (bytes % 16 != 0 || reinterpret_cast<uintptr_t>(shared) % 16 != 0 || reinterpret_cast<uintptr_t>(global) % 16 != 0)
    fail("bulk_copy_to_shared of %u bytes from %p to %p: size and addresses must be multiples of 16", bytes, global,
         shared);
  touch_global(global, bytes, Access::read);
  issue_load(shared, bytes, address, [=] { std::memcpy(shared, global, bytes); });
}

void bulk_tensor_load(void* shared, const TensorMap& map, int col, int row, uint64_t* address) {
  check_box("bulk_tensor_load", map, shared);
  for_each_piece(map, col, row, shared, [](const void*, const void* global, int64_t inside) {
    if (inside > 0) touch_global(global, inside, Access::read);
  });
  const TensorMap copy = map;
  issue_load(shared, box_bytes(map), address, [=] {
    for_each_piece(copy, col, row, shared, [](const void* piece, const void* global, int64_t inside) {
      void* to = const_cast<void*>(piece);
      std::memset(to, 0, 16);
      if (inside > 0) std::memcpy(to, global, inside);
    });
  });
}

void bulk_tensor_store(const TensorMap& map, int col, int row, const void* shared) {
  check_box("bulk_tensor_store", map, shared);
  BulkStore store;
  for_each_piece(map, col, row, shared, [&](const void* piece, const void* global, int64_t inside) {
    if (inside > 0) touch_global(global, inside, Access::write);
    machine.shared.begin_async_read(thread_index(), 1, piece);
    store.pieces.push_back(piece);
  });
  const TensorMap copy = map;
  store.operation = issue(kNoQueue, [=] {
    for_each_piece(copy, col, row, shared, [](const void* piece, const void* global, int64_t inside) {
      if (inside > 0) std::memcpy(const_cast<void*>(global), piece, inside);
    });
  });
  machine.current->open_stores.push_back(std::move(store));
}

void bulk_commit() {
  Thread& self = *machine.current;
  self.committed_stores.push_back(std::move(self.open_stores));
  self.open_stores.clear();
}

void bulk_wait_read(size_t pending_groups) {
  auto& groups = machine.current->committed_stores;
  while (groups.size() > pending_groups) {
    for (const BulkStore& store : groups.front()) {
      finish(store.operation);
      for (const void* piece : store.pieces) machine.shared.end_async_read(thread_index(), 1, piece);
    }
    groups.erase(groups.begin());
  }
}

void fence_async_shared() { machine.shared.fence_proxy(thread_index()); }

}  // namespace locas::simt
