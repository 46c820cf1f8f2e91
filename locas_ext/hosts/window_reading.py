"""How a host's windows are read: context and chunk in two forwards where that gives what one plain forward gives.

Two forwards cost less, and keep the gradient out of the context. But whether a token computes the same behind a cache as in
one forward is the host's affair. So the two are compared: at attach over a few tokens, and in a run
wherever something may change, which is at the first window, at the first one beyond each length that the config states, and at
the first full one.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from locas_ext.ops.ranks import Ranks

from .lengths import Lengths, lengths_of
from .probe.agreement import COARSE, distances, rounding, rounds_whole_texts


class Way(NamedTuple):
    """How a window is read; the defaults are the cheapest way.

    in_two: two forwards; or one plain forward, with a gradient through the context too
    ends_early: the context's forward ends at its last write into the cache
    own_attention: the chunk's attention may have a backward of its own, which stops at the cache
    positions: the chunk's forward is told where its tokens stand
    """

    in_two: bool = True
    ends_early: bool = True
    own_attention: bool = True
    positions: bool = False

    def full(self) -> "Way":
        """The same with nothing left out or replaced."""
        return self._replace(ends_early=False, own_attention=False)


SHORT, FULL, ONE = Way(), Way().full(), Way(False, False, False)


@dataclass(frozen=True)
class Verdict:
    """A way to read windows, and why not the cheapest."""

    way: Way = SHORT
    why: str | None = None


def misfit(logits: Tensor, expected: Tensor, targets: Tensor) -> float:
    """How far logits [n, V] are from those of one plain forward; NaN where one of them is not finite.

    The larger of two: the distance at the median position, since a near tie inside the host may turn a single one, and the
    difference of the mean loss in nats, which is what counts in the end.
    """
    logits, expected, targets = logits.detach().float(), expected.float(), targets.to(logits.device)
    loss = F.cross_entropy(logits, targets) - F.cross_entropy(expected, targets)
    return torch.stack([distances(logits, expected).median(), loss.abs()]).max().item()


def tolerance(logits: Tensor, coarse: bool) -> float:
    """What other orders of summation, all through a host, may make of its logits."""
    return COARSE if coarse else 1e-3 + 16 * rounding(logits)


def cheapest(
    known: Verdict,
    read: Callable[[Way], Tensor],
    expected: Tensor,
    targets: Tensor,
    coarse: bool,
    otherwise: Sequence[Way] = (),
    ranks: Ranks | None = None,
) -> Verdict:
    """The cheapest way, no cheaper than the known one, that gives the logits of one plain forward.

    read: -> logits [n, V] of a window's chunk, read in some way
    expected: [n, V], what one plain forward gives; targets: [n]
    coarse: whether the host rounds whole texts to one grid (rounds_whole_texts)
    otherwise: ways to try where neither the known one nor its full form gives them
    ranks: the processes that the host is split among, which decide together
    """
    why = known.why

    def fits(way: Way) -> bool:
        nonlocal why
        try:
            error = misfit(read(way), expected, targets)
            told = f"the host's logits differ from those of one forward by {error:.2g} of their spread"
        except torch.OutOfMemoryError:
            raise  # which says nothing of the host
        except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError) as problem:
            error, told = math.inf, f"the host raises {type(problem).__name__}: {problem}"
        if ranks is not None:
            error = ranks.largest(error)
        fitting = error <= tolerance(expected, coarse)
        why = why if fitting else f"behind a cache of the context {told}"
        return fitting

    for way in (known.way, *otherwise):
        if fits(way):
            return Verdict(way, why)
        full = way.full()
        if full == way or not fits(full):
            continue
        why_not = why
        for between in (way._replace(ends_early=False), way._replace(own_attention=False)):
            if between not in (way, full) and fits(between):
                return Verdict(between, why_not)
        return Verdict(full, why_not)
    return Verdict(ONE, why)


def _build(model: Any) -> int:
    """A number that changes with a model's modules, their forwards and its config; weights are no part of it."""
    modules = tuple((id(module), id(type(module).forward), id(module.__dict__.get("forward"))) for module in model.modules())
    return hash((modules, repr(vars(model.config.get_text_config(decoder=True)))))


@dataclass
class WindowReading:
    """How the windows of one host are read, as far as they have been compared.

    lengths: where its config says that something changes
    writes: how often a forward writes into a KV cache; None: not known, and no context's forward ends early
    plain_cache: whether a forward over a whole window may be given a cache that keeps nothing (NoContext)
    coarse: whether it rounds whole texts to one grid of numbers, so that comparisons have to allow more
    unprobed: why the probe found nothing out, or None
    compares: whether runs compare two forwards with one
    verdicts: by the least number of tokens that each holds for; the probe's at 0
    build: what the host was made of when they were found
    kernels: what else was found out about a host of this build, by whoever reads it faster
    ranks: the processes that the host is split among
    """

    lengths: Lengths = field(default_factory=Lengths)
    writes: int | None = None
    plain_cache: bool = True
    coarse: bool = False
    unprobed: str | None = None
    compares: bool = True
    verdicts: dict[int, Verdict] = field(default_factory=dict)
    build: int | None = None
    kernels: Any = None
    ranks: Ranks | None = None

    def begin_run(self, model: nn.Module) -> None:
        """Forgets what was compared before if modules, their forwards or the config have changed since."""
        build = _build(model)
        if build != self.build:
            self.verdicts = {least: verdict for least, verdict in self.verdicts.items() if least == 0}
            self.lengths, self.coarse, self.build = lengths_of(model.config), rounds_whole_texts(model), build
            self.kernels = None

    def verdict(self, context: int, tokens: int) -> Verdict:
        """For a window of so many tokens, `context` of them before the chunk's inputs."""
        if context == 0:
            return Verdict()
        if (length := self.lengths.divides(context, tokens)) is not None:
            return Verdict(ONE, f"the host turns all positions otherwise in a text of more than {length} tokens")
        known = [least for least in self.verdicts if least <= tokens]
        return self.verdicts[max(known)] if known else Verdict()

    def kind(self, tokens: int, full: int) -> int:
        """The kind of a window, by the least number of its tokens; full: those of the run's full windows."""
        return max(least for least in (1, *(length + 1 for length in self.lengths.all), full) if least <= tokens)

    def settle(self, context: int, targets: Tensor, full: int, read: Callable[[Way], Tensor]) -> Verdict:
        """The verdict for a window, compared first if it is the first of its kind.

        context: the tokens before the chunk's inputs; targets: [n], one per input
        full: the tokens of this run's full windows; read: as in `cheapest`
        """
        tokens = context + len(targets)
        verdict = self.verdict(context, tokens)
        if context == 0 or not self.compares or self.lengths.divides(context, tokens) is not None:
            return verdict
        kind = self.kind(tokens, full)
        if kind not in self.verdicts and verdict.way != ONE:
            with torch.no_grad():
                expected = read(ONE)
            otherwise = () if 0 in self.verdicts else (SHORT._replace(positions=True),)  # which the probe would have tried
            self.verdicts[kind] = cheapest(verdict, read, expected, targets, self.coarse, otherwise, self.ranks)
        return self.verdict(context, tokens)

    def describe(self) -> str:
        """One line for a status."""
        for least, verdict in sorted(self.verdicts.items()):
            if verdict.way == ONE:
                return f"one forward per window of {max(least, 1)} or more tokens: {verdict.why}"
        told = ", the chunk's with its positions" if any(verdict.way.positions for verdict in self.verdicts.values()) else ""
        return f"two forwards per window{told}" + (f"; the host was not probed: {self.unprobed}" if self.unprobed else "")
