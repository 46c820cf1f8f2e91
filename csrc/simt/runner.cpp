#include "simt/runner.h"

#include <cstdarg>
#include <cstdio>
#include <deque>
#include <memory>

#include "simt/fiber.h"

namespace locas::simt {
namespace {

struct AsyncCopy {
  void* shared;
  const void* global;  // null: zeros
  bool landed;
};

struct Thread {
  explicit Thread(int index);
  Fiber fiber;
  int index;
  bool exited = true;
  const char* waits_in = nullptr;
  std::vector<AsyncCopy> open_copies;                    // not committed yet
  std::vector<std::vector<AsyncCopy>> committed_copies;  // oldest first
};

struct Warp {
  const char* name = nullptr;  // of the collective that its lanes are meeting in
  WarpOperation operation = nullptr;
  int arrived = 0, exited = 0;
  void* arguments[32];
  std::vector<Thread*> waiting;
};

struct Barrier {
  int expected = 0;
  bool any = false, result = false;
  std::vector<Thread*> waiting;
};

struct MBarrier {
  int count, pending;            // arrivals of a phase, and those still missing
  int64_t bytes = 0;             // announced less landed
  uint32_t parity = 0;           // of the phase that is under way
  Clock gathered{}, released{};  // what the arriving warps knew, in this phase and in the one before
  std::vector<Thread*> waiting;
};

struct BulkCopy {
  void* shared;
  const void* global;
  uint32_t bytes;
  uint64_t* barrier;
  int thread;
  uint32_t time;
};

constexpr int kBarriers = 16;

enum class Order { in_turn, backwards, random };

// Everything about the launch that runs, and the threads kept from one launch to the next.
struct Machine {
  uint64_t seed = 0, random_state = 0;
  Order order = Order::in_turn;

  const char* kernel = nullptr;  // null between launches
  const std::function<void(unsigned char*)>* body = nullptr;
  int64_t block = 0, blocks = 0;
  int threads = 0;

  SharedMemory shared;
  std::vector<std::unique_ptr<Thread>> pool;
  std::deque<Thread*> ready;
  Thread* current = nullptr;
  int alive = 0;
  Fiber launcher;
  std::vector<Warp> warps;
  Barrier barriers[kBarriers];
  std::map<const uint64_t*, MBarrier> mbarriers;
  std::vector<BulkCopy> bulk_copies;
};

Machine machine;

uint64_t random_below(uint64_t n) {
  uint64_t& x = machine.random_state;  // xorshift64
  x ^= x << 13;
  x ^= x >> 7;
  x ^= x << 17;
  return (x >> 11) % n;
}

bool chance() { return machine.order == Order::random && random_below(2) == 0; }

int current_warp() { return machine.current->index / 32; }

// ---- Scheduling ----------------------------------------------------------------------------------------------

void complete_phase(MBarrier& barrier);

void land_bulk_copy(size_t index) {
  const BulkCopy copy = machine.bulk_copies[index];
  machine.bulk_copies.erase(machine.bulk_copies.begin() + index);
  std::memcpy(copy.shared, copy.global, copy.bytes);
  machine.shared.end_copy(copy.thread, copy.shared, copy.bytes, copy.time);
  MBarrier& barrier = machine.mbarriers.at(copy.barrier);
  barrier.bytes -= copy.bytes;
  complete_phase(barrier);
}

[[noreturn]] void report_deadlock() {
  std::map<std::string, int> where;
  for (int i = 0; i < machine.threads; ++i) {
    const Thread& thread = *machine.pool[i];
    ++where[thread.exited ? "have exited" : std::string("wait in ") + thread.waits_in];
  }
  std::string text;
  for (const auto& [place, count] : where)
    text += (text.empty() ? "" : ", ") + std::to_string(count) + " threads " + place;
  fail("deadlock: %s", text.c_str());
}

Thread* next_ready() {
  std::deque<Thread*>& ready = machine.ready;
  if (!machine.bulk_copies.empty() && chance()) land_bulk_copy(random_below(machine.bulk_copies.size()));
  while (ready.empty()) {
    if (machine.bulk_copies.empty()) report_deadlock();
    land_bulk_copy(0);  // as late as possible: nothing else can go on
  }
  if (machine.order == Order::random) std::swap(ready[random_below(ready.size())], ready.back());
  Thread* thread = machine.order == Order::in_turn ? ready.front() : ready.back();
  if (machine.order == Order::in_turn) ready.pop_front();
  else ready.pop_back();
  return thread;
}

void run_another() {
  Thread* self = machine.current;
  machine.current = next_ready();
  if (machine.current != self) Fiber::switch_to(self->fiber, machine.current->fiber);
}

void wait_in(const char* what, std::vector<Thread*>& waiting) {
  machine.current->waits_in = what;
  waiting.push_back(machine.current);
  run_another();
}

void wake(std::vector<Thread*>& waiting) {
  machine.ready.insert(machine.ready.end(), waiting.begin(), waiting.end());
  waiting.clear();
}

// The thread that completes a barrier may run on, or be overtaken by those it woke.
void maybe_run_another() {
  if (!chance()) return;
  machine.current->waits_in = "nothing";
  machine.ready.push_back(machine.current);
  run_another();
}

void finish_copies(std::vector<AsyncCopy>& group);

void exit_thread() {
  Thread& self = *machine.current;
  Warp& warp = machine.warps[current_warp()];
  if (warp.arrived > 0) fail("exits while %d lanes of its warp wait in %s", warp.arrived, warp.name);
  ++warp.exited;
  self.exited = true;
  // Copies that nobody waited for.
  wait_for_copies(0);
  finish_copies(self.open_copies);
  if (--machine.alive > 0) {
    machine.current = next_ready();
    Fiber::switch_to(self.fiber, machine.current->fiber);
  } else {
    machine.current = nullptr;
    Fiber::switch_to(self.fiber, machine.launcher);
  }
}

// A thread's fiber lives for many blocks: it runs the body once for each.
void thread_main() {
  for (;;) {
    (*machine.body)(machine.shared.data());
    exit_thread();
  }
}

void run_block() {
  while (static_cast<int>(machine.pool.size()) < machine.threads)
    machine.pool.push_back(std::make_unique<Thread>(static_cast<int>(machine.pool.size())));
  machine.shared.begin_block();
  machine.warps.assign(machine.threads / 32, Warp());
  for (Barrier& barrier : machine.barriers) barrier = Barrier();
  machine.ready.clear();
  for (int i = 0; i < machine.threads; ++i) {
    machine.pool[i]->exited = false;
    machine.ready.push_back(machine.pool[i].get());
  }
  machine.alive = machine.threads;
  machine.current = next_ready();
  Fiber::switch_to(machine.launcher, machine.current->fiber);
  if (!machine.bulk_copies.empty()) fail("the block ends with a bulk copy under way");
  for (const auto& [address, barrier] : machine.mbarriers) machine.shared.release_barrier(address);
  machine.mbarriers.clear();
}

}  // namespace

Thread::Thread(int index) : fiber(&thread_main), index(index) {}

void set_seed(uint64_t seed) {
  machine.seed = seed;
  machine.order = seed == 0 ? Order::in_turn : seed == 1 ? Order::backwards : Order::random;
}

void run_grid(const char* kernel, int64_t blocks, int threads, size_t shared_bytes,
              const std::function<void(unsigned char*)>& body) {
  machine.kernel = kernel;
  machine.body = &body;
  machine.block = 0;
  machine.blocks = blocks;
  machine.threads = threads;
  machine.random_state = 0x9e3779b97f4a7c15u * (machine.seed + 1);
  if (threads <= 0 || threads > 1024 || threads % 32 != 0)
    fail("a block of %d threads; expected whole warps, up to 1024", threads);
  if (blocks > INT32_MAX) fail("a grid of %lld blocks", static_cast<long long>(blocks));
  if (shared_bytes > 227 << 10) fail("%zu bytes of shared memory; sm_90 has 227 KB a block", shared_bytes);

  std::vector<int64_t> order(blocks);
  for (int64_t i = 0; i < blocks; ++i) order[i] = machine.order == Order::backwards ? blocks - 1 - i : i;
  if (machine.order == Order::random)
    for (int64_t i = blocks - 1; i > 0; --i) std::swap(order[i], order[random_below(i + 1)]);
  machine.shared.begin_launch(shared_bytes, threads);
  begin_launch_on_globals();
  for (const int64_t block : order) {
    machine.block = block;
    run_block();
  }
  machine.shared.end_launch();
  machine.kernel = nullptr;
}

void fail(const char* reason, ...) {
  std::fflush(stdout);
  std::fputs("simt: ", stderr);
  if (machine.kernel) std::fprintf(stderr, "%s, block %lld, ", machine.kernel, static_cast<long long>(machine.block));
  if (machine.current)
    std::fprintf(stderr, "thread %d (warp %d, lane %d), ", machine.current->index, machine.current->index / 32,
                 machine.current->index % 32);
  if (machine.kernel) std::fprintf(stderr, "seed %llu: ", static_cast<unsigned long long>(machine.seed));
  va_list arguments;
  va_start(arguments, reason);
  std::vfprintf(stderr, reason, arguments);
  va_end(arguments);
  std::fputc('\n', stderr);
  std::abort();
}

// ---- Called from inside a kernel ----------------------------------------------------------------------------

int thread_index() { return machine.current->index; }
int block_index() { return static_cast<int>(machine.block); }
int block_count() { return static_cast<int>(machine.blocks); }

void touch(const void* address, size_t bytes, Access access, Space space) {
  if (reinterpret_cast<uintptr_t>(address) % bytes != 0)
    fail("%s %zu bytes at %p, which is not aligned to them", access == Access::write ? "writes" : "reads", bytes,
         address);
  bool shared = space == Space::shared || (space == Space::any && machine.shared.contains(address));
  // An access to neither is reported as what it probably was.
  if (space == Space::any && !shared && !in_global(address, bytes)) shared = machine.shared.is_near(address);
  if (!shared) touch_global(block_index(), address, bytes, access);
  else if (access == Access::write) machine.shared.write(thread_index(), address, bytes);
  else machine.shared.read(thread_index(), address, bytes);
}

void warp_collective(const char* name, void* argument, WarpOperation operation) {
  Warp& warp = machine.warps[current_warp()];
  if (warp.exited > 0) fail("%s, but %d lanes of the warp have exited", name, warp.exited);
  if (warp.arrived == 0) {
    warp.name = name;
    warp.operation = operation;
  } else if (warp.operation != operation || (warp.name != name && std::strcmp(warp.name, name) != 0)) {
    fail("divergent collective: %s, while other lanes of the warp are in %s", name, warp.name);
  }
  warp.arguments[thread_index() % 32] = argument;
  if (++warp.arrived < 32) return wait_in(name, warp.waiting);
  if (operation) operation(warp.arguments);
  warp.arrived = 0;
  wake(warp.waiting);
}

void sync_warp() {
  warp_collective("sync_warp", nullptr, [](void* const*) { machine.shared.sync_lanes(current_warp()); });
}

bool barrier(const char* name, int id, int threads, bool predicate) {
  if (id < 0 || id >= kBarriers) fail("%s %d; barriers are numbered 0 to %d", name, id, kBarriers - 1);
  if (threads <= 0 || threads % 32 != 0 || threads > machine.threads)
    fail("%s %d of %d threads; expected whole warps of the block's %d threads", name, id, threads, machine.threads);
  Barrier& barrier = machine.barriers[id];
  if (barrier.waiting.empty()) {
    barrier.expected = threads;
    barrier.any = false;
  } else if (barrier.expected != threads) {
    fail("%s %d of %d threads, where others wait for %d", name, id, threads, barrier.expected);
  }
  barrier.any |= predicate;
  if (static_cast<int>(barrier.waiting.size()) + 1 < threads) {
    wait_in(name, barrier.waiting);
    return barrier.result;
  }
  // Complete: every warp knows what any of them knew.
  SharedMemory& shared = machine.shared;
  std::vector<bool> met(machine.warps.size());
  met[current_warp()] = true;
  for (const Thread* thread : barrier.waiting) met[thread->index / 32] = true;
  Clock all{};
  for (size_t warp = 0; warp < met.size(); ++warp)
    if (met[warp]) join(all, shared.clock(warp));
  for (size_t warp = 0; warp < met.size(); ++warp)
    if (met[warp]) {
      shared.learn(warp, all);
      shared.tick(warp);
      shared.sync_lanes(warp);
    }
  barrier.result = barrier.any;
  wake(barrier.waiting);
  maybe_run_another();
  return barrier.result;
}

bool sync_threads(bool predicate) { return barrier("sync_threads", 0, machine.threads, predicate); }

// ---- cp.async ------------------------------------------------------------------------------------------------
namespace {

void land(AsyncCopy& copy) {
  if (copy.landed) return;
  if (copy.global) std::memcpy(copy.shared, copy.global, 16);
  else std::memset(copy.shared, 0, 16);
  copy.landed = true;
}

void finish_copies(std::vector<AsyncCopy>& group) {
  for (AsyncCopy& copy : group) {
    land(copy);
    machine.shared.end_copy(thread_index(), copy.shared, 16, machine.shared.time(current_warp()));
  }
  group.clear();
}

}  // namespace

void copy_async(void* shared, const void* global, bool valid) {
  if (reinterpret_cast<uintptr_t>(shared) % 16 != 0 || (valid && reinterpret_cast<uintptr_t>(global) % 16 != 0))
    fail("cp_async_16 from %p to %p: both must be aligned to 16 bytes", global, shared);
  if (valid) touch_global(block_index(), global, 16, Access::read);
  machine.shared.begin_copy(thread_index(), shared, 16, "cp_async_wait");
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

// ---- mbarrier and cp.async.bulk ------------------------------------------------------------------------------
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
  machine.mbarriers[address] = barrier;
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

void bulk_copy(void* shared, const void* global, uint32_t bytes, uint64_t* address) {
  if (bytes % 16 != 0 || reinterpret_cast<uintptr_t>(shared) % 16 != 0 || reinterpret_cast<uintptr_t>(global) % 16 != 0)
    fail("bulk_copy_to_shared of %u bytes from %p to %p: size and addresses must be multiples of 16", bytes, global,
         shared);
  touch_global(block_index(), global, bytes, Access::read);
  MBarrier& barrier = find_mbarrier(address);
  machine.shared.begin_copy(thread_index(), shared, bytes, "mbarrier_wait");
  join(barrier.gathered, machine.shared.clock(current_warp()));
  machine.bulk_copies.push_back({shared, global, bytes, address, thread_index(), machine.shared.time(current_warp())});
  machine.shared.tick(current_warp());
  if (machine.order == Order::in_turn) land_bulk_copy(machine.bulk_copies.size() - 1);
}

}  // namespace locas::simt
