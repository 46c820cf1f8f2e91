"""Locally-supported parametric memories for Hugging Face language models (arXiv 2602.05085)."""

from .config import LocasConfig
from .errors import LocasError
from .memory import (
    Chunk,
    CompressReport,
    LayerStatus,
    MemorizeReport,
    Memory,
    Snapshot,
    WriteReport,
    attach,
    load,
    memory_of,
)
from .merge import unmerge
from .optim import SlotAdamW, SlotSGD
from .version import __version__

__all__ = [
    "Chunk",
    "CompressReport",
    "LayerStatus",
    "LocasConfig",
    "LocasError",
    "MemorizeReport",
    "Memory",
    "SlotAdamW",
    "SlotSGD",
    "Snapshot",
    "WriteReport",
    "__version__",
    "attach",
    "load",
    "memory_of",
    "unmerge",
]
