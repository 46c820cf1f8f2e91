"""One step by backpropagation: a chunk's loss, its gradient in the arenas, the update; graph_step.py captures the same."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from locas_ext.errors import LocasError
from locas_ext.patching.attachment import Attachment
from locas_ext.state.memory_state import MemoryState

from .chunk import Reader, Window
from .leaving import Leaving
from .optimizers import OPTIMIZERS
from .peers import Peers
from .report import GraphReport
from .settings import require_parameters_that_learn
from .update import Backprop

# Lifts the gradients of a float16 host out of its subnormal range; divided out before the update.
FP16_LOSS_SCALE = 1024.0


def loss_scale(state: MemoryState) -> float:
    """What the loss is multiplied by, and the gradient divided by before the update."""
    return FP16_LOSS_SCALE if state.arenas[0].compute.dtype == torch.float16 else 1.0


def by_plane(update: Backprop) -> bool:
    """Whether gate or value rows have a learning rate of their own."""
    return update.gate_learning_rate is not None or update.value_learning_rate is not None


def forms_gradient(update: Backprop) -> bool:
    """Whether the update needs the gradient itself, whatever the kernels could form it from."""
    return by_plane(update) or update.optimizer == "shampoo" or bool(update.cautious)


def rates_of(update: Backprop, planes: int, updates: int) -> list[float]:
    """The learning rates of the planes (gate, key, value, or key and value), or the only one.

    updates: that the memory has learned by
    """
    fading = 1.0 if update.decay_after is None else (1 + updates / update.decay_after) ** -0.5
    if not by_plane(update):
        return [update.learning_rate * fading]
    given = update.gate_learning_rate, update.learning_rate, update.value_learning_rate
    return [(update.learning_rate if rate is None else rate) * fading for rate in given[-planes:]]


def next_rates(update: Backprop, state: MemoryState) -> Tensor:
    """[1] or [planes] float64 on the CPU: the learning rates of a memory's next update."""
    return torch.tensor(rates_of(update, state.planes, state.version), dtype=torch.float64, device="cpu")


def gradient(attachment: Attachment, window: Window, reader: Reader, formed: bool = False) -> Tensor:
    """-> the summed loss of a window's targets; the gradient of their mean, times loss_scale(), is added into the arenas.

    formed: whether the arenas are to hold the gradient itself, whatever the update could form it from

    Only the slots get a gradient, whatever else of the host requires one. Nothing here waits for the device.
    """
    state, tokens = attachment.state, len(window.inputs)
    require_parameters_that_learn(state)  # a callback may have frozen the last one
    if reader.is_in_one(window):
        tokens += len(window.context)
    with state.accumulating(as_factors=not formed and attachment.keeps_factors(tokens)):
        loss = reader.loss(window)
        state.backward(loss * (loss_scale(state) / len(window.targets)))
    return loss.detach()


def update_slots(attachment: Attachment, update: Backprop, rates: Tensor, finite: Tensor | None = None) -> None:
    """One update from the gradient in the arenas. rates: [1] or [planes]; finite: as in `adamw_step`."""
    state = attachment.state
    clip, scale = bool(attachment.config.clip), 1.0 / loss_scale(state)
    rule = {"cautious": True} if update.cautious else {}  # sgd has no such
    OPTIMIZERS[update.optimizer](state, rates, clip=clip, gradient_scale=scale, finite=finite, **rule)


def measured(loss: Tensor, state: MemoryState, leaving: Leaving | None = None) -> Tensor:
    """[1 + number of arenas]: the loss and the norm of each arena's gradient, the same on all processes that share the memory:
    not finite where one of theirs is not. Behind that which of them leave the run."""
    numbers = torch.stack([loss.float(), *(arena.gradient_norm().to(loss.device) for arena in state.arenas)])
    if leaving is not None:
        numbers = torch.cat([numbers, leaving.flags])
    return numbers if state.ranks is None else state.ranks.agreed(numbers)


def agreed_loss(loss: Tensor, state: MemoryState) -> float:
    """A loss, the same on all processes that share the memory."""
    return (loss.float() if state.ranks is None else state.ranks.agreed(loss.detach().float().clone())).item()


def check_loss(loss: float, state: MemoryState, place: str) -> None:
    """LocasError for a loss that is not finite."""
    if not math.isfinite(loss):
        raise LocasError(f"the loss is {loss} at {place}; the memory stays at version {state.version}")


def check_gradient(finite: bool, state: MemoryState, place: str) -> None:
    """LocasError for a gradient that is not finite."""
    if not finite:
        raise LocasError(f"the gradient is not finite at {place}; the memory stays at version {state.version}")


class EagerStep:
    """step(window, place) -> the summed negative log-likelihood of a window's targets, before they are learned."""

    def __init__(
        self,
        attachment: Attachment,
        update: Backprop,
        reader: Reader,
        why_not: str | None = None,
        peers: Peers | None = None,
        leaving: Leaving | None = None,
    ):
        """why_not: why the step is not a CUDA graph; None for one that is"""
        self.attachment, self.update, self.reader, self.why_not = attachment, update, reader, why_not
        self.peers, self.leaving = peers, leaving
        self.updates = 0

    def __call__(self, window: Window, place: str) -> float:
        """LocasError, with the memory unchanged, if loss or gradient is not finite."""
        self.updates += 1
        return self.eagerly(window, place)

    def eagerly(self, window: Window, place: str) -> float:
        state = self.attachment.state
        state.sync()  # changes from outside: the forwards below do not look for them
        try:
            numbers = self._measured(window)
            loss, *norms = numbers.tolist()  # one read, as each waits for the device
            norms, said = norms[: len(state.arenas)], norms[len(state.arenas) :]
            loss = self.heard(loss, said, place)
            check_loss(loss, state, place)
            check_gradient(all(map(math.isfinite, norms)), state, place)
            update_slots(self.attachment, self.update, next_rates(self.update, state))
        finally:
            state.zero_grad()
        return loss

    def _measured(self, window: Window) -> Tensor:
        """The gradient in the arenas, and what `measured` says of it; behind that what peers say."""
        attachment, state = self.attachment, self.attachment.state
        if self.peers is None:
            return measured(gradient(attachment, window, self.reader, forms_gradient(self.update)), state, self.leaving)
        with self.telling_peers():
            loss = self.peers.turn(
                attachment.host, self.reader, window, lambda: gradient(attachment, window, self.reader, formed=True)
            )
        return self.together(loss)

    @contextmanager
    def telling_peers(self) -> Iterator[None]:
        """Around this rank's own part of a step: if it fails, the peers do not wait for it."""
        try:
            yield
        except BaseException:
            if self.peers is not None:
                self.peers.leave(self.attachment.state)
            raise

    def together(self, loss: Tensor) -> Tensor:
        """The same where the gradient of this rank's own loss is in the arenas."""
        assert self.peers is not None, "asked for by those who have some"
        said = self.peers.combined(self.attachment.state, loss)
        return torch.cat([measured(said[: self.peers.ranks.size].sum(), self.attachment.state), said])

    def heard(self, loss: float, said: list[float], place: str) -> float:
        """This rank's loss, with all that others said. LocasError where a peer's is not finite, or one is gone."""
        if self.leaving is not None:
            self.leaving.hear(said)
        if self.peers is None:
            return loss
        losses = self.peers.heard(said)
        for loss, of_rank in zip(losses, self.peers.places(place), strict=True):
            check_loss(loss, self.attachment.state, of_rank)
        return losses[self.peers.own]

    def report(self) -> GraphReport:
        return GraphReport(updates=self.updates, why_not=self.why_not)
