"""Memory that processes on the GPUs of one host show each other, and sums through it: one launch of a kernel of ours.

A process group's own sum (NCCL) is made for large messages. Those of a split host are of a few MiB, between two products on
the same stream, where what counts is how soon the next one begins. csrc/cuda/elementwise/peer_sum.cu has the picture.
"""

import os
import threading

import torch
import torch.distributed as dist
from torch import Tensor

from locas_ext import _C

from .processes import processes_of
from .types import stream_of

# Bytes that a process reads of all others in one sum. The group's own sum reads each number twice at most, whatever the
# number of processes, so that it takes the larger ones.
_MOST_READ = 16 << 20
_PATIENCE = 30.0  # seconds
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def obstacle(size: int, device: torch.device) -> str | None:
    """Why so many processes have no memory to show each other, as far as one of them knows; None: nothing known."""
    if os.environ.get("LOCAS_PEER_SUMS", "1") == "0":
        return "LOCAS_PEER_SUMS is 0"
    if device.type != "cuda":
        return f"the processes are on {device.type}"
    if _C.build_info()["cuda_architectures"] is None:
        return "this build has no CUDA kernels"
    return None if size <= _C.MOST_PEERS else f"they are {size} processes; at most {_C.MOST_PEERS} show theirs"


class PeerMemory:
    """One process's view of it. Every process of the group makes the same sums in the same order."""

    def __init__(self, group: dist.ProcessGroup, rank: int, size: int, device: torch.device):
        """Called by all of the group. RuntimeError and others where torch or the GPUs have no memory to share."""
        from torch.distributed import _symmetric_memory as symmetric  # not in every torch

        self.rank, self.size, self.device = rank, size, device
        self.slot_bytes = _MOST_READ // (size - 1) // 256 * 256
        self.memory = symmetric.empty(_C.PEER_BOX_BYTES + 2 * self.slot_bytes, dtype=torch.uint8, device=device)
        self.memory.zero_()
        self.shared = symmetric.rendezvous(self.memory, group.group_name)
        self.boxes = [int(address) for address in self.shared.buffer_ptrs]
        if self.boxes[rank] != self.memory.data_ptr():
            raise RuntimeError("torch places the memory behind others")
        self.stop = torch.zeros(1, dtype=torch.int32, device="cpu", pin_memory=True)
        torch.cuda.synchronize(device)  # its counts are 0 before somebody counts

    def watch(self, group: dist.ProcessGroup) -> None:
        """From now on no sum waits for a process that has ended: it gives NaN. Called by all of the group."""
        self.processes, stop = processes_of(group), self.stop  # not self, which would be held for ever
        self.processes.when_one_ends(lambda: stop.fill_(1))

    def takes(self, x: Tensor) -> bool:
        """Whether `add_up` sums tensors like this one; larger ones are the group's."""
        fits = x.dtype in _DTYPES and x.nbytes <= self.slot_bytes
        return fits and x.device == self.device and x.is_contiguous() and not torch.compiler.is_compiling()

    def add_up(self, x: Tensor) -> None:
        """Puts the sum of all processes' x in the place of each, the same bits everywhere. Nothing waits for the device."""
        _C.peer_sum(x.view(-1), self.boxes, self.rank, self.slot_bytes, self.stop.data_ptr(), stream_of(x))

    def adds_up(self) -> bool:
        """Whether sums come out right, tried with the largest. Called by all; ends after _PATIENCE where nobody answers."""
        numbers = torch.arange(self.slot_bytes // 4 - 3, device=self.device) % 997.0  # exact, however they are added
        guard = threading.Timer(_PATIENCE, self.stop.fill_, (1,))
        guard.start()
        try:
            for factor in range(1, 4):  # both slots, and one of them again
                added = numbers * (factor + self.rank)
                self.add_up(added)
                if not torch.equal(added, numbers * (factor * self.size + sum(range(self.size)))):
                    return False
            return True
        finally:
            guard.cancel()
