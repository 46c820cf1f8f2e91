"""A host's code that is tried to find something out."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def tried() -> Iterator[None]:
    """Inside, an error ends the block and nothing else: it says something of the host. A full device memory does not."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception:  # whatever a stranger's code may raise
        return
