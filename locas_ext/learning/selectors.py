"""Which tokens of a text get a slot when it is written in closed form."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from locas_ext.checks import MOST_SIZE, integer, integers, number

_EXPECTED = "'all', locas.TopLoss(n) or locas.LossAbove(nats)"


@dataclass(frozen=True)
class TopLoss:
    """Selects the tokens with the largest loss.

    Args:
        n: int >= 1: how many tokens per text (`write`) or per chunk (`memorize`); all of a text or chunk with fewer

    Raises:
        TypeError: n is not an integer
        ValueError: n is less than 1

    >>> import locas_ext as locas
    >>> locas.Write(tokens=locas.TopLoss(8)).tokens
    TopLoss(n=8)
    """

    n: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "n", integer("TopLoss(n): n", self.n, 1, MOST_SIZE))


@dataclass(frozen=True)
class LossAbove:
    """Selects the tokens whose loss is at least a threshold.

    Args:
        nats: finite float: a token gets a slot if its negative log-likelihood is at least this

    Raises:
        TypeError: nats is not a number
        ValueError: nats is not finite

    >>> import locas_ext as locas
    >>> locas.Write(tokens=locas.LossAbove(2)).tokens
    LossAbove(nats=2.0)
    """

    nats: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "nats", number("LossAbove(nats): nats", self.nats))


Selector = str | TopLoss | LossAbove  # the string is "all"
Positions = tuple[int, ...]  # of tokens in a text, ascending


def check_selector(tokens: Any, expected: str = _EXPECTED) -> Selector:
    """`tokens` if it is a selector; TypeError that says what to write instead if it is not."""
    if isinstance(tokens, (TopLoss, LossAbove)) or (isinstance(tokens, str) and tokens == "all"):
        return tokens
    value = tokens.item() if getattr(tokens, "shape", None) == () and hasattr(tokens, "item") else tokens
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        raise TypeError(f"tokens is {value}; write {spelled(value)}")
    raise TypeError(f"tokens is {tokens!r}; expected {expected}")


def spelled(tokens: Any) -> str:
    """How to write a selector, of which a bare number may be meant."""
    if isinstance(tokens, (TopLoss, LossAbove)):
        return f"locas.{tokens!r}"
    if isinstance(tokens, int) and not isinstance(tokens, bool):
        above = f"locas.LossAbove({float(tokens)}) for those of at least {tokens} nats"
        return f"locas.TopLoss({tokens}) for the {tokens} tokens with the largest loss, {above}"
    if isinstance(tokens, float):
        return f"locas.LossAbove({tokens}) for the tokens whose loss is at least {tokens} nats"
    return repr(tokens)


def check_positions(tokens: Any, length: int) -> Selector | Positions:
    """As `check_selector`, but a sequence of positions in a text of `length` tokens is one too; ValueError for a wrong one."""
    if not _is_sequence(tokens):
        return check_selector(tokens, f"{_EXPECTED}, or a sequence of positions")
    positions = sorted(integers("tokens", tokens))
    if not positions:
        raise ValueError("tokens is empty; expected at least one position")
    if positions[0] < 1 or positions[-1] >= length:
        wrong = positions[0] if positions[0] < 1 else positions[-1]
        raise ValueError(f"tokens holds {wrong}; expected positions from 1 to {length - 1}: the first token is never predicted")
    if len(set(positions)) != len(positions):
        raise ValueError(f"tokens names position {next(p for p in positions if positions.count(p) > 1)} twice")
    return tuple(positions)


def _is_sequence(tokens: Any) -> bool:
    if isinstance(tokens, (str, bytes)):
        return False
    return isinstance(tokens, Sequence) or len(getattr(tokens, "shape", ())) > 0


def select(tokens: Selector | Positions, nll: Tensor) -> Tensor:
    """Indices [n] int64, ascending, into the targets whose losses are nll [T]; target i is the token at position i + 1."""
    if isinstance(tokens, tuple):
        return torch.tensor(tokens, device=nll.device) - 1
    if isinstance(tokens, TopLoss):
        return nll.topk(min(tokens.n, len(nll))).indices.sort().values
    if isinstance(tokens, LossAbove):
        return (nll >= tokens.nats).nonzero()[:, 0]
    return torch.arange(len(nll), device=nll.device)


# ---- in a file ------------------------------------------------------------------------------------------------
def selector_to_json(tokens: Selector) -> str | dict:
    """ "all", {"top_loss": n} or {"loss_above": nats}."""
    if isinstance(tokens, TopLoss):
        return {"top_loss": tokens.n}
    return {"loss_above": tokens.nats} if isinstance(tokens, LossAbove) else tokens


def selector_from_json(value: Any) -> Selector:
    """The reverse; files of format 1 hold an int for TopLoss and a float for LossAbove."""
    match value:
        case {"top_loss": n}:
            return TopLoss(n)
        case {"loss_above": nats}:
            return LossAbove(nats)
        case bool():
            return check_selector(value)
        case int():
            return TopLoss(value)
        case float():
            return LossAbove(value)
    return check_selector(value)
