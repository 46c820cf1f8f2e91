"""Work on windows of a run that have one shape, captured once as a CUDA graph and replayed: the full ones.

      ids [W]  --+--> context forward -> KV cache --+
                 +--> chunk forward ----------------+--> what the work makes of it
                 +--> targets ----------------------+

Context, chunk and targets are views of one static buffer, so a step is one copy, one launch and one read. Of a context that is
kept the graph reads the rows, which stay where they are, and leaves those of the chunk. All that a replay touches lies at
fixed addresses (the arena, the host's weights); when one of them has moved, the work is captured anew. Over a kept context
windows that still grow are of one shape too: how many of the rows count is a number on the device. They have a graph of
their own, which gives way to the one of the full windows. Other windows that are not full run eagerly, as do hosts that
cannot be captured: MemorizeReport.graph says so. Before a text's last chunk, if that is shorter, the graph gives its memory
back.
"""

import warnings
from collections.abc import Callable
from typing import Any
from typing import Protocol as Interface

import torch
from torch import Tensor, nn

from locas_ext.caller import caller_stacklevel
from locas_ext.errors import is_out_of_memory
from locas_ext.hosts.split import is_split
from locas_ext.patching.attachment import Attachment
from locas_ext.patching.rehome import RehomedFFN

from .chunk import Reader, Window
from .cuda_graph import capture, rehearse
from .protocol import Protocol


class _HostTensors:
    """A host's parameters and buffers, found without a walk through its modules as long as these are the same."""

    def __init__(self, model: nn.Module):
        modules = list(model.modules())
        self.children = [(module._modules, tuple(module._modules.values())) for module in modules if module._modules]
        self.held = [tensors for module in modules for tensors in (module._parameters, module._buffers)]

    def holds(self) -> bool:
        """Whether the modules are those that were found."""
        return all(tuple(now.values()) == then for now, then in self.children)

    def addresses(self) -> list[int]:
        tensors: Any = (tensor for tensors in self.held for tensor in tensors.values() if tensor is not None)
        return [(tensor._local_tensor if is_split(tensor) else tensor).data_ptr() for tensor in tensors]


class Work(Interface):
    """What is captured."""

    def repeats(self, window: Window) -> bool:
        """Whether the memory will be of the same size at the next full window: else its graph could not be replayed."""

    def prepare(self, device: torch.device) -> None:
        """Makes what the work reads and writes besides the window, before it is captured."""

    def rehearse(self, window: Window) -> None:
        """The work as far as it changes nothing that stays."""

    def run(self, window: Window) -> None:
        """The work. Nothing in it may wait for the device."""


class Captured:
    """Attributes:
    why_not: why nothing is captured; None where it is
    replayed: how often it was
    """

    def __init__(self, attachment: Attachment, reader: Reader, protocol: Protocol, work: Work, why_not: str | None):
        """protocol: says which windows are full"""
        self.attachment, self.reader, self.protocol, self.work = attachment, reader, protocol, work
        self.why_not = why_not
        self.replayed = 0
        self.graph: Callable[[], None] | None = None
        self.left = reader.left
        reader.replayed = why_not is None
        self.captured_at: tuple = ()
        self.captured_with: list[Tensor | None] = []  # of several processes: no other tensor is taken for one of them
        self.tensors = _HostTensors(attachment.host.model)

    def replay(self, window: Window) -> bool:
        """Does the work on a window, if that has the shape of others and can be captured. -> whether it was done"""
        if self.graph is not None and len(window.inputs) < self.protocol.stride:  # the text's last, and an eager step
            self.graph = None
            torch.cuda.empty_cache()  # the graph's memory is another's than that step's
        part = self._part(window)
        if part is None:
            return False
        self.attachment.state.sync()  # changes from outside, which a forward would have noticed
        if (graph := self._captured(part)) is None:
            return False
        self.ids.copy_(torch.cat(part))
        graph()
        self.replayed += 1
        self.reader.left = self.left
        self.reader.look_ahead()
        return True

    def _part(self, window: Window) -> Window | None:
        """What a graph reads of a window, in the shape that it has for many; None for a window that is replayed from none.

        A memory must have learned something: before that the FFNs take another path.
        """
        whole_chunk = len(window.inputs) == self.protocol.stride
        if self.why_not is not None or not whole_chunk or not self.attachment.state.learned or not self.work.repeats(window):
            return None
        if window.tokens >= self.protocol.window - 1:
            return window
        return window._replace(context=window.context[:0]) if self.reader.fixes(window) else None

    def _signature(self, part: Window) -> tuple:
        """What a replay takes for granted: shapes, where everything lies that it reads or writes, and what is not a tensor."""
        attachment, (arena,) = self.attachment, self.attachment.state.arenas
        if not self.tensors.holds():
            self.tensors = _HostTensors(attachment.host.model)
        tensors = self._tensors()
        addresses = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
        if attachment.state.ranks is not None:  # another tensor may lie at the same address, in one process and not in another
            addresses += map(id, tensors)
        learning = (parameter.requires_grad for parameter in arena.parameters)
        how = attachment.attached, attachment.state.disabled, arena.used, *learning, *arena.scales
        return len(part.context), *how, *addresses, *self.tensors.addresses()

    def _tensors(self) -> list[Tensor | None]:
        """The memory's own that a replay reads or writes."""
        (arena,) = self.attachment.state.arenas
        states = [arena.step, arena.exp_avg, arena.exp_avg_sq, arena.value_gram]
        tensors = [arena.slots, arena.grad, arena.compute, arena.lengths, *states]
        return tensors + [rehomed.down for rehomed in self._rehomed_ffns()]

    def _rehomed_ffns(self) -> list[RehomedFFN]:
        return [ffn.rehomed for ffn in self.attachment.ffns if ffn.rehomed is not None and ffn.rehomed.reason is None]

    # ---- capturing -------------------------------------------------------------------------------------------
    def _captured(self, part: Window) -> Callable[[], None] | None:
        """The work's replay, captured anew where something has moved; None where it cannot be captured."""
        if self.graph is not None and self._signature(part) == self.captured_at:
            return self.graph
        self.graph = None  # its memory is free for the new one
        ranks = self.attachment.state.ranks
        try:
            self._prepare(part)
            rehearse(lambda: self.work.rehearse(self.window), self.ids.device)
            self.captured_at = self._signature(part)
            self.captured_with = [] if ranks is None else self._tensors()
            self.graph = capture(self._run, self.ids.device)
        except Exception as error:
            if ranks is not None and is_out_of_memory(error):
                raise  # of one process alone, in the middle of sums that the others wait in
            self._give_up(error)
        finally:
            self._undo_python()
        if ranks is not None and not ranks.all(self.graph is not None) and self.graph is not None:
            self._give_up("another process cannot capture it")
            self._undo_python()
        return self.graph

    def _give_up(self, why: object) -> None:
        self.graph, self.why_not = None, f"the step cannot be captured: {why}"
        message = f"memorizing continues without a CUDA graph, with the same results but slower: {why}"
        warnings.warn(message, stacklevel=caller_stacklevel())

    def _prepare(self, part: Window) -> None:
        device = self.attachment.state.arenas[0].slots.device
        self.ids = torch.cat(part).to(device)
        self.window = Window(*self.ids.split([len(ids) for ids in part]))
        self.work.prepare(device)
        for ffn in self.attachment.ffns:
            if ffn.rehomed is not None:
                ffn.rehomed.ready()

    def _run(self) -> None:
        for rehomed in self._rehomed_ffns():
            rehomed.refresh()  # always: whether a replay needs it is not known here
        self.work.run(self.window)
        self.left = self.reader.left  # held, so that every replay leaves it at the same place

    def _undo_python(self) -> None:
        """A capture runs the Python and not the kernels: what only Python noted down is not so."""
        for rehomed in self._rehomed_ffns():
            rehomed.generation = 0
        for arena in self.attachment.state.arenas:
            arena.record_versions()  # torch counts a write in place that did not take place: no change from outside
        if self.graph is None:
            self.attachment.state.zero_grad()
