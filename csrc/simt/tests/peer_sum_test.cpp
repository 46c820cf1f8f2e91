// peer_sum between processes that share memory: each runs the kernel on a runner of its own, at its own pace. The blocks
// run in order there (seed 0), since a block waits for the same block of another process.
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "common/peer_params.h"
#include "simt/tests/harness.h"

namespace locas::test {
namespace {

constexpr int64_t kSlotBytes = 1 << 20;

// The memory of all processes, as one of them addresses it.
struct Peers {
  int peers, rank;
  unsigned char* memory;  // shared
  simt::Buffer<int32_t> stop{"stop", std::vector<int32_t>{0}};

  Peers(int peers, int rank, void* shared) : peers(peers), rank(rank), memory(static_cast<unsigned char*>(shared)) {
    for (int i = 0; i < peers; ++i) simt::register_global(box(i), kBytes, "memory of " + std::to_string(i));
  }
  ~Peers() {
    for (int i = 0; i < peers; ++i) simt::unregister_global(box(i));
  }
  static constexpr size_t kBytes = sizeof(PeerBox) + 2 * kSlotBytes;
  unsigned char* box(int of) { return memory + of * kBytes; }

  template <class T>
  void run(T* data, int64_t count) {
    PeerSumParams p{data, count, rank, peers, {}, kSlotBytes, stop.data(), kDType<T>};
    for (int i = 0; i < peers; ++i) p.boxes[i] = box(i);
    cuda::peer_sum(p, kQueue);
  }
};

// One sum; the parts of all processes are known to each from the seed.
template <class T>
void check_sum(Peers& group, uint64_t seed, int64_t count, size_t offset) {
  std::vector<float> sums(count, 0.0f);
  std::vector<T> own, expected;
  for (int rank = 0; rank < group.peers; ++rank) {
    const auto part = Random(seed + rank).normals<T>(count);
    for (int64_t i = 0; i < count; ++i) sums[i] += ptx::to_float(part[i]);
    if (rank == group.rank) own = part;
  }
  for (const float sum : sums) expected.push_back(ptx::from_float<T>(sum));
  simt::Buffer<T> data("data", own, offset);
  group.run(data.data(), count);
  expect_equal("data", data.values(), expected);
}

// Sums of all kinds and sizes, one after the other: a slot is soon used again, by other blocks.
void run_process(Peers& group, uint64_t seed, int turns) {
  simt::set_seed(0);
  alarm(100);  // a process that waits forever
  Random shapes(seed), pace(seed + group.rank);
  for (int turn = 0; turn < turns; ++turn) {
    const int64_t most = kSlotBytes / (turn % 3 == 0 ? 4 : 2), count = shapes.integer(1, turn % 2 ? most : 3000);
    const size_t offset = shapes.integer(0, 1) ? 8 : 1;  // aligned or not
    usleep(static_cast<useconds_t>(pace.integer(0, 30000)));
    if (turn % 3 == 0) check_sum<float>(group, seed + 100 * turn, count, offset);
    else if (turn % 3 == 1) check_sum<bf16>(group, seed + 100 * turn, count, offset);
    else check_sum<f16>(group, seed + 100 * turn, count, offset);
  }
}

void* shared_memory(int peers) {
  void* memory = mmap(nullptr, peers * Peers::kBytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) fail("mmap");
  return memory;
}

LOCAS_TEST(processes, "peer_sum between processes") {
  const int peers = static_cast<int>(fresh().integer(2, 3)), turns = 5;
  const uint64_t seed = fresh().integer(0, 1 << 30);
  void* memory = shared_memory(peers);
  std::fflush(stdout);
  std::vector<pid_t> children;
  for (int rank = 0; rank < peers; ++rank) {
    children.push_back(fork());
    if (children.back() < 0) fail("fork");
    if (children.back() > 0) continue;
    Peers group(peers, rank, memory);
    run_process(group, seed, turns);
    _exit(0);
  }
  for (const pid_t child : children) {
    int status;
    waitpid(child, &status, 0);
    if (!WIFEXITED(status) || WEXITSTATUS(status) != 0)
      fail("process %d of %d ended with status %d", child, peers, status);
  }
  munmap(memory, peers * Peers::kBytes);
  return std::to_string(turns) + " sums of " + std::to_string(peers) + " processes";
}

LOCAS_TEST(stopped, "peer_sum that is told to stop") {
  void* memory = shared_memory(2);
  {
    Peers group(2, 0, memory);
    group.stop[0] = 1;
    simt::Buffer<float> data("data", std::vector<float>(100, 1.0f));
    group.run(data.data(), 100);
    for (const float value : data.values())
      if (!std::isnan(value)) fail("a sum without the other's part is %g", value);
  }
  munmap(memory, 2 * Peers::kBytes);
  return "1 case";
}

}  // namespace
}  // namespace locas::test
