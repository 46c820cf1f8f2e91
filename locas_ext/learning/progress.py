"""The progress bar of a run over a text: tokens/s, running perplexity, time left; on standard error."""

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from locas_ext.terminal import Terminal

from .perplexity import perplexity


def progress_bar(unit: str, *fields: str) -> Progress:
    """A bar on standard error: title, bar, how many of how many `unit`, `fields` (rich's formats), time left.

    A narrow terminal gets less of it, 40 columns the count, the last field and the time left.
    """
    console = Terminal(stderr=True)
    width, count, left = console.width, "{task.completed:,}/{task.total:,}", TimeRemainingColumn()
    if width < 64:
        return Progress(_text(count), _text(fields[-1]), left, console=console)
    # the numbers fit into 80 columns
    head = [_text("{task.description}"), BarColumn(bar_width=max(4, min(40, width - 76)))] if width >= 80 else []
    return Progress(*head, _text(f"{count} {unit}"), *map(_text, fields), left, _text("left"), console=console)


def _text(form: str) -> TextColumn:
    return TextColumn(form, markup=False)


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
        return perplexity(self._nll, self._tokens)

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
