"""The processes that learn one memory in step: each reads a text of its own, or all the same one.

        rank 0                 rank 1
        window of text 0       window of text 1       nothing, once a text has ended
           | gradient             | gradient
           +------ one sum, by tokens ------+         its losses, and who leaves, are in it too
           | update               | update            the same bits on all ranks

Every rank knows all texts, so what comes next is known everywhere without asking. If FSDP2 shards the host, a forward gathers
weights from all ranks, so each rank also runs every forward that another one runs.
"""

import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from locas_ext.errors import LocasError
from locas_ext.hosts.fingerprint import fingerprint
from locas_ext.hosts.registry import Host
from locas_ext.hosts.sharding import fsdp_ranks
from locas_ext.ops.ranks import Ranks
from locas_ext.state.arena import SlotArena
from locas_ext.state.memory_state import MemoryState
from locas_ext.state.stream import Chunk

from .chunk import Reader, Window
from .read_text import ReadText
from .schedule import NoWindow, Schedule, Step


def ranks_in_step(host: Host, group: Any) -> Ranks | None:
    """The processes that learn in step with this one; None: it learns alone. group: what Backprop was given, or None."""
    sharers = fsdp_ranks(host.model)
    if group is None:
        return sharers
    if host.ranks is not None:
        raise ValueError(
            f"process_group is given, but the host is split among {host.ranks.size} processes (tp_plan), which read one text; "
            "expected a host that is whole, or sharded by FSDP2"
        )
    members = dist.get_process_group_ranks(group)
    if sharers is not None and (missing := set(dist.get_process_group_ranks(sharers.group)) - set(members)):
        raise ValueError(
            f"process_group has the ranks {members}, but FSDP2 shards the host over {sorted(missing)} too, which run every "
            "forward with them; expected a group that has all of these"
        )
    return Ranks(group, dist.get_rank(group), dist.get_world_size(group), host.input_device())


def facts_of(host: Host, state: MemoryState) -> dict[str, Any]:
    """What a host and its memory are, for processes to compare, by the names of messages."""
    numbers = hashlib.sha256()
    for _, tensor in sorted(state.tensors().items()):
        numbers.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return {
        "the host (digest of samples of its weights)": _hex(repr(fingerprint(host)).encode()),
        "the host's dtype": str(state.arenas[0].compute.dtype),
        "memory.version": state.version,
        "the shape of memory.slots": list(state.shape),
        "memory.slots (digest)": numbers.hexdigest()[:16],
        "which of memory.parameters() require a gradient": [
            parameter.requires_grad for arena in state.arenas for parameter in arena.parameters
        ],
    }


def _hex(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


class Peers:
    """The processes that learn one memory in step, as one of them sees them.

    Attributes:
        ranks: which processes; each: whether each reads a text of its own
        texts: the texts, one per rank, or the one that all read
        own: the number of this rank's text
        schedule: which windows are read in each step
        lockstep: whether all run every forward together
        chunks: what all of them have scored, a Chunk per step: its tokens and its loss are sums over the texts
        losses: by text, the loss of the latest window read
    """

    def __init__(self, ranks: Ranks, texts: list[ReadText], each: bool, lockstep: bool, epochs: int):
        """epochs: how often each window is learned"""
        self.ranks, self.texts, self.each, self.lockstep = ranks, texts, each, lockstep
        self.own = ranks.rank if each else 0
        self.schedule = Schedule([text.passage for text in texts], epochs)
        self.chunks = _summed([text.chunks for text in texts])
        self.losses: list[float] = []
        self.ending: BaseException | None = None  # what this rank ends with after the step that it has said so in
        self.left_by: list[int] = []  # the ranks that have said so
        self._buffers: list[Tensor] = []

    @classmethod
    def meet(cls, ranks: Ranks, host: Host, facts: dict[str, Any], text: ReadText, each: bool, epochs: int) -> "Peers":
        """Called by all ranks. ValueError, on all of them, where they were not given the same.

        facts: what has to be the same everywhere, by the names of messages; each: whether the texts may differ
        epochs: how often each window is learned
        """
        if not each:
            facts = {**facts, "input_ids (digest)": _hex(text.passage.ids.numpy().tobytes())}
        met: list[Any] = [None] * ranks.size
        dist.all_gather_object(met, (facts, text if each else None), group=ranks.group)
        for rank, (theirs, _) in enumerate(met):
            for name in met[0][0] | theirs:
                if theirs.get(name) != (value := met[0][0].get(name)):
                    raise ValueError(_differ(name, value, rank, theirs.get(name), each))
        texts = [theirs for _, theirs in met] if each else [text]
        if each:
            texts[ranks.rank] = text
        return cls(ranks, texts, each, fsdp_ranks(host.model) is not None, epochs)

    # ---- before a step ---------------------------------------------------------------------------------------
    def places(self, place: str) -> list[str]:
        """By text, what a message says of where a step is."""
        return [f"{place} on rank {rank}" for rank in range(self.ranks.size)] if self.each else [place]

    @property
    def goes_on(self) -> bool:
        """Whether there is another step."""
        return self.schedule.done < self.schedule.steps

    @property
    def step(self) -> Step:
        """The one that is next, or under way."""
        return self.schedule.now

    def settle(self, window: Window, reader: Reader, full: int) -> str | None:
        """Gets ready for the windows of a step, those of other ranks too: what is found out is the same everywhere."""
        why = None
        for other in self.step.kinds():
            told = reader.settle(other, full)
            if (len(other.context), len(other.inputs)) == (len(window.context), len(window.inputs)):
                why = told
        return why

    def keep_up(self, host: Host, reader: Reader, window: Window, step: Step) -> None:
        """Runs the forwards that other ranks run before this one's window, where all have to run together."""
        if not self.lockstep:
            return
        most = max(_forwards(reader, other) for other in step.kinds())
        for _ in range(most - _forwards(reader, window)):
            with torch.no_grad():
                host.model(input_ids=window.targets[None, :1].to(host.input_device()), use_cache=False)

    def turn(self, host: Host, reader: Reader, window: Window, read: Callable[[], Tensor], step: Step | None = None) -> Tensor:
        """What `read` returns for this rank's window, the loss; 0 where its text has ended. step: the window's; None: `step`"""
        step = self.step if step is None else step
        if isinstance(window, NoWindow):
            if self.lockstep:
                self.keep_up(host, reader, window, step)
                read()
            return torch.zeros((), device=host.input_device())
        self.keep_up(host, reader, window, step)
        return read()

    # ---- what all say together ---------------------------------------------------------------------------------
    def _weight(self) -> float:
        """This rank's part in the gradient of the step."""
        if not self.each:
            return float(self.ranks.rank == 0)
        return self.step.tokens_of(self.own) / self.step.tokens

    def _buffer(self, place: int, arena: SlotArena) -> Tensor:
        size = arena.grad.numel() + 3 * self.ranks.size * (place == 0)
        if place == len(self._buffers):
            self._buffers.append(arena.grad.new_empty(size))
        if self._buffers[place].numel() != size or self._buffers[place].device != arena.grad.device:
            self._buffers[place] = arena.grad.new_empty(size)
        return self._buffers[place]

    @torch.no_grad()
    def combined(self, state: MemoryState, loss: Tensor | None) -> Tensor:
        """Puts the gradient of the mean loss over all tokens of the step in the place of each rank's own. Nothing waits.

        loss: of this rank's window, a sum; None: the rank has failed, and the step is void

        Returns [3 n] float32: by rank its loss, 1 where it leaves after this step, and 1 where it is gone.
        """
        said, size, weight = torch.empty(0), self.ranks.size, 0.0 if loss is None else self._weight()
        for place, arena in enumerate(state.arenas):
            buffer, count = self._buffer(place, arena), arena.grad.numel()
            if weight:
                torch.mul(arena.grad.view(-1), weight, out=buffer[:count])
                buffer[count:].zero_()
            else:
                buffer.zero_()
            if place == 0:
                said = buffer[count:]
                if loss is None:
                    said[2 * size + self.ranks.rank].fill_(1.0)
                elif self.each or self.ranks.rank == 0:
                    said[self.ranks.rank].copy_(loss)
                if self.ending is not None:
                    said[size + self.ranks.rank].fill_(1.0)
            dist.all_reduce(buffer, group=self.ranks.group)
            arena.grad.copy_(buffer[:count].view_as(arena.grad))
        self.schedule.said()
        return said

    def heard(self, said: list[float]) -> list[float]:
        """Takes in what `combined` returned; -> the losses by text. LocasError where a rank is gone."""
        losses, leaving, gone = (said[start : start + self.ranks.size] for start in range(0, len(said), self.ranks.size))
        self.losses = losses if self.each else losses[:1]
        self.left_by = [rank for rank, leaves in enumerate(leaving) if leaves]
        if any(gone):
            raise LocasError(f"rank {_named(gone)} ended the run with an error; the memory stays as it was before this step")
        return self.losses

    def leave(self, state: MemoryState) -> None:
        """Called by a rank that has failed between two steps or in its own part of one: lets the others know."""
        if not self.lockstep and self.schedule.is_open:
            self.combined(state, None)

    def total(self, number: Tensor) -> float:
        """The sum over all texts of a number [], which a text that has ended gives as 0."""
        mine = number.item() if self.each or self.ranks.rank == 0 else 0.0
        numbers = torch.tensor([mine], dtype=torch.float64, device=self.ranks.device)
        dist.all_reduce(numbers, group=self.ranks.group)
        return numbers.item()

    # ---- the beginning ---------------------------------------------------------------------------------------
    def mean_importance(self, importance: Tensor, tokens: int) -> Tensor:
        """The mean of each rank's importance [m] over its `tokens`, over the tokens of all."""
        if not self.each:
            return importance
        summed = torch.cat([importance.float() * tokens, importance.new_full((1,), tokens, dtype=torch.float32)])
        dist.all_reduce(summed, group=self.ranks.group)
        return summed[:-1] / summed[-1]

    def first(self, tensor: Tensor) -> Tensor:
        """That of the first rank, in its place."""
        dist.broadcast(tensor, src=dist.get_global_rank(self.ranks.group, 0), group=self.ranks.group)
        return tensor

    def all_losses(self, loss: Tensor) -> list[float]:
        """By text, the loss of each rank's first window."""
        parts = [torch.zeros(1, device=loss.device) for _ in range(self.ranks.size)]
        dist.all_gather(parts, loss.detach().float().reshape(1), group=self.ranks.group)
        losses = [part.item() for part in parts]
        self.losses = losses if self.each else losses[:1]
        return self.losses

    # ---- after a step ------------------------------------------------------------------------------------------
    def learned(self, losses: list[float], version: int) -> Iterator[tuple[ReadText, Chunk]]:
        """Notes down a step, and yields the chunks of its texts. losses: by text, before anything was learned of it"""
        step = self.step
        for number, (start, end) in step.places():
            text = self.texts[number]
            if number != self.own:  # whose chunk is there
                text.chunks.append(Chunk(start, end, step.tokens_of(number), losses[number], version))
            yield text, text.chunks[-1]
        start, end = next(place for _, place in step.places())
        self.chunks.append(Chunk(start, end, step.tokens, sum(losses), version))
        self.schedule.end()

    def end_if_asked(self, check_interrupt: Callable[[], None]) -> None:
        """Called between steps. Ctrl-C on one rank ends the run on all, after the step in which it says so."""
        if self.left_by:
            raise self.ending or LocasError(
                f"rank {self.left_by[0]} ended the run here (Ctrl-C); the memory is as it was there"
            )
        try:
            check_interrupt()
        except KeyboardInterrupt as pressed:
            self.ending = pressed  # where no step follows, the run raises it in the end


def _forwards(reader: Reader, window: Window) -> int:
    return 1 if len(window.context) == 0 or reader.is_in_one(window) else 2


def _named(flags: list[float]) -> str:
    return " and ".join(str(rank) for rank, flag in enumerate(flags) if flag)


def _differ(name: str, first: Any, rank: int, theirs: Any, each: bool) -> str:
    why = "process_group's ranks learn one memory" if each else "FSDP2 shards the host, so all ranks learn one memory"
    way_out = "" if each else "; a text of its own for each rank goes with Backprop(process_group=...)"
    return f"{why}, but {name} is {theirs!r} on rank {rank} and {first!r} on rank 0; expected the same on all{way_out}"


def _summed(lists: list[list[Chunk]]) -> list[Chunk]:
    """By step, what all texts scored."""
    steps = []
    for place in range(max(map(len, lists))):
        parts = [chunks[place] for chunks in lists if place < len(chunks)]
        tokens, nll = sum(part.tokens for part in parts), sum(part.nll for part in parts)
        steps.append(Chunk(parts[0].start, parts[0].end, tokens, nll, parts[0].memory_version))
    return steps
