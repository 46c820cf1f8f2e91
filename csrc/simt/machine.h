// The runner's own state, for its parts only: runner.cpp schedules, asynchronous.cpp copies, wgmma.cpp multiplies.
#pragma once

#include <deque>
#include <functional>
#include <memory>
#include <vector>

#include "simt/fiber.h"
#include "simt/runner.h"

namespace locas::simt {

struct AsyncCopy {  // of cp.async
  void* shared;
  const void* global;  // null: zeros
  bool landed;
};

struct BulkStore {
  int operation;  // its number
  std::vector<const void*> pieces;
};

struct Thread {
  explicit Thread(int index);
  Fiber fiber;
  int index;
  bool exited = true;
  bool knows_launch_before = true;  // has waited for the launch before it, or need not
  const char* waits_in = nullptr;
  std::vector<AsyncCopy> open_copies;                    // not committed yet
  std::vector<std::vector<AsyncCopy>> committed_copies;  // oldest first
  std::vector<BulkStore> open_stores;
  std::vector<std::vector<BulkStore>> committed_stores;
};

// Lanes that do one thing together.
struct Meeting {
  const char* name = nullptr;
  WarpOperation operation = nullptr;
  int arrived = 0, exited = 0;
  void* arguments[128];
  std::vector<Thread*> waiting;
};
void meet(Meeting& meeting, int lanes, const char* name, void* argument, WarpOperation operation);

struct Warp {
  Meeting meeting;
};

// The sums that a warpgroup's wgmma add to. The registers hold NaN as long as one is under way.
struct WgmmaSums {
  int n, pending;             // columns; operations that no wait has covered
  std::vector<float> values;  // [64, n]
  float* registers[128];      // of each thread, [n / 2]
};

struct Wgmma {
  int operation;  // its number
  float* key;     // thread 0's registers: which sums
  std::vector<const void*> pieces;
};

struct Warpgroup {
  Meeting meeting;
  bool fenced = false;  // since the last commit
  std::map<float*, WgmmaSums> sums;
  std::vector<Wgmma> open;
  std::deque<std::vector<Wgmma>> committed;
};

struct Barrier {
  int expected = 0;
  bool any = false, result = false;
  std::vector<Thread*> waiting;
};

struct MBarrier {
  int count, pending;            // arrivals of a phase, and those still missing
  bool fenced = false;           // whether bulk copies may use it
  int initialiser = 0;           // thread
  int64_t bytes = 0;             // announced less landed
  uint32_t parity = 0;           // of the phase that is under way
  Clock gathered{}, released{};  // what the arriving warps knew, in this phase and in the one before
  std::vector<Thread*> waiting;
};

// Something asynchronous that has been issued and has not happened yet. Operations of one queue happen in their order.
constexpr int kNoQueue = -1;
struct InFlight {
  int number, queue;
  std::function<void()> land;
};

constexpr int kBarriers = 16;

enum class Order { in_turn, backwards, random };

// One block and its threads, which are kept for the next one.
struct Block {
  int64_t block = 0;  // its index
  SharedMemory shared;
  std::vector<std::unique_ptr<Thread>> pool;
  std::deque<Thread*> ready;
  Thread* current = nullptr;
  int alive = 0;
  std::vector<Warp> warps;
  std::vector<Warpgroup> warpgroups;
  Barrier barriers[kBarriers];
  std::map<const uint64_t*, MBarrier> mbarriers;
  std::vector<InFlight> in_flight;
  std::vector<Thread*> at_grid_barrier;  // thread 0, on behalf of the block
};

// Everything about the launch that runs, and the block that runs.
struct Machine : Block {
  uint64_t seed = 0, random_state = 0;
  Order order = Order::in_turn;

  const char* kernel = nullptr;  // null between launches
  const std::function<void(unsigned char*)>* body = nullptr;
  int64_t blocks = 0;
  int threads = 0;
  LaunchKind kind = LaunchKind::ordinary;

  std::deque<Block> resident;  // of a cooperative launch; the one that runs has changed places with what is above
  int most_resident = kMultiprocessors;
  Fiber launcher;
  int operations = 0;  // issued so far
};

extern Machine machine;

uint64_t random_below(uint64_t n);
bool chance();

inline int current_warp() { return machine.current->index / 32; }
inline Warpgroup& current_warpgroup() { return machine.warpgroups[machine.current->index / 128]; }

void wait_in(const char* what, std::vector<Thread*>& waiting);
void wake(std::vector<Thread*>& waiting);

// Issues an operation, which may happen at once; returns its number. finish: makes it happen now if it has not.
int issue(int queue, std::function<void()> land);
void finish(int operation);

// Where hardware puts the 16-byte piece that would lie at `shared` without a swizzle. asynchronous.cpp.
const unsigned char* swizzled(const unsigned char* shared, int swizzle_bytes);

// touch_global of the block and thread that run.
void touch_global(const void* address, size_t bytes, Access access);

// What a thread that exits leaves behind: copies that nobody waited for. asynchronous.cpp.
void forget_copies();

}  // namespace locas::simt
