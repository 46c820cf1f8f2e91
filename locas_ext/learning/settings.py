"""The settings of memorize(), checked and filled in."""

import math
import numbers
from dataclasses import asdict, dataclass, replace

from locas_ext.state.memory_state import MemoryState
from locas_ext.state.stream import Stream

from .inputs import bos_token
from .optimizers import OPTIMIZERS
from .write_settings import WriteSettings, check_fits, resolve


@dataclass(frozen=True)
class Settings:
    """The arguments of `Memory.memorize` that decide what is learned."""

    window: int | None = None
    stride: int | None = None
    learning_rate: float = 4e-3
    epochs: int = 1
    optimizer: str = "adamw"
    update: str = "backprop"
    context_gradient: bool = False
    bos: bool = False
    write: WriteSettings | None = None  # with update="write"


@dataclass(frozen=True)
class ResolvedSettings:
    """Settings that were checked, with what was None filled in. Saved memories hold them: the names are those of Settings."""

    window: int
    stride: int
    learning_rate: float
    epochs: int
    optimizer: str
    update: str
    context_gradient: bool
    bos: bool
    write: WriteSettings | None


def _integer(name: str, value: object, low: int, high: float, why: str = "") -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} is {value!r}; expected an integer")
    if not low <= int(value) <= high:
        limit = f">= {low}" if high == math.inf else f"from {low} to {int(high)}"
        raise ValueError(f"{name} is {value}; expected an integer {limit}{why}")
    return int(value)


UPDATES = ("backprop", "write")


def resolve_settings(settings: Settings, host, state: MemoryState, resumed: Stream | None = None) -> ResolvedSettings:
    """The settings with what is None filled in; ValueError or TypeError for one out of range.

    resumed: where the run that is taken up again stood; what it filled in holds for the rest too.
    """
    positions = host.max_positions
    window = min(2048, positions) if settings.window is None else settings.window
    window = _integer("window", window, 2, positions, " (the host's positions)")
    stride = max(1, window // 4) if settings.stride is None else settings.stride
    if settings.bos:
        stride = _integer("stride", stride, 1, window - 1, " (the window without its BOS token)")
    else:
        stride = _integer("stride", stride, 1, window, " (the window)")
    epochs = _integer("epochs", settings.epochs, 1, math.inf)
    rate = settings.learning_rate
    if isinstance(rate, bool) or not isinstance(rate, numbers.Real):
        raise TypeError(f"learning_rate is {rate!r}; expected a number >= 0")
    if not (0.0 <= rate < math.inf):
        raise ValueError(f"learning_rate is {rate}; expected a finite number >= 0")
    if settings.optimizer not in tuple(OPTIMIZERS):
        raise ValueError(f"optimizer is {settings.optimizer!r}; expected one of {', '.join(OPTIMIZERS)}")
    if settings.update not in UPDATES:
        raise ValueError(f"update is {settings.update!r}; expected one of {', '.join(UPDATES)}")
    if settings.bos and bos_token(host) is None:
        raise ValueError("bos is True, but the host's config has no bos_token_id")
    return ResolvedSettings(
        window,
        stride,
        float(rate),
        epochs,
        settings.optimizer,
        settings.update,
        bool(settings.context_gradient),
        bool(settings.bos),
        _resolve_writing(settings, state, stride, resumed),
    )


def _resolve_writing(settings: Settings, state: MemoryState, stride: int, resumed: Stream | None) -> WriteSettings | None:
    """The settings of update="write", None for "backprop"; by default an expansion-compression cycle (docs/method.md)."""
    write = settings.write or WriteSettings()
    if settings.update != "write":
        unused = [name for name, value in asdict(write).items() if value != getattr(WriteSettings(), name)]
        if unused:
            raise ValueError(f"{unused[0]} is given, but update is {settings.update!r}; expected update='write'")
        return None
    if not state.grows:
        raise ValueError("update is 'write', but the variant is 'glu'; only a Locas-MLP memory (variant='mlp') can be written")
    if settings.epochs != 1:
        raise ValueError(f"epochs is {settings.epochs}, but update is 'write', which writes each token once; expected 1")
    if write.when_full is None:
        write = replace(write, when_full="compress")
    used = state.used if resumed is None else 0  # the resumed memory is loaded later, and fits what it was made with
    if write.capacity is None and write.when_full != "error":
        before = (resumed.settings.get("write") or {}).get("capacity") if resumed is not None else None
        write = replace(write, capacity=before or used + 2 * max(stride, state.rank))
    write = resolve(write, state.hidden_size, used, None)
    if write.when_full != "error":
        check_fits(min(stride, write.tokens) if isinstance(write.tokens, int) else stride, write)
    return write
