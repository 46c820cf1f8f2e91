"""Locally-supported parametric memories for Hugging Face language models (arXiv 2602.05085).

Names are imported when they are first used, so `import locas_ext` alone does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from locas_ext.version import __version__

if TYPE_CHECKING:
    import locas_ext.ops as ops
    import locas_ext.reference as reference
    from locas_ext.config import LocasConfig
    from locas_ext.errors import DivergenceWarning, LocasError
    from locas_ext.learning.slot_optimizers import SlotAdamW, SlotSGD
    from locas_ext.memory import (
        Backprop,
        Chunk,
        CompressReport,
        Divergence,
        GraphReport,
        Keep,
        LayerStatus,
        LossAbove,
        MemorizeReport,
        Memory,
        Snapshot,
        StudyReport,
        StudySettings,
        TextRecord,
        TopLoss,
        Write,
        WriteReport,
    )
    from locas_ext.memory.attach import attach, load, memory_of
    from locas_ext.transforms.merge import unmerge

__all__ = [
    "Backprop",
    "Chunk",
    "CompressReport",
    "Divergence",
    "DivergenceWarning",
    "GraphReport",
    "Keep",
    "LayerStatus",
    "LocasConfig",
    "LocasError",
    "LossAbove",
    "MemorizeReport",
    "Memory",
    "SlotAdamW",
    "SlotSGD",
    "Snapshot",
    "StudyReport",
    "StudySettings",
    "TextRecord",
    "TopLoss",
    "Write",
    "WriteReport",
    "__version__",
    "attach",
    "load",
    "memory_of",
    "ops",
    "reference",
    "unmerge",
]

_FROM = {
    "config": ("LocasConfig",),
    "errors": ("DivergenceWarning", "LocasError"),
    "learning.slot_optimizers": ("SlotAdamW", "SlotSGD"),
    "memory": (
        "Backprop",
        "Chunk",
        "CompressReport",
        "Divergence",
        "GraphReport",
        "Keep",
        "LayerStatus",
        "LossAbove",
        "MemorizeReport",
        "Memory",
        "Snapshot",
        "StudyReport",
        "StudySettings",
        "TextRecord",
        "TopLoss",
        "Write",
        "WriteReport",
        "attach",
        "load",
        "memory_of",
    ),
    "transforms.merge": ("unmerge",),
}
_MODULE_OF = {name: module for module, names in _FROM.items() for name in names}
_MODULES = ("ops", "reference")  # reached as locas_ext.ops.glu_ffn without an import of their own


def __getattr__(name: str) -> object:
    """Imports a public name, or a module that the documentation reaches through the package."""
    if name in _MODULE_OF:
        value = getattr(import_module(f"locas_ext.{_MODULE_OF[name]}"), name)
    elif name in _MODULES:
        value = import_module(f"locas_ext.{name}")
    elif name == "_C":
        try:
            value = import_module("locas_ext._C")
        except ModuleNotFoundError:
            raise ImportError('locas_ext is not built here; run pip install . (README.md, "Building")') from None
    else:
        raise AttributeError(f"module 'locas_ext' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
