"""The progress bar of a run over a text: tokens/s, running perplexity, time left; on standard error."""

import math

from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn

from locas_ext.terminal import Terminal


class NoProgress:
    """Stands where a StreamProgress would, and shows nothing."""

    def __enter__(self) -> "NoProgress":
        return self

    def __exit__(self, *exception) -> None:
        pass

    def advance(self, position: int) -> None:
        pass


def _columns(width: int) -> list[ProgressColumn]:
    """Position, perplexity and time left in 40 columns; what else there is room for in more."""

    def column(text: str) -> TextColumn:
        return TextColumn(text, markup=False)

    columns = [column("{task.completed:,}/{task.total:,}"), column("perplexity {task.fields[perplexity]:.2f}")]
    if width < 64:
        return [*columns, TimeRemainingColumn()]
    rate = column("tokens {task.fields[rate]:,.0f}/s")
    described = [column("{task.description}"), BarColumn(bar_width=min(40, width - 76))] if width >= 80 else []
    return [*described, columns[0], rate, columns[1], TimeRemainingColumn(), column("left")]


class StreamProgress:
    """A context manager; `advance(position)` after every chunk. `report` has growing `tokens` and `nll`."""

    def __init__(self, total: int, position: int, report, title: str = "memorizing"):
        self.report = report
        self._seen, self._nll, self._tokens = len(report.chunks), report.nll, report.tokens
        self.start = position
        console = Terminal(stderr=True)
        self.progress = Progress(*_columns(console.width), console=console)
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
