"""Closed-form writing of a Locas-MLP memory: one slot per token and layer, without training (docs/method.md, "Writing").

A, the FFN's input where the token is predicted    G, the gradient there        (token_gradients.py)
            |                                                 |
  key = A / ||A||                                    value = epsilon G / ||G||
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from locas_ext.checks import boolean
from locas_ext.errors import LocasError
from locas_ext.hosts.sharding import companions
from locas_ext.ops import write_slots_
from locas_ext.patching.attachment import Attachment
from locas_ext.transforms.compress import compress_slots

from .backprop import check_loss, loss_scale
from .captured import Captured
from .chunk import Reader, Window, WindowReader
from .inputs import TokenIds, require_same, token_ids
from .protocol import Protocol
from .report import GraphReport
from .room import NO_LIMIT, Room
from .run_guards import interrupt_between_chunks, quiet_host
from .selectors import LossAbove, TopLoss, check_positions
from .settings import ResolvedWrite
from .text_digest import text_digest
from .texts import learned_now
from .token_gradients import TokenGradients, token_gradients
from .update import Write


@dataclass(frozen=True)
class WriteReport:
    """What a `Memory.write` call wrote.

    Attributes:
        tokens: the positions in input_ids of the tokens that got a slot, ascending
        nll: their summed negative log-likelihood before, in nats
        gradient_norm: each token's ||G||, the norm of its log-likelihood's gradient over all layers
        slots_used: how many slots each layer holds now

    >>> import locas_ext as locas
    >>> from locas_ext.hosts.tiny import tiny_host
    >>> memory = locas.attach(tiny_host(gated=False), locas.LocasConfig("mlp", rank=4))
    >>> report = memory.write([5, 9, 13, 17], tokens=[1, 3])
    >>> report.tokens, report.slots_used
    ([1, 3], 2)
    """

    tokens: list[int]
    nll: float
    gradient_norm: list[float]
    slots_used: int


def _make_room(attachment: Attachment, count: int, room: Room) -> None:
    state = attachment.state
    room.check(state.used, count)
    if state.used + count > room.capacity:
        if room.when_full == "compress":
            compress_slots(state, attachment.ffns[0].activation, room.compress_to)
        else:
            state.drop_oldest(state.used + count - room.capacity)
    needed = state.used + count
    if needed > state.capacity:
        state.resize(max(needed, 2 * state.capacity) if room.capacity == NO_LIMIT else room.capacity)


def _new_slots(found: TokenGradients, epsilon: float) -> tuple[list[Tensor], list[Tensor]]:
    """Per arena the slots [l, 2, n, d] and their gradient norms [n], NaN where something is not finite."""
    joint = None
    if len(found.gradients) > 1:  # an arena does not see the others' layers
        device = found.gradients[0].device
        squares = [gradients.double().square().sum((0, 2)).to(device) for gradients in found.gradients]
        joint = torch.stack(squares).sum(0).sqrt().float()
    slots, norms = [], []
    for inputs, gradients in zip(found.inputs, found.gradients, strict=False):  # without a chosen token no gradients
        dtype = torch.float32 if gradients.dtype == torch.float64 else gradients.dtype
        layers, n, d = gradients.shape
        slots.append(torch.empty(layers, 2, n, d, dtype=torch.float32, device=gradients.device))
        norm = None if joint is None else joint.to(gradients.device)
        norms.append(write_slots_(slots[-1], 0, inputs.to(dtype), gradients.to(dtype), epsilon, None, norm))
    return slots, norms


@dataclass(frozen=True)
class _Found:
    """What is to be written of a window: per arena slots [l, 2, n, d], and every number that Python has to see, [m].

    count: how many targets are chosen
    """

    count: int
    slots: list[Tensor]
    numbers: Tensor


def _find(attachment: Attachment, write: ResolvedWrite, window: Window, reader: Reader, exact: bool = False) -> _Found:
    """Waits for the device only to choose."""
    found = token_gradients(attachment, window, write.tokens, exact, reader)
    slots, norms = _new_slots(found, write.epsilon)
    # One read of all the numbers, as each read waits for the device; float64 holds indices too.
    numbers = [found.chosen, found.nll, *(norm.to(found.nll.device) for norm in norms)]
    return _Found(len(found.chosen), slots, torch.cat([tensor.double() for tensor in numbers]))


def _write(attachment: Attachment, room: Room, found: _Found, targets: int, place: str) -> tuple[WriteReport, float]:
    """Writes a slot for each chosen one of so many targets behind the slots there are: one update if any is chosen.

    Returns what was written, and the summed loss of all targets before. LocasError, with nothing written, if the loss,
    an input or a gradient is not finite.
    """
    state, count = attachment.state, found.count
    values = found.numbers.tolist()
    chosen = [int(index) for index in values[:count]]
    nll, norms = values[count:][:targets], values[count + targets :]
    loss = math.fsum(nll)
    check_loss(loss, state, place)
    if not all(map(math.isfinite, norms)):
        raise LocasError(
            f"the gradient is not finite at {place}, so nothing was written; the memory stays at version {state.version}"
        )
    if count:
        _make_room(attachment, count, room)
        state.append(found.slots)
    scale = loss_scale(state)
    return WriteReport(
        tokens=[index + 1 for index in chosen],
        nll=math.fsum(nll[index] for index in chosen),
        gradient_norm=[norm / scale for norm in norms[:count]],
        slots_used=state.used,
    ), loss


class WriteStep:
    """A chunk's turn in a run that writes: step(window, place) -> the summed loss, before it is written.

    Where a memory has as many slots before each chunk, what is to be written comes from a CUDA graph: a full one, of which
    the oldest slots give way. While it grows, and where it is not known how many tokens are written, it does not.
    """

    def __init__(
        self, attachment: Attachment, update: ResolvedWrite, reader: Reader, protocol: Protocol, why_not: str | None = None
    ):
        """why_not: why no step is a CUDA graph; None where one may be"""
        self.attachment, self.update, self.reader = attachment, update, reader
        if isinstance(update.tokens, LossAbove):
            why_not = why_not or "how many tokens are written is known only when they are scored"
        self.captured = Captured(attachment, reader, protocol, self, why_not)
        self.updates = 0

    def __call__(self, window: Window, place: str) -> float:
        self.updates += 1
        replayed = self.captured.replay(window)
        found = self.found if replayed else _find(self.attachment, self.update, window, self.reader)
        return _write(self.attachment, self.update.room, found, len(window.targets), place)[1]

    def report(self) -> GraphReport:
        why_not = self.captured.why_not
        if why_not is None and not self.captured.replayed:
            why_not = "the memory did not keep one size over full windows"
        return GraphReport(self.captured.replayed, self.updates, why_not)

    # ---- what is captured ------------------------------------------------------------------------------------
    def repeats(self, window: Window) -> bool:
        """Decided by numbers alone, so that a resumed run goes the same ways."""
        used, room, tokens = self.attachment.state.used, self.update.room, self.update.tokens
        count = min(tokens.n, len(window.targets)) if isinstance(tokens, TopLoss) else len(window.targets)
        return room.after(used, count) == used

    def prepare(self, device: torch.device) -> None:
        """What is found has places of its own."""

    def rehearse(self, window: Window) -> None:
        _find(self.attachment, self.update, window, self.reader)

    def run(self, window: Window) -> None:
        self.found = _find(self.attachment, self.update, window, self.reader)


def write(attachment: Attachment, input_ids: TokenIds, tokens: object, exact: object, request: Write) -> WriteReport:
    """See `Memory.write`. request: all but the tokens, which here may be positions too."""
    host, state = attachment.host, attachment.state
    ids = token_ids(input_ids, host.vocab_size, at_least=2)
    if len(ids) > host.max_positions:
        raise ValueError(
            f"input_ids holds {len(ids)} tokens; expected at most {host.max_positions}, the host's positions: a longer text is "
            "for memorize(update='write')"
        )
    exact = boolean("exact", exact)
    require_same(companions(host.model), ids, (request, str(tokens), exact))
    state.sync()
    room = Room.of(request, state.hidden_size, state.used)
    resolved = ResolvedWrite(request.epsilon, check_positions(tokens, len(ids)), room)
    if isinstance(resolved.tokens, tuple) or resolved.tokens == "all":
        room.check(state.used, len(resolved.tokens) if isinstance(resolved.tokens, tuple) else len(ids) - 1)
    with (
        attachment.exclusive("write"),
        interrupt_between_chunks() as check_interrupt,
        quiet_host(host.model),
        torch.inference_mode(False),
        torch.enable_grad(),
    ):
        window = Window(ids[:0], ids[:-1], ids[1:])
        found = _find(attachment, resolved, window, WindowReader(host), exact)
        report, _ = _write(attachment, room, found, len(window.targets), f"tokens 1 to {len(ids) - 1}")
        if report.tokens:
            attachment.texts.append(learned_now(None, text_digest(ids), len(ids)))
        check_interrupt()
    return report
