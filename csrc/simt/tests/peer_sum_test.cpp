// peer_sum of one process: the others have brought their parts before it begins. On the runner only one process runs, so
// who waits for whom is not tested here, but what each reads and writes is.
#include "common/peer_params.h"

#include <cstring>
#include <memory>

#include "simt/tests/harness.h"

namespace locas::test {
namespace {

// The memory of all processes, as the one of `rank` addresses it.
struct Peers {
  int peers, rank;
  int64_t slot_bytes;
  std::vector<std::unique_ptr<simt::Buffer<unsigned char>>> memory;
  simt::Buffer<int32_t> stop{"stop", std::vector<int32_t>{0}};

  Peers(int peers, int rank, int64_t slot_bytes) : peers(peers), rank(rank), slot_bytes(slot_bytes) {
    for (int i = 0; i < peers; ++i) {
      memory.push_back(std::make_unique<simt::Buffer<unsigned char>>("memory", sizeof(PeerBox) + 2 * slot_bytes));
      std::memset(memory.back()->data(), 0, sizeof(PeerBox));
    }
  }
  PeerBox& box(int of) { return *reinterpret_cast<PeerBox*>(memory[of]->data()); }
  template <class T>
  T* slot(int of, uint32_t turn) {
    return reinterpret_cast<T*>(memory[of]->data() + sizeof(PeerBox) + turn % 2 * slot_bytes);
  }
  template <class T>
  void run(T* data, int64_t count) {
    PeerSumParams p{data, count, rank, peers, {}, slot_bytes, stop.data(), kDType<T>};
    for (int i = 0; i < peers; ++i) p.boxes[i] = memory[i]->data();
    cuda::peer_sum(p, kQueue);
  }
};

template <class T>
void check_sums(int peers, int rank, int64_t count, size_t offset) {
  Random random(count * 10 + peers);
  simt::set_seed(fresh().integer(0, kSeeds - 1));  // ten orders of 32,768 threads would take long
  Peers group(peers, rank, (count * sizeof(T) + 511) / 256 * 256);
  for (uint32_t turn = 1; turn <= 3; ++turn) {
    std::vector<std::vector<T>> parts;
    for (int i = 0; i < peers; ++i) parts.push_back(random.normals<T>(count));
    for (int i = 0; i < peers; ++i) {
      if (i == rank) continue;
      std::memcpy(group.slot<T>(i, turn), parts[i].data(), count * sizeof(T));
      for (uint32_t& arrived : group.box(rank).arrived[i]) arrived = turn;
    }
    simt::Buffer<T> data("data", parts[rank], offset);
    group.run(data.data(), count);
    std::vector<T> expected;
    for (int64_t i = 0; i < count; ++i) {
      float sum = 0.0f;
      for (const auto& part : parts) sum += ptx::to_float(part[i]);
      expected.push_back(ptx::from_float<T>(sum));
    }
    expect_equal("data", data.values(), expected);
    const T* own = group.slot<T>(rank, turn);
    expect_equal("own slot", std::vector<T>(own, own + count), parts[rank]);
    for (int block = 0; block < kPeerBlocks; ++block) {
      if (group.box(rank).done[block] != turn) fail("block %d counts %u sums", block, group.box(rank).done[block]);
      for (int i = 0; i < peers; ++i)
        if (i != rank && group.box(i).arrived[rank][block] != turn) fail("block %d does not say it to %d", block, i);
    }
  }
}

LOCAS_TEST(sums, "peer_sum") {
  const auto draw = [](auto type, size_t offset) {
    const int peers = static_cast<int>(fresh().integer(2, kMostPeers));
    const int rank = static_cast<int>(fresh().integer(0, peers - 1));
    check_sums<decltype(type)>(peers, rank, fresh().integer(1, 5000), offset);
  };
  draw(bf16{}, 8);
  draw(f16{}, 1);  // not aligned
  draw(float{}, 0);
  check_sums<bf16>(2, 1, 5 * kPeerBlocks * 512 * 8 + 3, 0);  // a second group of vectors for some threads
  return "4 cases";
}

LOCAS_TEST(stopped, "peer_sum that is told to stop") {
  Peers group(2, 0, 512);
  group.stop[0] = 1;
  simt::Buffer<float> data("data", std::vector<float>(100, 1.0f));
  group.run(data.data(), 100);
  for (const float value : data.values())
    if (!std::isnan(value)) fail("a sum without the other's part is %g", value);
  return "1 case";
}

}  // namespace
}  // namespace locas::test
