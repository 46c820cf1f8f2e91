"""How a memory learns from a chunk: by backpropagation, or by slots written in closed form."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch.distributed as dist

from locas_ext.checks import MOST_COUNT, MOST_SIZE, boolean, integer, number, one_of
from locas_ext.config import MOST_RATE, MOST_SLOT

from .optimizers import OPTIMIZERS
from .selectors import Selector, check_selector, spelled

WHEN_FULL = ("error", "drop_oldest", "compress")
BACKPROP_NUMBERS = (
    "learning_rate",
    "epochs",
    "optimizer",
    "gate_learning_rate",
    "value_learning_rate",
    "decay_after",
    "cautious",
)


@dataclass(frozen=True, kw_only=True)
class Backprop:
    """Learning by backpropagation of the chunk's mean loss, the norm clip included (docs/method.md, "Learning").

    The defaults are our own; `Backprop.paper()` has the paper's.

    Args:
        learning_rate: float from 0 to 1e6
        epochs: int >= 1: learning passes over each chunk
        optimizer: "adamw" (betas 0.9 and 0.999, no weight decay), "sgd" (no momentum) or "shampoo": AdamW, but the step of
            each layer's value rows is preconditioned from the left, and as long as AdamW's
        gate_learning_rate, value_learning_rate: float from 0 to 1e6: of gate and value rows; None: learning_rate
        decay_after: int >= 1: the learning rates are divided by sqrt(1 + u / decay_after), u the updates that the memory
            has learned by; None: they stay
        cautious: bool: whether each step moves only numbers whose gradient has the sign of AdamW's mean of gradients, and
            those the more, the fewer they are; with "adamw" and "shampoo"; None: with "shampoo"
        process_group: a torch.distributed.ProcessGroup: its ranks learn one memory, each from a text of its own (data
            parallel; docs/distributed.md); None: this process learns alone

    Raises:
        TypeError: a value is of another type
        ValueError: a value is out of range, cautious is True with "sgd", or this process is not in the group

    Source: arXiv 2602.05085, section 3; docs/method.md, "Learning".

    >>> import locas_ext as locas
    >>> locas.Backprop(epochs=2).optimizer
    'shampoo'
    """

    learning_rate: float = 6e-3
    epochs: int = 1
    optimizer: str = "shampoo"
    gate_learning_rate: float | None = None
    value_learning_rate: float | None = None
    decay_after: int | None = 10
    cautious: bool | None = None
    process_group: Any = field(default=None, repr=False)

    def __post_init__(self) -> None:
        checked: dict[str, Any] = {
            "learning_rate": number("learning_rate", self.learning_rate, 0, MOST_RATE),
            "epochs": integer("epochs", self.epochs, 1, MOST_COUNT),
            "cautious": self.optimizer == "shampoo" if self.cautious is None else boolean("cautious", self.cautious),
        }
        for name in ("gate_learning_rate", "value_learning_rate"):
            if (rate := getattr(self, name)) is not None:
                checked[name] = number(name, rate, 0, MOST_RATE)
        if self.decay_after is not None:
            checked["decay_after"] = integer("decay_after", self.decay_after, 1, MOST_COUNT)
        one_of("optimizer", self.optimizer, tuple(OPTIMIZERS))
        if checked["cautious"] and self.optimizer == "sgd":
            raise ValueError(
                "cautious is True, but optimizer is 'sgd', which has no mean of gradients; expected 'adamw' or 'shampoo'"
            )
        if self.process_group is not None:
            _check_group(self.process_group)
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    @classmethod
    def paper(cls, **changes: Any) -> "Backprop":
        """The settings of the paper's ablations (arXiv 2602.05085, Qwen3-1.7B on PG-19), except for `changes`.

        Args:
            changes: fields with other values

        Returns:
            A Backprop.

        Raises:
            TypeError, ValueError: as Backprop does

        >>> import locas_ext as locas
        >>> locas.Backprop.paper(epochs=2).learning_rate
        0.004
        """
        own: dict[str, Any] = {"gate_learning_rate": None, "value_learning_rate": None, "decay_after": None, "cautious": False}
        return cls(**{"learning_rate": 4e-3, "epochs": 1, "optimizer": "adamw", **own, **changes})


def backprop_numbers(update: Backprop) -> dict[str, Any]:
    """The fields that decide how each step is made, ready for JSON: all but the process group."""
    return {name: getattr(update, name) for name in BACKPROP_NUMBERS}


def _check_group(group: object) -> None:
    """TypeError or ValueError for what is no process group with this process in it."""
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"process_group is {type(group).__name__}; expected a torch.distributed.ProcessGroup with this process in it, "
            "such as torch.distributed.group.WORLD after init_process_group(), or DeviceMesh.get_group()"
        )
    if dist.get_rank(group) < 0:
        raise ValueError("process_group does not have this process in it; expected a group that has")


@dataclass(frozen=True, kw_only=True)
class Write:
    """Learning by slots in closed form, without training; Locas-MLP only (docs/method.md, "Writing").

    Args:
        epsilon: float > 0, at most 1e6: the length of the step that a token's slots make, over all layers together, before tau
        tokens: which tokens of a chunk get a slot: "all", `TopLoss(n)` or `LossAbove(nats)`
        capacity: int >= 1: the most slots per layer; None: the slots used before the run plus twice the stride or
            twice the rank, whichever is more (no limit with when_full="error")
        when_full: what happens at the capacity: "error", "drop_oldest" or "compress"; None: "compress"
        compress_to: int >= 1: slots per layer that a compression keeps, fewer than the capacity and at most the hidden
            size; None: half the capacity, or the hidden size if that is less

    Raises:
        TypeError: a value is of another type
        ValueError: a value is out of range

    Source: arXiv 2602.05085, section 3 (Locas-MLP) and appendix (NL-SVD); docs/method.md, "Writing".

    >>> import locas_ext as locas
    >>> locas.Write(epsilon=0.05, tokens=locas.TopLoss(8), capacity=64).when_full is None
    True
    """

    epsilon: float = 1e-2
    tokens: Selector = "all"
    capacity: int | None = None
    when_full: str | None = None
    compress_to: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "epsilon", check_epsilon(self.epsilon))
        if isinstance(self.tokens, (list, tuple)) or len(getattr(self.tokens, "shape", ())) > 0:
            raise ValueError("tokens holds positions, which only memory.write() takes; expected 'all', TopLoss or LossAbove")
        check_selector(self.tokens)
        for name, why in (("capacity", "slots per layer"), ("compress_to", "slots per layer")):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, integer(name, value, 1, MOST_SIZE, why))
        if self.when_full is not None:
            one_of("when_full", self.when_full, WHEN_FULL)


def check_epsilon(epsilon: object) -> float:
    """epsilon as a float; TypeError or ValueError if it is not a length that a memory's float32 slots can have."""
    return number("epsilon", epsilon, above=0, high=MOST_SLOT, why="slots are float32")


Update = Backprop | Write
UPDATES = ("backprop", "write")


def as_update(update: object, flat: Mapping[str, object]) -> Update:
    """What memorize() learns by.

    Args:
        update: "backprop", "write", a Backprop or a Write
        flat: memorize()'s own learning_rate, epochs and optimizer, None where not given

    ValueError where both speak of the same thing, TypeError for another type.
    """
    given = {name: value for name, value in flat.items() if value is not None}
    said = ", ".join(f"{name}={value!r}" for name, value in given.items())
    if isinstance(update, str) and one_of("update", update, UPDATES) == "backprop":
        return Backprop(**given)  # type: ignore[arg-type]  # checks its own fields
    if update == "write" or isinstance(update, Write):
        for name, value in given.items():
            raise ValueError(
                f"{name} is {value!r}, but update is {_name(update)}, which writes each token once without an optimizer; "
                f"leave {name} out, or learn with update=locas.Backprop({said})"
            )
        return Write() if isinstance(update, str) else update
    if isinstance(update, Backprop):
        for name, value in given.items():
            raise ValueError(
                f"{name} is {value!r} beside update=locas.Backprop(...), which says it too; write update=locas.Backprop({said})"
            )
        return update
    raise TypeError(f"update is {update!r}; expected 'backprop', 'write', locas.Backprop(...) or locas.Write(...)")


def _name(update: object) -> str:
    return repr(update) if isinstance(update, str) else f"a {type(update).__name__}"


def refuse_unknown(arguments: Mapping[str, object]) -> None:
    """TypeError for keyword arguments that memorize() does not have; settings of a write are told where they go."""
    for name, value in arguments.items():
        if name in {field.name for field in fields(Write)}:
            advice = f"{name}=...) with {spelled(value)}" if name == "tokens" else f"{name}={value!r})"
            raise TypeError(f"{name} is {value!r}, which is a setting of writing: pass update=locas.Write({advice}")
        raise TypeError(f"memorize() got an unexpected keyword argument {name!r}")
