"""The loop over a text's chunks: one for memorizing and for the baselines it is compared with."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor

from locas_ext.state.stream import Chunk

from .chunk import Window
from .progress import NoProgress, StreamProgress
from .protocol import Protocol
from .report import MemorizeReport


@dataclass(frozen=True)
class Passage:
    """A text, or the end of one, and the windows it is read in.

    Attributes:
        ids: [n] int64 on the CPU
        protocol: window and stride
        bos: the token that stands before every window; None: none
        begin: where in the text the first chunk begins
        offset: where in the text ids begin: 0, or as far before `begin` as a window reaches
    """

    ids: Tensor
    protocol: Protocol
    bos: int | None
    begin: int = 0
    offset: int = 0

    @property
    def end(self) -> int:
        """The text's length."""
        return self.offset + len(self.ids)

    def between(self, start: int, end: int) -> Tensor:
        """The text's tokens [start, end)."""
        return self.ids[start - self.offset : end - self.offset]

    @property
    def count(self) -> int:
        """How many chunks there are."""
        return sum(1 for _ in self._places())

    def _places(self) -> Iterator[tuple[int, int]]:
        """[start, end) of every chunk; a text's first token alone is none, as nothing of it is scored."""
        for start in range(self.begin, self.end, self.protocol.stride):
            end = min(start + self.protocol.stride, self.end)
            if end > 1:
                yield start, end

    def chunks(self) -> Iterator[tuple[int, int, Window]]:
        """(start, end, window) of every chunk."""
        for start, end in self._places():
            place = start - self.offset, end - self.offset
            yield start, end, Window.of(self.ids, *place, self.protocol.window, self.bos)


def progress_bar(progress: bool, passage: Passage, report: MemorizeReport, title: str) -> StreamProgress | NoProgress:
    """A context manager for `read_chunks`."""
    return StreamProgress(passage.end, passage.begin, report, title) if progress else NoProgress()


def read_chunks(
    passage: Passage,
    read: Callable[[Window, int, int], tuple[float, int]],
    report: MemorizeReport,
    bar: StreamProgress | NoProgress,
) -> Iterator[Chunk]:
    """Reads a passage, and yields each chunk when it is read and in the report.

    read: takes a chunk's window and its [start, end); returns the summed loss of its targets and the version of the
        memory that scored them
    """
    started = time.perf_counter()
    for start, end, window in passage.chunks():
        loss, version = read(window, start, end)
        report.chunks.append(Chunk(start, end, len(window.targets), loss, version))
        report.seconds = time.perf_counter() - started
        bar.advance(end)
        yield report.chunks[-1]
    report.seconds = time.perf_counter() - started
