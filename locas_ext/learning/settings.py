"""The settings of a run: as they were asked for, resolved so that nothing is left open, and as a file holds them."""

from dataclasses import asdict, dataclass, field, replace

import torch.distributed as dist

from locas_ext.checks import boolean
from locas_ext.hosts.registry import Host
from locas_ext.state.memory_state import MemoryState

from .keep import Keep
from .protocol import Protocol
from .room import NO_LIMIT, Room
from .selectors import Positions, Selector, TopLoss, selector_from_json, selector_to_json
from .update import Backprop, Update, Write, backprop_numbers

_ABSENT = backprop_numbers(Backprop.paper())  # what a record without a field means
_FORMAT_1 = ("learning_rate", "epochs", "optimizer")  # what every record holds of a Backprop


@dataclass(frozen=True)
class ResolvedWrite:
    """A Write, or the arguments of `Memory.write`, for a memory of a certain size."""

    epsilon: float
    tokens: Selector | Positions
    room: Room


@dataclass(frozen=True)
class ResolvedSettings:
    """Everything that decides what a run learns of a text."""

    protocol: Protocol
    update: Backprop | ResolvedWrite
    context_gradient: bool
    keep: Keep | None = None

    @property
    def epochs(self) -> int:
        """How often each chunk is learned: a write is done once."""
        return self.update.epochs if isinstance(self.update, Backprop) else 1

    def as_settings(self) -> "Settings":
        """The Settings that resolve to these again."""
        update: Update
        if isinstance(self.update, ResolvedWrite):
            room, tokens = self.update.room, self.update.tokens
            assert not isinstance(tokens, tuple), "only write() takes positions, and it is not a run"
            capacity = None if room.capacity == NO_LIMIT else room.capacity
            update = Write(
                epsilon=self.update.epsilon,
                tokens=tokens,
                capacity=capacity,
                when_full=room.when_full,
                compress_to=room.compress_to or None,
            )
        else:
            update = self.update
        protocol = self.protocol
        return Settings(protocol.window, protocol.stride, update, self.context_gradient, protocol.bos, self.keep, self.texts)

    @property
    def texts(self) -> int:
        """How many texts are learned at once, each by a process of its own."""
        group = self.update.process_group if isinstance(self.update, Backprop) else None
        return 1 if group is None else dist.get_world_size(group)


@dataclass(frozen=True)
class Settings:
    """What `Memory.memorize` was asked for; `resolve` fills in what is None.

    keep: how the context is kept; None: it is read anew for every chunk
    texts: how many texts a saved run learned at once
    """

    window: int | None = None
    stride: int | None = None
    update: Update = field(default_factory=Backprop)
    context_gradient: bool = False
    bos: bool = False
    keep: Keep | None = None
    texts: int = 1

    def resolve(self, host: Host, state: MemoryState, before: "Settings | None" = None) -> ResolvedSettings:
        """The settings for a memory; ValueError or TypeError for one out of range.

        before: those of the saved run that is resumed; the capacity that was filled in then holds for the rest too
        """
        protocol = Protocol.of(host.model, self.window, self.stride, self.bos)
        context_gradient = boolean("context_gradient", self.context_gradient)
        if self.keep is not None:
            self.keep.check_fits(protocol.window, protocol.stride, context_gradient)
        update: Backprop | ResolvedWrite
        if isinstance(self.update, Write):
            update = _resolve_write(self.update, state, protocol.stride, before)
        else:
            update = self.update
            if state.planes == 2 and update.gate_learning_rate is not None:
                raise ValueError(
                    f"gate_learning_rate is {update.gate_learning_rate:g}, but the variant is 'mlp', whose slots have no gate; "
                    "expected None"
                )
            require_parameters_that_learn(state)
            if update.process_group is not None and self.keep is not None:
                raise ValueError("context is 'keep', but process_group is given, whose ranks read each window anew")
        return ResolvedSettings(protocol, update, context_gradient, self.keep)

    # ---- in a file -------------------------------------------------------------------------------------------
    def to_record(self) -> dict:
        """JSON-ready, with the keys of format 1; beside a write those of Backprop are the paper's. `context` is there only
        where one is kept, later fields of Backprop where they are not the paper's: earlier versions then read what they
        know how to continue."""
        writes = isinstance(self.update, Write)
        numbers = backprop_numbers(Backprop.paper() if isinstance(self.update, Write) else self.update)
        write = (
            {**asdict(self.update), "tokens": selector_to_json(self.update.tokens)} if isinstance(self.update, Write) else None
        )
        return {
            "window": self.window,
            "stride": self.stride,
            **{name: value for name, value in numbers.items() if name in _FORMAT_1 or value != _ABSENT[name]},
            "update": "write" if writes else "backprop",
            "context_gradient": self.context_gradient,
            "bos": self.bos,
            "write": write,
            **({} if self.keep is None else {"context": asdict(self.keep)}),
            **({} if self.texts == 1 else {"texts": self.texts}),
        }

    @classmethod
    def from_record(cls, record: dict) -> "Settings":
        """The reverse, of format 1 too. KeyError, TypeError or ValueError for a record that holds something else."""
        update: Update
        if record["update"] == "write":
            update = Write(**{**record["write"], "tokens": selector_from_json(record["write"]["tokens"])})
        else:
            update = Backprop.paper(**{name: record[name] for name in _ABSENT if name in _FORMAT_1 or name in record})
        keep = Keep(**record["context"]) if "context" in record else None
        run = record["window"], record["stride"], update, record["context_gradient"], record["bos"]
        return cls(*run, keep, record.get("texts", 1))


def require_parameters_that_learn(state: MemoryState) -> None:
    """ValueError if every layer of the memory is frozen."""
    if not any(parameter.requires_grad for arena in state.arenas for parameter in arena.parameters):
        raise ValueError(
            "update is 'backprop', but requires_grad is False on all of memory.parameters(), so nothing can be learned; "
            "set it to True on those that are to learn"
        )


def _resolve_write(write: Write, state: MemoryState, stride: int, before: Settings | None) -> ResolvedWrite:
    """By default an expansion-compression cycle (docs/method.md)."""
    if not state.grows:
        raise ValueError("update is 'write', but the variant is 'glu'; only a Locas-MLP memory (variant='mlp') can be written")
    used = state.used if before is None else 0  # the resumed memory is loaded later, and fits what it was made with
    write = replace(write, when_full=write.when_full or "compress")
    if write.capacity is None and write.when_full != "error":
        filled_in = before.update.capacity if before is not None and isinstance(before.update, Write) else None
        write = replace(write, capacity=filled_in or used + 2 * max(stride, state.rank))
    room = Room.of(write, state.hidden_size, used)
    if room.when_full != "error":
        room.check_fits(min(stride, write.tokens.n) if isinstance(write.tokens, TopLoss) else stride)
    return ResolvedWrite(write.epsilon, write.tokens, room)
