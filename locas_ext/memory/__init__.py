"""The public face: a model gets a memory (attach.py), and what can be done with it (memory.py)."""

from locas_ext.learning.keep import Keep
from locas_ext.learning.report import Divergence, GraphReport, MemorizeReport
from locas_ext.learning.selectors import LossAbove, TopLoss
from locas_ext.learning.study.report import StudyReport
from locas_ext.learning.study.settings import StudySettings
from locas_ext.learning.update import Backprop, Write
from locas_ext.learning.write import WriteReport
from locas_ext.state.stream import Chunk, TextRecord
from locas_ext.storage.snapshot import Snapshot
from locas_ext.transforms.compress import CompressReport

from .attach import attach, load, memory_of
from .memory import Memory
from .status import LayerStatus

__all__ = [
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
]
