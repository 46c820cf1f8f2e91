"""Keep: chunks are read over the keys and values that the chunks before them left (docs/method.md, "A kept context")."""

from collections.abc import Mapping
from dataclasses import dataclass

from locas_ext.checks import MOST_COUNT, integer

CONTEXTS = ("recompute", "keep")


@dataclass(frozen=True, kw_only=True)
class Keep:
    """The context before a chunk is not read anew: what each chunk left in the KV cache when it was scored is kept.

    A kept key has seen an older memory and a longer past, so the figures are not those of `context="recompute"`. A chunk
    costs only its own forward and backward. The host must be rotary, with positions that have no end.

    Args:
        sinks: int >= 0: how many of the text's first inputs stay in the window when it moves on, right before the others
        refresh_every: int >= 1: the window is read anew, with the memory as it then is, once per so many chunks; None: never

    Raises:
        TypeError: a value is not an integer
        ValueError: a value is out of range

    Source: arXiv 2309.17453 (StreamingLLM) for the sinks; docs/method.md, "A kept context".

    >>> import locas_ext as locas
    >>> from locas_ext.hosts.tiny import tiny_host
    >>> locas.Keep(refresh_every=16)
    Keep(sinks=4, refresh_every=16)
    >>> memory = locas.attach(tiny_host(), locas.LocasConfig(rank=4))
    >>> memory.memorize(list(range(3, 51)), window=16, stride=8, context=locas.Keep(sinks=2), progress=False).tokens
    47
    """

    sinks: int = 4
    refresh_every: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "sinks", integer("sinks", self.sinks, 0, MOST_COUNT))
        if self.refresh_every is not None:
            object.__setattr__(self, "refresh_every", integer("refresh_every", self.refresh_every, 1, MOST_COUNT))

    def check_fits(self, window: int, stride: int, context_gradient: bool = False) -> None:
        """Checks that a context can be kept in a run with these settings.

        Args:
            window: int: W
            stride: int: S
            context_gradient: bool: whether the run asks for a gradient through the context

        Raises:
            ValueError: W - S <= sinks, so the sinks have no place before a chunk; or context_gradient is True

        >>> import locas_ext as locas
        >>> locas.Keep(sinks=4).check_fits(window=12, stride=8)
        Traceback (most recent call last):
        ValueError: sinks is 4, but before a chunk of 8 tokens a window of 12 has room for 3 inputs; expected at most so many \
sinks, a larger window or a smaller stride
        """
        if window - stride <= self.sinks:
            raise ValueError(
                f"sinks is {self.sinks}, but before a chunk of {stride} tokens a window of {window} has room for "
                f"{max(window - stride - 1, 0)} inputs; expected at most so many sinks, a larger window or a smaller stride"
            )
        if context_gradient:
            raise ValueError(
                "context_gradient is True, but context is 'keep': older memories computed what is kept, and no gradient "
                "reaches it; expected context='recompute' or context_gradient=False"
            )


def as_context(context: object) -> Keep | None:
    """What memorize() is asked for: "recompute" (None), "keep" (the defaults) or a Keep. ValueError or TypeError otherwise."""
    if isinstance(context, Keep):
        return context
    if not isinstance(context, str):
        raise TypeError(f"context is {context!r}; expected 'recompute', 'keep' or locas.Keep(...)")
    if context not in CONTEXTS:
        raise ValueError(f"context is {context!r}; expected 'recompute', 'keep' or locas.Keep(...)")
    return Keep() if context == "keep" else None


def context_of(settings: Mapping[str, object]) -> Keep | None:
    """The context that a command's settings name: `context` and, where it is "keep", fields of Keep; without any, None."""
    if settings.get("context", "recompute") != "keep":
        return None
    return Keep(**{name: settings[name] for name in ("sinks", "refresh_every") if name in settings})  # type: ignore[arg-type]
