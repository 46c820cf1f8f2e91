"""The step by backpropagation as a CUDA graph.

      window --> loss -> backward -> finite? -> update unless not -> outcome [2]

Whether loss and gradient are finite is decided on the device, where the flag turns the update into a no-op; the host reads it
afterwards and raises.
"""

import torch

from locas_ext.patching.attachment import Attachment

from .backprop import EagerStep, check_gradient, check_loss, gradient, loss_scale, measured
from .captured import Captured
from .chunk import Reader, Window
from .optimizers import OPTIMIZERS
from .protocol import Protocol
from .report import GraphReport
from .update import Backprop


class GraphStep(EagerStep):
    """step(window, place) -> the summed negative log-likelihood before the update; from a graph where there is one."""

    def __init__(self, attachment: Attachment, update: Backprop, reader: Reader, protocol: Protocol):
        """protocol: says which windows are full"""
        super().__init__(attachment, update, reader)
        self.captured = Captured(attachment, reader, protocol, self, why_not=None)

    def __call__(self, window: Window, place: str) -> float:
        self.updates += 1
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

    # ---- what is captured ------------------------------------------------------------------------------------
    def repeats(self, window: Window) -> bool:
        return True

    def prepare(self, device: torch.device) -> None:
        (arena,) = self.attachment.state.arenas
        self.learning_rate = torch.tensor(self.update.learning_rate, dtype=torch.float64, device=device)
        self.outcome = torch.zeros(2, dtype=torch.float64, device=device)
        if self.update.optimizer == "adamw":
            arena.optimizer_state("exp_avg"), arena.optimizer_state("exp_avg_sq")

    def rehearse(self, window: Window) -> None:
        if self.attachment.state.ranks is not None and self.reader.runs_the_host(window):
            raise RuntimeError("a host that is split among processes is captured only where kernels of ours read it")
        measured(gradient(self.attachment, window, self.reader), self.attachment.state)
        self.attachment.state.zero_grad()

    def run(self, window: Window) -> None:
        state = self.attachment.state
        (arena,) = state.arenas
        numbers = measured(gradient(self.attachment, window, self.reader), state)
        finite = numbers.isfinite().all().long()
        OPTIMIZERS[self.update.optimizer](
            state, self.learning_rate, clip=self.attachment.config.clip, gradient_scale=1.0 / loss_scale(state), finite=finite
        )
        arena.zero_grad()
        self.outcome.copy_(torch.stack([numbers[0].double(), finite.double()]))
