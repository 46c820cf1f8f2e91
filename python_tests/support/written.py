"""What the tests of writing share beside the oracle."""

import torch

from support.writing import (
    IDS,
    writable,
)

STEPS = dict(window=24, stride=8, learning_rate=1e-2, progress=False)


def grown(family="opt", dtype=torch.float32):
    """13 slots of which the capacity is 16: behind a doubling there is room that is not used."""
    model, memory = writable(family, dtype, rank=8)
    memory.write(IDS[:9])
    memory.write(IDS[:6])
    assert (memory.state.used, memory.state.capacity) == (13, 16)
    return model, memory
