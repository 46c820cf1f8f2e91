// Launch parameters of peer_sum, and what lies in the memory that processes on several GPUs read of each other.
#pragma once

#include "common/types.h"

namespace locas {

constexpr int kMostPeers = 8;
constexpr int kPeerBlocks = 64;  // of every launch, whatever its size: they count alike on all GPUs

// The beginning of a process's memory, zeros at first. Behind it lie two slots of slot_bytes, used by turns: when a slot
// is written again, every peer has begun the sum in between, so it has read what lay there.
struct alignas(256) PeerBox {
  uint32_t arrived[kMostPeers][kPeerBlocks];  // written by each peer: how many sums its block has brought its part to
  uint32_t done[kPeerBlocks];                 // how many sums this process's own block has begun
};

// data = the sum of all processes' data, the same bits on all of them: added in the order of ranks, in float. A process
// that waits and finds *stop not 0 gives NaN instead.
struct PeerSumParams {
  void* data;  // [count], contiguous; count * element size at most slot_bytes
  int64_t count;
  int rank, peers;
  unsigned char* boxes[kMostPeers];  // each process's memory, as this one addresses it; by rank
  int64_t slot_bytes;                // a multiple of 256
  const int32_t* stop;               // where both the host and the kernel reach it
  DType dtype;
};

}  // namespace locas
