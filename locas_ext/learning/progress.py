"""The progress bar of a run over a text: tokens/s, running perplexity, time left; on standard error."""

import math

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn


class NoProgress:
    """Stands where a StreamProgress would, and shows nothing."""

    def __enter__(self) -> "NoProgress":
        return self

    def __exit__(self, *exception) -> None:
        pass

    def advance(self, position: int) -> None:
        pass


class StreamProgress:
    """A context manager; `advance(position)` after every chunk. `report` has growing `tokens` and `nll`."""

    def __init__(self, total: int, position: int, report, title: str = "memorizing"):
        self.report = report
        self._seen, self._nll, self._tokens = len(report.chunks), report.nll, report.tokens
        self.start = position
        console = Console(stderr=True)
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=max(4, min(40, console.width - 76))),  # the numbers fit into 80 columns
            TextColumn("{task.completed:,}/{task.total:,} tokens"),
            TextColumn("{task.fields[rate]:,.0f}/s"),
            TextColumn("perplexity {task.fields[perplexity]:.2f}"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=console,
        )
        self.task = self.progress.add_task(title, total=total, completed=position, rate=0.0, perplexity=self._perplexity())

    def _perplexity(self) -> float:
        return math.exp(self._nll / self._tokens) if self._tokens else math.nan

    def __enter__(self) -> "StreamProgress":
        self.progress.start()
        return self

    def __exit__(self, *exception) -> None:
        self.progress.stop()

    def advance(self, position: int) -> None:
        for chunk in self.report.chunks[self._seen :]:
            self._nll += chunk.nll
            self._tokens += chunk.tokens
        self._seen = len(self.report.chunks)
        elapsed = self.progress.tasks[0].elapsed or 0.0
        rate = (position - self.start) / elapsed if elapsed else 0.0
        self.progress.update(self.task, completed=position, rate=rate, perplexity=self._perplexity())
