"""Locally-supported parametric memories for Hugging Face language models (arXiv 2602.05085)."""

from locas_ext.config import LocasConfig
from locas_ext.errors import LocasError
from locas_ext.learning.optimizers import SlotAdamW, SlotSGD
from locas_ext.memory import (
    Backprop,
    Chunk,
    CompressReport,
    GraphReport,
    LayerStatus,
    LossAbove,
    MemorizeReport,
    Memory,
    Snapshot,
    TextRecord,
    TopLoss,
    Write,
    WriteReport,
    attach,
    load,
    memory_of,
)
from locas_ext.transforms.merge import unmerge
from locas_ext.version import __version__

__all__ = [
    "Backprop",
    "Chunk",
    "CompressReport",
    "GraphReport",
    "LayerStatus",
    "LocasConfig",
    "LocasError",
    "LossAbove",
    "MemorizeReport",
    "Memory",
    "SlotAdamW",
    "SlotSGD",
    "Snapshot",
    "TextRecord",
    "TopLoss",
    "Write",
    "WriteReport",
    "__version__",
    "attach",
    "load",
    "memory_of",
    "unmerge",
]
