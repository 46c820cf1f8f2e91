"""The memorizing step as a CUDA graph: all full windows of a run have one shape, so their step is captured once and replayed.

      ids [W]  --+--> context forward -> KV cache --+
                 +--> chunk forward ----------------+--> loss -> backward -> finite? -> update unless not -> outcome [2]

Context, chunk and targets are views of one static buffer, so a step is one copy, one launch and one read. Of a context that is
kept the graph reads the rows, which stay where they are, and leaves those of the chunk. Whether loss and
gradient are finite is decided on the device, where the flag turns the update into a no-op; the host reads it afterwards and
raises. All that a replay touches lies at fixed addresses (the arena, the host's weights); when one of them has moved, the
step is captured anew. Windows that are not full run eagerly, as do hosts that cannot be captured: MemorizeReport.graph
says so.
"""

import functools
import os
import warnings
from collections.abc import Callable
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import masking_utils, modeling_utils

from locas_ext.caller import caller_stacklevel
from locas_ext.patching.attachment import Attachment

from .backprop import EagerStep, check_gradient, check_loss, gradient, loss_scale
from .chunk import Reader, Window
from .optimizers import OPTIMIZERS
from .protocol import Protocol
from .report import GraphReport
from .run_guards import surrounded
from .update import Backprop


def obstacle(attachment: Attachment) -> str | None:
    """Why this memory's step cannot be captured, or None."""
    state, model = attachment.state, attachment.host.model
    if os.environ.get("LOCAS_CUDA_GRAPH", "1") == "0":
        return "LOCAS_CUDA_GRAPH is 0"
    devices = {parameter.device for parameter in model.parameters()}  # slots follow their layers at the next forward
    if len(devices) > 1 or len(state.arenas) > 1:
        return f"the host lies on several devices ({', '.join(sorted(map(str, devices)))})"
    if not _is_capturable(device := devices.pop()):
        return f"the host is on {device}"
    if attachment.backend == "reference" or model.dtype == torch.float64:
        return "the reference backend waits for the device"
    if torch.is_autocast_enabled(device.type):
        return "autocast is on"
    if (why := surrounded(model)) is not None:
        return why
    for name, module in model.named_modules():
        hooks = [*module._forward_pre_hooks, *module._forward_hooks, *module._backward_hooks, *module._backward_pre_hooks]
        if set(hooks) - attachment.hook_ids():
            return f"{name or 'the model'} has hooks"
    return None


def _is_capturable(device: torch.device) -> bool:
    return device.type == "cuda"


# ---- what CUDA does -------------------------------------------------------------------------------------------
@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """Rehearsal and capture share a stream, so that cuBLAS's workspace for it is not part of any graph's memory."""
    return torch.cuda.Stream(device)


@contextmanager
def _error_at_synchronization():
    """RuntimeError at the end if torch waited for the device inside, which a captured stream may not."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")  # "error" would also hit other threads
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)
    for warning in caught:
        if "synchronizing CUDA" in str(warning.message):
            raise RuntimeError(f"{warning.filename}:{warning.lineno} waits for the device")


@contextmanager
def _as_in_a_capture():
    """Inside, transformers does what it does while a stream is captured: it makes every attention mask and leaves out its
    warnings, instead of reading from the device whether they are needed."""
    modules = [module for module in (masking_utils, modeling_utils) if hasattr(module, "is_tracing")]
    originals = [module.is_tracing for module in modules]
    for module in modules:
        module.is_tracing = lambda tensor=None: True
    try:
        yield
    finally:
        for module, original in zip(modules, originals, strict=True):
            module.is_tracing = original


def rehearse(work: Callable[[], None], device: torch.device) -> None:
    """Runs the work once on a side stream: libraries set themselves up, and what cannot be captured is an error here.

    A failed capture would leave torch's random generator unusable; a failed rehearsal leaves nothing.
    """
    current, side = torch.cuda.current_stream(device), _stream(device)
    side.wait_stream(current)
    try:
        with torch.cuda.stream(side), _as_in_a_capture(), _error_at_synchronization():
            work()
    finally:
        current.wait_stream(side)


def capture(work: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """-> a function that does the work again, on the same tensors."""
    graph = torch.cuda.CUDAGraph()
    # thread_local: other threads may go on using the device
    with torch.cuda.device(device), torch.cuda.graph(graph, stream=_stream(device), capture_error_mode="thread_local"):
        work()
    return graph.replay


# ---- the step -------------------------------------------------------------------------------------------------
class _HostTensors:
    """A host's parameters and buffers, found without a walk through its modules as long as these are the same."""

    def __init__(self, model: nn.Module):
        self.model = model
        modules = list(model.modules())
        self.children = [(module._modules, tuple(module._modules.values())) for module in modules if module._modules]
        self.held = [tensors for module in modules for tensors in (module._parameters, module._buffers)]

    def holds(self) -> bool:
        """Whether the modules are those that were found."""
        return all(tuple(now.values()) == then for now, then in self.children)

    def addresses(self) -> list[int]:
        return [0 if tensor is None else tensor.data_ptr() for tensors in self.held for tensor in tensors.values()]


class GraphStep(EagerStep):
    """step(window, place) -> the summed negative log-likelihood before the update; from a graph where there is one."""

    def __init__(self, attachment: Attachment, update: Backprop, reader: Reader, protocol: Protocol):
        """protocol: says which windows are full"""
        super().__init__(attachment, update, reader)
        self.protocol = protocol
        self.replayed = 0
        self.replay: Callable[[], None] | None = None
        self.left = reader.left
        self.captured_at: tuple = ()
        self.tensors = _HostTensors(attachment.host.model)

    def __call__(self, window: Window, place: str) -> float:
        self.updates += 1
        replay = self._captured(window) if self._takes(window) else None
        if replay is None:
            return self.eagerly(window, place)
        state = self.attachment.state
        state.sync()  # changes from outside, which a forward would have noticed
        self.ids.copy_(torch.cat(window))
        replay()
        self.reader.left = self.left
        self.reader.look_ahead()
        loss, finite = self.outcome.tolist()
        check_loss(loss, state, place)
        check_gradient(bool(finite), state, place)
        state.finish_update()
        self.replayed += 1
        return loss

    def report(self) -> GraphReport:
        return GraphReport(self.replayed, self.updates, self.why_not)

    def _takes(self, window: Window) -> bool:
        """Full windows of a memory that has learned something: before that the FFNs take another path."""
        full = len(window.inputs) == self.protocol.stride
        full = full and len(window.context) + len(window.inputs) >= self.protocol.window - 1
        return self.why_not is None and full and self.attachment.state.learned

    def _signature(self) -> tuple:
        """What a replay takes for granted: where everything lies that it reads or writes, and what is not a tensor."""
        attachment, (arena,) = self.attachment, self.attachment.state.arenas
        if not self.tensors.holds():
            self.tensors = _HostTensors(attachment.host.model)
        tensors = [arena.slots, arena.grad, arena.compute, arena.step, arena.exp_avg, arena.exp_avg_sq]
        tensors += [home.down for home in self._homes()]
        addresses = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
        learning = (parameter.requires_grad for parameter in arena.parameters)
        how = attachment.attached, attachment.state.disabled, arena.used, *learning, *arena.scales
        return *how, *addresses, *self.tensors.addresses()

    def _homes(self) -> list:
        return [ffn.home for ffn in self.attachment.ffns if ffn.home is not None and ffn.home.away is None]

    # ---- capturing -------------------------------------------------------------------------------------------
    def _captured(self, window: Window) -> Callable[[], None] | None:
        """The step's replay, captured anew where something has moved; None where it cannot be captured."""
        if self.replay is not None and self._signature() == self.captured_at:
            return self.replay
        self.replay = None  # its memory is free for the new one
        try:
            self._prepare(window)
            rehearse(self._rehearsal, self.ids.device)
            self.captured_at = self._signature()
            self.replay = capture(self._work, self.ids.device)
        except Exception as error:
            self.why_not = f"the step cannot be captured: {error}"
            message = f"memorizing goes on without a CUDA graph, with the same results but slower: {error}"
            warnings.warn(message, stacklevel=caller_stacklevel())
        finally:
            self._undo_python(captured=self.replay is not None)
        return self.replay

    def _prepare(self, window: Window) -> None:
        (arena,) = self.attachment.state.arenas
        device = arena.slots.device
        self.ids = torch.cat(window).to(device)
        self.window = Window(*self.ids.split([len(part) for part in window]))
        self.learning_rate = torch.tensor(self.update.learning_rate, dtype=torch.float64, device=device)
        self.outcome = torch.zeros(2, dtype=torch.float64, device=device)
        if self.update.optimizer == "adamw":
            arena.state("exp_avg"), arena.state("exp_avg_sq")
        for ffn in self.attachment.ffns:
            if ffn.home is not None:
                ffn.home.ready()

    def _gradient(self) -> Tensor:
        return gradient(self.attachment, self.window, self.reader)

    def _rehearsal(self) -> None:
        self._gradient()
        self.attachment.state.zero_grad()

    def _work(self) -> None:
        (arena,) = self.attachment.state.arenas
        for home in self._homes():
            home.refresh()  # always: whether a replay needs it is not known here
        loss = self._gradient()
        self.left = self.reader.left  # held, so that every replay leaves it at the same place
        finite = (loss.isfinite() & arena.gradient_norm().isfinite()).long()
        state = self.attachment.state
        OPTIMIZERS[self.update.optimizer](
            state, self.learning_rate, clip=self.attachment.config.clip, gradient_scale=1.0 / loss_scale(state), finite=finite
        )
        arena.zero_grad()
        self.outcome.copy_(torch.stack([loss.double(), finite.double()]))

    def _undo_python(self, captured: bool) -> None:
        """A capture runs the Python and not the kernels: what only Python noted down is not so."""
        for home in self._homes():
            home.generation = 0
        if not captured:
            self.attachment.state.zero_grad()
