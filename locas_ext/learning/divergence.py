"""Whether a memory makes its text harder than the host alone does.

A few chunks of a run are scored by the host alone too, in the same windows:

    chunk 0, 1, 16, 128, 256, 384, ...       on schedule
    the one after a chunk that was harder    to tell an accident of the text from a memory that harms
    one much harder than those before it     a harm that begins between two chunks of the schedule shows at once

Where chunks hold only a few tokens, as many of them as hold enough stand for one in the schedule and in what counts as much
harder.
"""

import math
from typing import NamedTuple

from locas_ext.state.stream import Chunk

EARLY, EVERY = (0, 1, 16), 128
UNJUDGED = (4, 64)  # chunks before which a state is kept though nothing is compared: it is judged if it is needed
BEGINNING = 16  # chunks: until then a surprise is looked at however recent the last comparison is
WATCHED_EVERY = 16  # once the memory has been found to harm: whether it recovers; and the run's last RECENT chunks
FOLLOW_UPS = 8  # at most so many chunks in a row, so that a memory that harms a little does not cost a forward each chunk
ENOUGH = 32  # tokens: nothing is concluded from fewer
FEW = 8  # tokens: chunks of fewer are looked at together
HARDER = 0.03  # nats per token: a chunk is called harder beyond this
NOISE = 1.5  # nats: one token's difference varies by about so much where a memory moves anything; the mean of n by / sqrt(n)
AT_ONCE = 0.5  # nats per token: no accident
SURPRISE = 1.0  # nats per token beyond the mean of the RECENT chunks: a text alone hardly ever jumps so
RECENT = 4


class Comparison(NamedTuple):
    """One chunk scored by both sides: summed negative log-likelihoods of its `tokens` scored tokens, in nats."""

    tokens: int
    memory: float
    host: float

    @property
    def excess(self) -> float:
        """How much harder the memory makes a token, in nats."""
        return (self.memory - self.host) / self.tokens

    @property
    def noise(self) -> float:
        """How much of that may be an accident."""
        return NOISE / math.sqrt(self.tokens)

    @classmethod
    def of(cls, comparisons: "list[Comparison]") -> "Comparison":
        """All of them as one."""
        tokens, memory, host = zip(*comparisons, strict=True)
        return cls(sum(tokens), math.fsum(memory), math.fsum(host))


class DivergenceTest:
    """Which chunks are compared, and what the comparisons say.

    Attributes:
        harmed_by: the comparisons that showed the harm, as one; None while nothing did
    """

    def __init__(self, stride: int = ENOUGH) -> None:
        """stride: the tokens of a chunk"""
        self.size = -(-ENOUGH // stride) if stride < FEW else 1  # chunks that are looked at together
        self.harmed_by: Comparison | None = None
        self._suspected = False  # the latest comparison was harder, but not of like with like
        self._streak: list[Comparison] = []  # the latest comparisons of like with like, as far as they were all harder
        self._since: list[Comparison] = []  # those after the harm showed
        self._last = -RECENT  # the number of the chunk compared last

    def is_due(self, number: int) -> bool:
        """Whether chunk `number` is to be compared, as far as that can be told before it is scored."""
        if self.harmed_by is not None:
            return number % (WATCHED_EVERY * self.size) == 0
        return number in EARLY or number % (EVERY * self.size) == 0 or self._is_unclear()

    def _is_unclear(self) -> bool:
        """Whether the chunks compared last were harder, and too few to tell."""
        few = len(self._streak) < FOLLOW_UPS or Comparison.of(self._streak).tokens < ENOUGH
        return self._suspected or (bool(self._streak) and few)

    @property
    def wants_like_with_like(self) -> bool:
        """Whether the next comparison must be one, as something may be concluded from it."""
        return self._suspected or bool(self._streak) or self.harmed_by is not None

    def surprises(self, number: int, loss: float, tokens: int, before: list[Chunk]) -> bool:
        """Whether a chunk is so much harder than those before it that it is to be compared all the same.

        Of chunks that hold few tokens the latest together, as one token alone often is.
        """
        end = max(0, len(before) - (self.size - 1))
        recent, latest = before[max(0, end - RECENT * self.size) : end], before[end:]
        rested = number - self._last >= RECENT * self.size or number < BEGINNING
        if self.harmed_by is not None or not rested or not recent:
            return False
        loss, tokens = loss + math.fsum(chunk.nll for chunk in latest), tokens + sum(chunk.tokens for chunk in latest)
        mean = math.fsum(chunk.nll for chunk in recent) / sum(chunk.tokens for chunk in recent)
        return loss / tokens > mean + SURPRISE

    def add(self, number: int, comparison: Comparison, like_with_like: bool = True) -> None:
        """like_with_like: whether both sides read the same; if not, it only says whether to look again"""
        self._last = number
        self._suspected = not like_with_like and comparison.excess > HARDER
        if not like_with_like:
            self._streak = []
            return
        if self.harmed_by is not None:
            self._since.append(comparison)
            return
        self._streak = [*self._streak, comparison] if comparison.excess > HARDER else []
        if not self._streak:
            return
        streak = Comparison.of(self._streak)
        at_once = comparison.excess > AT_ONCE + comparison.noise
        if streak.tokens >= ENOUGH and (at_once or (len(self._streak) > 1 and streak.excess > HARDER + streak.noise)):
            self.harmed_by = streak

    def harms_still(self) -> bool:
        """Whether the latest comparisons say that the harm has not gone away."""
        latest = self._since[-RECENT:]
        return self.harmed_by is not None and (not latest or Comparison.of(latest).excess > HARDER)
