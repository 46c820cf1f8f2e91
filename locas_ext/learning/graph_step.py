"""The step by backpropagation as a CUDA graph.

      window --> loss -> backward -> finite? -> update unless not -> outcome [2]

Whether loss and gradient are finite is decided on the device, where the flag turns the update into a no-op; the host reads it
afterwards and raises.
"""

import torch

from locas_ext.patching.attachment import Attachment

from .backprop import EagerStep, check_gradient, check_loss, gradient, rates_of, update_slots
from .captured import Captured
from .chunk import Reader, Window
from .protocol import Protocol
from .report import GraphReport
from .update import Backprop


class GraphStep(EagerStep):
    """step(window, place) -> the summed negative log-likelihood before the update; from a graph where there is one."""

    def __init__(self, attachment: Attachment, update: Backprop, reader: Reader, protocol: Protocol):
        """protocol: says which windows are full"""
        super().__init__(attachment, update, reader)
        self.rates: torch.Tensor | None = None
        self.captured = Captured(attachment, reader, protocol, self, why_not=None)

    def __call__(self, window: Window, place: str) -> float:
        self.updates += 1
        self._fade()
        if not self.captured.replay(window):
            return self.eagerly(window, place)
        state = self.attachment.state
        loss, finite = self.outcome.tolist()
        check_loss(loss, state, place)
        check_gradient(bool(finite), state, place)
        state.finish_update()
        return loss

    def report(self) -> GraphReport:
        return GraphReport(self.captured.replayed, self.updates, self.captured.why_not)

    def _fade(self) -> None:
        """Brings the learning rates that the graph reads up to the memory's updates."""
        if self.rates is not None and self.update.decay_after is not None:
            state = self.attachment.state
            rates = rates_of(self.update, state.planes, state.version)
            self.rates.copy_(torch.tensor(rates, dtype=torch.float64, device="cpu"))

    # ---- what is captured ------------------------------------------------------------------------------------
    def repeats(self, window: Window) -> bool:
        return True

    def prepare(self, device: torch.device) -> None:
        state = self.attachment.state
        (arena,) = state.arenas
        rates = rates_of(self.update, state.planes, state.version)
        self.rates = torch.tensor(rates, dtype=torch.float64, device=device)  # of one address: a new rate needs no new graph
        self.outcome = torch.zeros(2, dtype=torch.float64, device=device)
        if self.update.optimizer == "adamw":
            arena.optimizer_state("exp_avg"), arena.optimizer_state("exp_avg_sq")

    def rehearse(self, window: Window) -> None:
        gradient(self.attachment, window, self.reader, self.update)
        self.attachment.state.zero_grad()

    def run(self, window: Window) -> None:
        (arena,) = self.attachment.state.arenas
        assert self.rates is not None, "prepare() makes them"
        loss = gradient(self.attachment, window, self.reader, self.update)
        finite = (loss.isfinite() & arena.gradient_norm().isfinite()).long()
        update_slots(self.attachment, self.update, self.rates, finite)
        arena.zero_grad()
        self.outcome.copy_(torch.stack([loss.double(), finite.double()]))
