"""How a run learns a chunk: written in closed form, as a CUDA graph, or by the eager step."""

from typing import Protocol

from locas_ext.patching.attachment import Attachment

from .backprop import EagerStep
from .chunk import Window, may_end_early
from .cuda_graph import GraphStep, obstacle
from .report import GraphReport
from .settings import ResolvedSettings, ResolvedWrite
from .write import WriteStep


class Step(Protocol):
    """What a run does with each chunk, as often as it has epochs.

    ends_early: whether a context's forward may be left midway (chunk.may_end_early)
    """

    ends_early: bool

    def __call__(self, window: Window, place: str) -> float:
        """Learns a window's targets. Returns their summed negative log-likelihood before."""

    def report(self) -> GraphReport:
        """How many of the updates so far were replayed from a CUDA graph."""


def step_for(attachment: Attachment, settings: ResolvedSettings) -> Step:
    """The step of a run: eager wherever it cannot be captured."""
    update, context_gradient = settings.update, settings.context_gradient
    ends_early = may_end_early(attachment.host.model)
    if isinstance(update, ResolvedWrite):
        return WriteStep(attachment, update, context_gradient, ends_early)
    why_not = obstacle(attachment)
    if why_not is not None:
        return EagerStep(attachment, update, context_gradient, ends_early, why_not)
    return GraphStep(attachment, update, context_gradient, ends_early, settings.protocol)
