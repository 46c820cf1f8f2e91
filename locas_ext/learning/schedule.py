"""Which windows several texts are read in, step by step: chunk k of each, until the longest has ended."""

from collections.abc import Iterator

from .chunk import Window
from .chunk_loop import Passage


class NoWindow(Window):
    """A window of another text, where this rank's own has ended. It is read only if all ranks have to run each forward."""


class Step:
    """One step: by the number of the text, [start, end) and window of its chunk; None where it has ended."""

    def __init__(self, parts: list[tuple[int, int, Window] | None]):
        self._parts = parts

    def places(self) -> Iterator[tuple[int, tuple[int, int]]]:
        """(number of the text, (start, end)) of those that have not ended."""
        return ((number, part[:2]) for number, part in enumerate(self._parts) if part is not None)

    def kinds(self) -> list[Window]:
        """A window of every size that is read."""
        windows = [part[2] for part in self._parts if part is not None]
        return list({(len(window.context), len(window.inputs)): window for window in reversed(windows)}.values())[::-1]

    def tokens_of(self, number: int) -> int:
        """How many tokens of a text are scored."""
        part = self._parts[number]
        return 0 if part is None else len(part[2].targets)

    @property
    def tokens(self) -> int:
        """How many of all texts."""
        return sum(map(self.tokens_of, range(len(self._parts))))

    def window(self, number: int) -> Window:
        """That of a text, or a NoWindow."""
        part = self._parts[number]
        return part[2] if part is not None else NoWindow(*self.kinds()[0])


class Schedule:
    """The steps of a run, and where it stands."""

    def __init__(self, passages: list[Passage], epochs: int = 1):
        """epochs: how often each step's windows are learned"""
        self._texts = [passage.chunks() for passage in passages]
        self.steps = max(passage.count for passage in passages)
        self.done, self.unsaid = 0, self.steps * epochs
        self._now: Step | None = None

    @property
    def now(self) -> Step:
        """The step that is next, or under way."""
        if self._now is None:
            self._now = Step([next(chunks, None) for chunks in self._texts])
        return self._now

    def end(self) -> None:
        """The step is over."""
        self.done, self._now = self.done + 1, None

    def said(self) -> None:
        """The ranks have spoken to each other, as once for each time that a step's windows are learned."""
        self.unsaid -= 1

    @property
    def is_open(self) -> bool:
        """Whether they will speak again."""
        return self.unsaid > 0
