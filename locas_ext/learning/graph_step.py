"""The step by backpropagation as a CUDA graph.

      window --> loss -> backward -> finite? -> update unless not -> outcome [2]

Whether loss and gradient are finite is decided on the device, where the flag turns the update into a no-op; the host reads it
afterwards and raises.
"""

import torch

from locas_ext.patching.attachment import Attachment

from .backprop import EagerStep, check_gradient, check_loss, forms_gradient, gradient, measured, next_rates, update_slots
from .captured import Captured
from .chunk import Reader, Window
from .leaving import Leaving
from .peers import Peers
from .protocol import Protocol
from .report import GraphReport
from .schedule import NoWindow
from .update import Backprop


class GraphStep(EagerStep):
    """step(window, place) -> the summed negative log-likelihood before the update; from a graph where there is one."""

    def __init__(
        self,
        attachment: Attachment,
        update: Backprop,
        reader: Reader,
        protocol: Protocol,
        peers: Peers | None = None,
        leaving: Leaving | None = None,
    ):
        """protocol: says which windows are full"""
        super().__init__(attachment, update, reader, peers=peers, leaving=leaving)
        self.rates: torch.Tensor | None = None
        self.captured = Captured(attachment, reader, protocol, self, why_not=None)

    def __call__(self, window: Window, place: str) -> float:
        self.updates += 1
        with self.telling_peers():
            self._fade()
            replayed = not isinstance(window, NoWindow) and self.captured.replay(window)
        if not replayed:
            return self.eagerly(window, place)
        state = self.attachment.state
        if self.peers is not None:
            self._update(self.together(self.loss))
        loss, finite, *said = self.outcome.tolist()
        loss = self.heard(loss, said, place)
        check_loss(loss, state, place)
        check_gradient(bool(finite), state, place)
        state.finish_update()
        return loss

    def report(self) -> GraphReport:
        return GraphReport(self.captured.replayed, self.updates, self.captured.why_not)

    def _fade(self) -> None:
        """Brings the learning rates that the graph reads up to the memory's updates."""
        if self.update.decay_after is None:
            return
        self.attachment.state.sync()  # a change from outside counts as an update
        if self.rates is not None:
            self.rates.copy_(next_rates(self.update, self.attachment.state))

    # ---- what is captured ------------------------------------------------------------------------------------
    def repeats(self, window: Window) -> bool:
        return True

    def prepare(self, device: torch.device) -> None:
        state = self.attachment.state
        (arena,) = state.arenas
        self.rates = next_rates(self.update, state).to(device)  # of one address: a new rate needs no new graph
        said = 0 if self.peers is None else 3 * self.peers.ranks.size
        said += 0 if self.leaving is None else self.leaving.ranks.size
        self.outcome = torch.zeros(2 + said, dtype=torch.float64, device=device)
        self.loss = torch.zeros((), dtype=torch.float32, device=device)
        if self.update.optimizer != "sgd":
            arena.on_demand("exp_avg"), arena.on_demand("exp_avg_sq")
        if self.update.optimizer == "shampoo":
            arena.on_demand("value_gram")

    def rehearse(self, window: Window) -> None:
        if self.attachment.state.ranks is not None and self.reader.runs_the_host(window):
            raise RuntimeError("a host that is split among processes is captured only where kernels of ours read it")
        loss = self._gradient(window)
        if self.peers is None:
            measured(loss, self.attachment.state, self.leaving)
        self.attachment.state.zero_grad()

    def run(self, window: Window) -> None:
        loss = self._gradient(window)
        if self.peers is None:
            self._update(measured(loss, self.attachment.state, self.leaving))
        else:  # what others have to say comes between gradient and update: both sides may not be in graphs of theirs
            self.loss.copy_(loss)

    def _gradient(self, window: Window) -> torch.Tensor:
        formed = self.peers is not None or forms_gradient(self.update)
        return gradient(self.attachment, window, self.reader, formed)

    def _update(self, numbers: torch.Tensor) -> None:
        """numbers: as `measured` gives them, and what others said behind them. Nothing waits for the device."""
        (arena,) = self.attachment.state.arenas
        finite, said = numbers[:2].isfinite().all(), numbers[2:]
        if self.peers is not None:
            finite &= (said[-self.peers.ranks.size :] == 0).all()
        finite = finite.long()
        assert self.rates is not None, "prepare() makes them"
        update_slots(self.attachment, self.update, self.rates, finite)
        arena.zero_grad()
        self.outcome.copy_(torch.cat([numbers[:1].double(), finite.double()[None], said.double()]))
