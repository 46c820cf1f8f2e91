"""What WindowReader and KeptReader share: a window goes through the kernels as far as they read its kind right."""

from abc import ABC, abstractmethod
from collections.abc import Hashable
from functools import partial
from typing import Any

from torch import Tensor

from locas_ext.hosts.registry import Host
from locas_ext.ops import token_nll

from .kernels import HostKernels, Kind, Level, Ours


class KernelReading(ABC):
    """Windows [context, inputs, targets] of a host, read by the kernels or by the host's own code.

    Attributes:
        host: what reads
        kernels: what of it runs through kernels of ours; None: nothing
    """

    host: Host
    kernels: HostKernels | None = None

    def logits(self, window: Any) -> Tensor:
        """The logits [n, V] of a window's targets, with a graph over its inputs (`is_in_one`: its context too)."""
        window = window.to(self.host.input_device())
        level = self._level(window)
        if self.kernels is None or level == Level.NONE:
            return self._by_the_host(window)
        if level == Level.ALL:
            return self._ours(window)
        with self.kernels.pieces_bound():
            return self._by_the_host(window)

    def loss(self, window: Any) -> Tensor:
        """Summed negative log-likelihood, float32 0-d, of a window's targets, with a graph as `logits`."""
        window = window.to(self.host.input_device())
        if self._level(window) == Level.ALL:
            return self._our_nll(window).sum()
        logits = self.logits(window)
        return token_nll(logits, window.targets.to(logits.device)).sum()  # a spread host's logits lie elsewhere

    def settle_kernels(self, window: Any, full: int, whole: bool) -> None:
        """Finds out how much of a window the kernels read right, where it is the first of its kind.

        full: the tokens that the run's full windows read; whole: whether all of ours may read it, or norms and residuals only
        """
        if self.kernels is None:
            return
        how, context, tokens = self._kind(window)
        kind = Kind(how, context > 0, self.host.reading.kind(tokens, full))
        if kind not in self.kernels.settled:
            window = window.to(self.host.input_device())
            ours = Ours(partial(self._ours, window), partial(self._our_nll, window)) if whole else None
            self.kernels.settle(kind, window.targets, partial(self._by_the_host, window), ours)
        self.kernels.met.add(kind)

    def runs_the_host(self, window: Any) -> bool:
        """Whether the host's own code alone reads a window, or what of it is split among processes."""
        return self.kernels is None or self._level(window) == Level.NONE or "split modules" in self.kernels.found.own

    def _level(self, window: Any) -> Level:
        return Level.NONE if self.kernels is None else self.kernels.level(*self._kind(window))

    @abstractmethod
    def _kind(self, window: Any) -> tuple[Hashable, int, int]:
        """How a window is read (Kind.how), the tokens before its inputs, and all that it reads."""

    @abstractmethod
    def _by_the_host(self, window: Any) -> Tensor:
        """`logits` by the host's own code."""

    @abstractmethod
    def _ours(self, window: Any) -> Tensor:
        """`logits` by all of ours."""

    @abstractmethod
    def _our_nll(self, window: Any) -> Tensor:
        """Each target's loss [n] by all of ours."""
