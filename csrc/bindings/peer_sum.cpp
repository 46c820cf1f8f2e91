// Binding of the sum over GPUs that read each other's memory.
#include "common/peer_params.h"

#include <vector>

#include "bindings/checks.h"
#include "bindings/dispatch.h"
#include "bindings/module.h"

namespace locas {
namespace {

void peer_sum(const TensorRef& data, const std::vector<uintptr_t>& boxes, int64_t rank, int64_t slot_bytes,
              uintptr_t stop, uintptr_t stream) {
  const Checker check("peer_sum", {"data", data});
  check.like_has_dtype({DType::f32, DType::bf16, DType::f16});
  const int64_t peers = static_cast<int64_t>(boxes.size());
  if (peers < 2 || peers > kMostPeers)
    check.fail("boxes", "has " + std::to_string(peers) + " addresses; expected 2 to " + std::to_string(kMostPeers));
  if (rank < 0 || rank >= peers)
    check.fail("rank", "is " + std::to_string(rank) + "; expected 0 to " + std::to_string(peers - 1));
  if (slot_bytes % 256 != 0 || data.numel() * data.element_size() > slot_bytes)
    check.fail("slot_bytes", "is " + std::to_string(slot_bytes) + "; expected a multiple of 256, and at least the " +
                                 std::to_string(data.numel() * data.element_size()) + " bytes of data");
  PeerSumParams p{};
  p.data = check.vector<void>({"data", data}, data.numel());
  p.count = data.numel();
  p.rank = static_cast<int>(rank);
  p.peers = static_cast<int>(peers);
  for (int64_t i = 0; i < peers; ++i) p.boxes[i] = reinterpret_cast<unsigned char*>(boxes[i]);
  p.slot_bytes = slot_bytes;
  p.stop = reinterpret_cast<const int32_t*>(stop);
  p.dtype = data.dtype;
  LOCAS_LAUNCH_CUDA(peer_sum, data, stream, p);
}

}  // namespace

void bind_peer_sum(py::module_& m) {
  m.def("peer_sum", &peer_sum, py::arg("data"), py::arg("boxes"), py::arg("rank"), py::arg("slot_bytes"),
        py::arg("stop"), py::arg("stream"));
}

}  // namespace locas
