"""The progress bar of a run over a text: tokens/s, running perplexity, time left; on standard error."""

import math

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from locas_ext.terminal import Terminal


def progress_bar(unit: str, *fields: str) -> Progress:
    """A bar on standard error: title, bar, how many of how many `unit`, `fields` (rich's formats), time left."""
    console = Terminal(stderr=True)
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=max(4, min(40, console.width - 76))),  # the numbers fit into 80 columns
        TextColumn(f"{{task.completed:,}}/{{task.total:,}} {unit}"),
        *map(TextColumn, fields),
        TimeRemainingColumn(),
        TextColumn("left"),
        console=console,
    )


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
        self.progress = progress_bar("tokens", "{task.fields[rate]:,.0f}/s", "perplexity {task.fields[perplexity]:.2f}")
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
