#include "simt/runner.h"

#include <algorithm>
#include <cstdarg>
#include <cstdio>

#include "simt/machine.h"

namespace locas::simt {

Machine machine;

// ---- Scheduling ----------------------------------------------------------------------------------------------

uint64_t random_below(uint64_t n) {
  uint64_t& x = machine.random_state;  // xorshift64
  x ^= x << 13;
  x ^= x >> 7;
  x ^= x << 17;
  return (x >> 11) % n;
}

bool chance() { return machine.order == Order::random && random_below(2) == 0; }

namespace {

void land(size_t index) {
  const auto operation = std::move(machine.in_flight[index].land);
  machine.in_flight.erase(machine.in_flight.begin() + index);
  operation();
}

}  // namespace

int issue(int queue, std::function<void()> operation) {
  machine.in_flight.push_back({++machine.operations, queue, std::move(operation)});
  const int number = machine.operations;
  if (machine.order == Order::in_turn) land(machine.in_flight.size() - 1);
  return number;
}

void finish(int operation) {
  for (size_t i = 0; i < machine.in_flight.size(); ++i)
    if (machine.in_flight[i].number == operation) return land(i);
}

namespace {

void land_any() {
  size_t index = random_below(machine.in_flight.size());
  const int queue = machine.in_flight[index].queue;
  if (queue != kNoQueue)
    for (index = 0; machine.in_flight[index].queue != queue;) ++index;
  land(index);
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

// The thread that goes on; null where the block waits for the grid.
Thread* next_ready() {
  std::deque<Thread*>& ready = machine.ready;
  if (!machine.in_flight.empty() && chance()) land_any();
  while (ready.empty()) {
    if (!machine.at_grid_barrier.empty()) return nullptr;
    if (machine.in_flight.empty()) report_deadlock();
    land(0);  // as late as possible: nothing else can go on
  }
  if (machine.order == Order::random) std::swap(ready[random_below(ready.size())], ready.back());
  Thread* thread = machine.order == Order::in_turn ? ready.front() : ready.back();
  if (machine.order == Order::in_turn) ready.pop_front();
  else ready.pop_back();
  return thread;
}

// From the thread that runs to another one, or to the launcher where there is none.
void switch_to(Thread* next) {
  Thread* self = machine.current;
  machine.current = next;
  if (next != self) Fiber::switch_to(self->fiber, next ? next->fiber : machine.launcher);
}

void run_another() { switch_to(next_ready()); }

}  // namespace

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

namespace {

// A complete barrier: the warp that runs and those that waited know what any of them knew.
void synchronise_with(const std::vector<Thread*>& waiting) {
  SharedMemory& shared = machine.shared;
  std::vector<bool> met(machine.warps.size());
  met[current_warp()] = true;
  for (const Thread* thread : waiting) met[thread->index / 32] = true;
  Clock all{};
  for (size_t warp = 0; warp < met.size(); ++warp)
    if (met[warp]) join(all, shared.clock(warp));
  for (size_t warp = 0; warp < met.size(); ++warp)
    if (met[warp]) {
      shared.learn(warp, all);
      shared.tick(warp);
      shared.sync_lanes(warp);
    }
}

void exit_thread() {
  Thread& self = *machine.current;
  for (Meeting* meeting : {&machine.warps[current_warp()].meeting, &current_warpgroup().meeting}) {
    if (meeting->arrived > 0) fail("exits while %d lanes wait for it in %s", meeting->arrived, meeting->name);
    ++meeting->exited;
  }
  self.exited = true;
  forget_copies();
  switch_to(--machine.alive > 0 ? next_ready() : nullptr);
}

// A thread's fiber lives for many blocks: it runs the body once for each.
void thread_main() {
  for (;;) {
    (*machine.body)(machine.shared.data());
    exit_thread();
  }
}

void begin_block(int64_t block) {
  machine.block = block;
  while (static_cast<int>(machine.pool.size()) < machine.threads)
    machine.pool.push_back(std::make_unique<Thread>(static_cast<int>(machine.pool.size())));
  machine.shared.begin_block();
  machine.warps.assign(machine.threads / 32, Warp());
  machine.warpgroups.assign((machine.threads + 127) / 128, Warpgroup());
  for (Barrier& barrier : machine.barriers) barrier = Barrier();
  machine.ready.clear();
  for (int i = 0; i < machine.threads; ++i) {
    machine.pool[i]->exited = false;
    machine.pool[i]->knows_launch_before = machine.kind != LaunchKind::programmatic;
    machine.ready.push_back(machine.pool[i].get());
  }
  machine.alive = machine.threads;
}

// Until all its threads have ended or it waits for the grid.
void run_block() {
  machine.current = next_ready();
  Fiber::switch_to(machine.launcher, machine.current->fiber);
}

void end_block() {
  // Whoever waits for this launch relies on what it has waited for.
  if (std::none_of(machine.pool.begin(), machine.pool.begin() + machine.threads,
                   [](const auto& thread) { return thread->knows_launch_before; }))
    fail("the block ends without having waited for the launch before");
  if (!machine.in_flight.empty()) fail("the block ends with a copy or a wgmma under way");
  for (const auto& [address, barrier] : machine.mbarriers) machine.shared.release_barrier(address);
  machine.mbarriers.clear();
}

std::vector<int64_t> draw_order_of_blocks() {
  std::vector<int64_t> order(machine.blocks);
  for (int64_t i = 0; i < machine.blocks; ++i)
    order[i] = machine.order == Order::backwards ? machine.blocks - 1 - i : i;
  if (machine.order == Order::random)
    for (int64_t i = machine.blocks - 1; i > 0; --i) std::swap(order[i], order[random_below(i + 1)]);
  return order;
}

void run_one_after_the_other(size_t shared_bytes) {
  machine.shared.begin_launch(shared_bytes, machine.threads);
  for (const int64_t block : draw_order_of_blocks()) {
    begin_block(block);
    run_block();
    end_block();
  }
  machine.shared.end_launch();
}

// Each block runs until it waits for the grid; when all do, each goes on.
void run_resident(size_t shared_bytes) {
  if (machine.blocks > machine.most_resident)
    fail("a cooperative launch of %lld blocks; %d are resident at once", static_cast<long long>(machine.blocks),
         machine.most_resident);
  if (machine.resident.size() < static_cast<size_t>(machine.blocks)) machine.resident.resize(machine.blocks);
  const auto for_each_block = [](const std::function<void(int64_t)>& f) {
    for (const int64_t block : draw_order_of_blocks()) {
      std::swap<Block>(machine, machine.resident[block]);
      f(block);
      std::swap<Block>(machine, machine.resident[block]);
    }
  };
  for_each_block([&](int64_t block) {
    machine.shared.begin_launch(shared_bytes, machine.threads);
    begin_block(block);
  });
  for (int64_t waiting = machine.blocks; waiting > 0;) {
    if (waiting < machine.blocks)
      fail("deadlock: %lld blocks wait in sync_grid, the others have ended", static_cast<long long>(waiting));
    pass_grid_barrier_on_globals();
    waiting = 0;
    for_each_block([&](int64_t) {
      wake(machine.at_grid_barrier);
      run_block();
      waiting += !machine.at_grid_barrier.empty();
    });
  }
  for_each_block([](int64_t) {
    end_block();
    machine.shared.end_launch();
  });
}

}  // namespace

Thread::Thread(int index) : fiber(&thread_main), index(index) {}

void set_seed(uint64_t seed) {
  machine.seed = seed;
  machine.order = seed == 0 ? Order::in_turn : seed == 1 ? Order::backwards : Order::random;
}

void run_grid(const char* kernel, int64_t blocks, int threads, size_t shared_bytes,
              const std::function<void(unsigned char*)>& body, LaunchKind kind) {
  machine.kind = kind;
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

  begin_launch_on_globals(kind == LaunchKind::programmatic);
  if (kind == LaunchKind::cooperative) run_resident(shared_bytes);
  else run_one_after_the_other(shared_bytes);
  machine.kernel = nullptr;
}

int most_resident_blocks() { return machine.most_resident; }
void set_cooperative_launches(bool has) { machine.most_resident = has ? kMultiprocessors : 0; }

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

uint32_t shared_offset(const void* shared) {
  if (!machine.shared.contains(shared)) fail("%p as an operand in shared memory, where it is not", shared);
  return static_cast<uint32_t>(static_cast<const unsigned char*>(shared) - machine.shared.data());
}

void wait_for_launch_before() { machine.current->knows_launch_before = true; }

void touch_global(const void* address, size_t bytes, Access access) {
  touch_global(block_index(), machine.current->knows_launch_before, address, bytes, access);
}

void touch(const void* address, size_t bytes, Access access, Space space) {
  if (reinterpret_cast<uintptr_t>(address) % bytes != 0)
    fail("%s %zu bytes at %p, which is not aligned to them", access == Access::write ? "writes" : "reads", bytes,
         address);
  bool shared = space == Space::shared || (space == Space::any && machine.shared.contains(address));
  // An access to neither is reported as what it probably was.
  if (space == Space::any && !shared && !in_global(address, bytes))
    shared = machine.shared.distance(address) < distance_from_global(address);
  if (!shared) touch_global(address, bytes, access);
  else if (access == Access::write) machine.shared.write(thread_index(), address, bytes);
  else machine.shared.read(thread_index(), address, bytes);
}

void meet(Meeting& meeting, int lanes, const char* name, void* argument, WarpOperation operation) {
  const char* whole = lanes == 32 ? "warp" : "warpgroup";
  if (meeting.exited > 0) fail("%s, but %d lanes of the %s have exited", name, meeting.exited, whole);
  if (meeting.arrived == 0) {
    meeting.name = name;
    meeting.operation = operation;
  } else if (meeting.operation != operation || (meeting.name != name && std::strcmp(meeting.name, name) != 0)) {
    fail("divergent collective: %s, while other lanes of the %s are in %s", name, whole, meeting.name);
  }
  meeting.arguments[thread_index() % lanes] = argument;
  if (++meeting.arrived < lanes) return wait_in(name, meeting.waiting);
  if (operation) operation(meeting.arguments);
  meeting.arrived = 0;
  wake(meeting.waiting);
}

void warp_collective(const char* name, void* argument, WarpOperation operation) {
  meet(machine.warps[current_warp()].meeting, 32, name, argument, operation);
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
  synchronise_with(barrier.waiting);
  barrier.result = barrier.any;
  wake(barrier.waiting);
  maybe_run_another();
  return barrier.result;
}

bool sync_threads(bool predicate) { return barrier("sync_threads", 0, machine.threads, predicate); }

void sync_grid() {
  if (machine.kind != LaunchKind::cooperative) fail("sync_grid in a launch that is not cooperative");
  sync_threads();
  if (thread_index() == 0) wait_in("sync_grid", machine.at_grid_barrier);
  sync_threads();
}

}  // namespace locas::simt
