"""The processes among which a host's weights are split by rows or columns (tensor parallel), and what they say to each other.

      x --enter--> local op: this rank's neurons and slots --total--> y          the same x and y on all ranks
      forward:  nothing                                     one sum over ranks
      backward: one sum over ranks                          nothing

Each function here is called by all ranks, in the same order.
"""

import functools
import pickle
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from locas_ext.errors import LocasError

from .peer_memory import PeerMemory, obstacle


class _EnterFunction(torch.autograd.Function):
    """apply(x, ranks) -> x, whose gradient is the sum of all ranks' gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: "Ranks") -> Tensor:
        ctx.ranks = ranks
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        dy = dy.contiguous()  # nobody else has it: enter's result goes into one op, or autograd has added it up
        ctx.ranks.add_up(dy)
        return dy, None


class _TotalFunction(torch.autograd.Function):
    """apply(y, ranks) -> the sum of all ranks' y, in its place."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, ranks: "Ranks") -> Tensor:
        ctx.mark_dirty(y)
        ranks.add_up(y)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return dy, None


class _JoinedFunction(torch.autograd.Function):
    """apply(y [..., n], ranks, lengths) -> all ranks' y side by side, which all ranks use alike. lengths: n of each rank"""

    @staticmethod
    def forward(ctx: Any, y: Tensor, ranks: "Ranks", lengths: list[int]) -> Tensor:
        ctx.own = sum(lengths[: ranks.rank]), lengths[ranks.rank]
        longest = max(lengths)
        parts = [y.new_empty(*y.shape[:-1], longest) for _ in lengths]
        dist.all_gather(parts, F.pad(y, (0, longest - y.shape[-1])).contiguous(), group=ranks.group)
        return torch.cat([part[..., :length] for part, length in zip(parts, lengths, strict=True)], -1)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        return dy.narrow(-1, *ctx.own), None, None


@dataclass(frozen=True)
class Ranks:
    """The processes of one group as one of them sees them.

    group: of torch.distributed; rank: this process's place in it; size: how many there are
    device: where tensors lie that its collectives take
    memory: through which they make sums on GPUs that read each other's; None: the group makes all; why_not: why there is none
    """

    group: Any
    rank: int
    size: int
    device: torch.device
    memory: PeerMemory | None = None
    why_not: str | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "Ranks":
        """A copied model is on the same processes."""
        return self

    # ---- in a forward ----------------------------------------------------------------------------------------
    def enter(self, x: Tensor) -> Tensor:
        """x, the same on all ranks, where each goes on with it by itself."""
        if not (torch.is_grad_enabled() and x.requires_grad):
            return x
        entered: Tensor = _EnterFunction.apply(x, self)
        return entered

    def total(self, y: Tensor) -> Tensor:
        """The sum of all ranks' y, contiguous, in its place."""
        if torch.is_grad_enabled() and y.requires_grad:
            total: Tensor = _TotalFunction.apply(y, self)
            return total
        self.add_up(y)
        return y

    def add_up(self, y: Tensor) -> None:
        """The same without a graph. LocasError where a process that would take part has ended."""
        if self.memory is not None and self.memory.processes.ended is not None:
            raise LocasError(self.memory.processes.ended)
        if self.memory is not None and self.memory.takes(y):
            self.memory.add_up(y)
        else:
            dist.all_reduce(y, group=self.group)

    def joined(self, y: Tensor, lengths: list[int]) -> Tensor:
        """All ranks' y [..., n] side by side, of which all ranks make the same. lengths: n of each rank"""
        whole: Tensor = _JoinedFunction.apply(y, self, lengths)
        return whole

    # ---- tensors of which each rank has a part -----------------------------------------------------------------
    def mine(self, whole: Tensor, dim: int = 0) -> Tensor:
        """This rank's part of a tensor whose dimension the number of ranks divides."""
        rows = whole.shape[dim] // self.size
        return whole.narrow(dim, self.rank * rows, rows)

    @torch.no_grad()
    def gathered(self, part: Tensor, dim: int = 0) -> Tensor:
        """The whole of what each rank has a part of; the parts may differ in length along `dim`."""
        return self.joined(part.transpose(dim, -1), self.lengths(part.shape[dim])).transpose(dim, -1).contiguous()

    @torch.no_grad()
    def whole(self, part: Tensor, dim: int) -> Tensor:
        """`gathered` of parts that are equally long. Nothing waits for the device, nor for Python on other ranks."""
        whole = torch.cat([torch.zeros_like(part)] * self.size, dim)
        self.mine(whole, dim).copy_(part)
        self.add_up(whole)
        return whole

    def lengths(self, own: int) -> list[int]:
        """Each rank's number."""
        numbers = [0] * self.size
        dist.all_gather_object(numbers, own, group=self.group)
        return numbers

    def before(self, own: int) -> int:
        """How many the ranks before this one have together. own: how many this one has"""
        return sum(self.lengths(own)[: self.rank])

    def agreed(self, numbers: Tensor) -> Tensor:
        """The mean over all ranks of numbers that should be the same, in their place: NaN or infinite where any is.

        Nothing waits for the device.
        """
        self.add_up(numbers)
        return numbers.div_(self.size)

    def give_up(self) -> None:
        """Ends this process's waiting for others, in a sum that is then NaN or an error: the group is of no use any more."""
        if self.memory is not None:
            self.memory.stop.fill_(1)
        with suppress(Exception):  # not every backend can, in every torch
            self.group._get_backend(self.device).abort()

    # ---- decisions -------------------------------------------------------------------------------------------
    def largest(self, number: float) -> float:
        """The largest of all ranks' numbers; infinite where one is NaN."""
        numbers = torch.tensor([number], dtype=torch.float64, device=self.device).nan_to_num(float("inf"), float("inf"))
        dist.all_reduce(numbers, dist.ReduceOp.MAX, group=self.group)
        return numbers.item()

    def all(self, yes: bool) -> bool:
        """Whether it is so on all ranks."""
        return self.largest(0.0 if yes else 1.0) == 0.0

    def same(self, value: Any) -> bool:
        """Whether a small value that can be pickled is the same on all ranks."""
        values = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return all(other == values[0] for other in values)

    @contextmanager
    def together(self) -> Iterator[None]:
        """What fails on one rank inside fails on all: the others raise the same error. Nothing inside waits for others."""
        error: Exception | None = None
        try:
            yield
        except Exception as raised:
            error = raised
        errors: list[Any] = [None] * self.size
        dist.all_gather_object(errors, None if error is None else _portable(error), group=self.group)
        if error is not None:
            raise error
        if others := [other for other in errors if other is not None]:
            raise others[0]


_ANOTHER = "another process has no memory to show"


@functools.cache  # a group's memory is made once
def through_memory(ranks: Ranks) -> Ranks:
    """The same, which make sums through memory that they show each other where they can. Called by all of them."""
    why = obstacle(ranks.size, ranks.device)
    if not ranks.all(why is None):  # nobody waits for memory that another process does not make
        return replace(ranks, why_not=why or _ANOTHER)
    memory = None
    try:
        memory = PeerMemory(ranks.group, ranks.rank, ranks.size, ranks.device)
    except Exception as problem:  # whatever torch or the driver says
        why = f"memory that the GPUs read of each other cannot be had: {type(problem).__name__}: {problem}"
    if not ranks.all(memory is not None):  # nobody counts before everybody is here
        return replace(ranks, why_not=why or _ANOTHER)
    assert memory is not None, "all have it"
    try:
        memory.watch(ranks.group)
        right = memory.adds_up()
    except Exception as problem:  # such as no room for what is added up
        right, why = False, f"sums through memory that the GPUs read of each other failed: {type(problem).__name__}: {problem}"
    if not ranks.all(right):
        return replace(ranks, why_not=why or "sums through memory that the GPUs read of each other came out wrong")
    return replace(ranks, memory=memory)


def _portable(error: Exception) -> Exception:
    """An error as another process can raise it."""
    try:
        copy = pickle.loads(pickle.dumps(error))
        return copy if type(copy) is type(error) and str(copy) == str(error) else LocasError(f"{type(error).__name__}: {error}")
    except Exception:  # pickling runs the error's own code, which may raise anything; what it says still arrives
        return LocasError(f"{type(error).__name__}: {error}")


@contextmanager
def together(ranks: Ranks | None) -> Iterator[None]:
    """`Ranks.together`; nothing where there is one process only."""
    if ranks is None:
        yield
        return
    with ranks.together():
        yield
