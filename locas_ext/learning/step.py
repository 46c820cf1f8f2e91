"""How a run reads a chunk, and how it learns it: written in closed form, as a CUDA graph, or by the eager step."""

from typing import Protocol

from locas_ext.hosts.registry import Host
from locas_ext.ops.ranks import together
from locas_ext.patching.attachment import Attachment

from .backprop import EagerStep
from .chunk import Reader, Window, WindowReader
from .cuda_graph import obstacle
from .graph_step import GraphStep
from .kept_reader import KeptReader
from .leaving import Leaving
from .peers import Peers
from .report import GraphReport
from .run_guards import quiet_host
from .settings import ResolvedSettings, ResolvedWrite
from .write import WriteStep


class Step(Protocol):
    """What a run does with each chunk, as often as it has epochs."""

    def __call__(self, window: Window, place: str) -> float:
        """Learns a window's targets. Returns their summed negative log-likelihood before."""

    def report(self) -> GraphReport:
        """How many of the updates so far were replayed from a CUDA graph."""


def reader_for(host: Host, settings: ResolvedSettings, length: int) -> Reader:
    """What reads the chunks of a run over a text of so many tokens. ValueError for a host that cannot be read so."""
    if settings.keep is None:
        return WindowReader(host, settings.context_gradient)
    with quiet_host(host.model), together(host.ranks):
        reader = KeptReader(host, settings.protocol, settings.keep, settings.epochs, length)
    if host.ranks is not None:
        reader.context.share(host.ranks)
    return reader


def step_for(
    attachment: Attachment,
    settings: ResolvedSettings,
    reader: Reader,
    peers: Peers | None = None,
    leaving: Leaving | None = None,
) -> Step:
    """The step of a run: eager wherever it cannot be captured.

    peers: those who learn in step; None: nobody; leaving: what the step says of who ends the run; None: nothing
    """
    update, why_not = settings.update, obstacle(attachment)
    if isinstance(update, ResolvedWrite):
        return WriteStep(attachment, update, reader, settings.protocol, why_not)
    if why_not is not None:
        return EagerStep(attachment, update, reader, why_not, peers, leaving)
    return GraphStep(attachment, update, reader, settings.protocol, peers, leaving)
