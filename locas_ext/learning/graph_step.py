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
from .peers import Peers
from .protocol import Protocol
from .report import GraphReport
from .schedule import NoWindow
from .update import Backprop


class GraphStep(EagerStep):
    """step(window, place) -> the summed negative log-likelihood before the update; from a graph where there is one."""

    def __init__(
        self, attachment: Attachment, update: Backprop, reader: Reader, protocol: Protocol, peers: Peers | None = None
    ):
        """protocol: says which windows are full"""
        super().__init__(attachment, update, reader, peers=peers)
        self.captured = Captured(attachment, reader, protocol, self, why_not=None)

    def __call__(self, window: Window, place: str) -> float:
        self.updates += 1
        if isinstance(window, NoWindow) or not self.captured.replay(window):
            return self.eagerly(window, place)
        state = self.attachment.state
        if self.peers is not None:
            self._update(self.together(self.loss))
        loss, finite, *said = self.outcome.tolist()
        if self.peers is not None:
            loss = self.heard(said, place)
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
        said = 0 if self.peers is None else 3 * self.peers.ranks.size
        self.outcome = torch.zeros(2 + said, dtype=torch.float64, device=device)
        self.loss = torch.zeros((), dtype=torch.float32, device=device)
        if self.update.optimizer == "adamw":
            arena.optimizer_state("exp_avg"), arena.optimizer_state("exp_avg_sq")

    def rehearse(self, window: Window) -> None:
        if self.attachment.state.ranks is not None and self.reader.runs_the_host(window):
            raise RuntimeError("a host that is split among processes is captured only where kernels of ours read it")
        if self.peers is None:
            measured(gradient(self.attachment, window, self.reader), self.attachment.state)
        else:
            gradient(self.attachment, window, self.reader, formed=True)
        self.attachment.state.zero_grad()

    def run(self, window: Window) -> None:
        if self.peers is None:
            self._update(measured(gradient(self.attachment, window, self.reader), self.attachment.state))
        else:  # what others have to say comes between gradient and update: both sides may not be in graphs of theirs
            self.loss.copy_(gradient(self.attachment, window, self.reader, formed=True))

    def _update(self, numbers: torch.Tensor) -> None:
        """numbers: as `measured` gives them, and what peers said behind them. Nothing waits for the device."""
        state = self.attachment.state
        (arena,) = state.arenas
        finite, said = numbers[:2].isfinite().all(), numbers[2:]
        if self.peers is not None:
            finite &= (said[-self.peers.ranks.size :] == 0).all()
        finite = finite.long()
        OPTIMIZERS[self.update.optimizer](
            state, self.learning_rate, clip=self.attachment.config.clip, gradient_scale=1.0 / loss_scale(state), finite=finite
        )
        arena.zero_grad()
        self.outcome.copy_(torch.cat([numbers[:1].double(), finite.double()[None], said.double()]))
