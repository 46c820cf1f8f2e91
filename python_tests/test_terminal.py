"""Text from outside is shown on a terminal, whatever it holds."""

import io
import sys
import unicodedata

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from rich.progress import Progress, TextColumn
from rich.table import Table
from rich.text import Text

import locas_ext as locas
from locas_ext.hosts.tiny import tiny_host
from locas_ext.terminal import Figures, Terminal, neutral

ANY_TEXT = st.text(st.characters(), max_size=60)


@given(ANY_TEXT)
@example("\x1b]0;title\x07 \x9b31m \x7f \r \x00 \u202e \ud800 \U000e0001")
def test_neutral_keeps_what_is_harmless_and_escapes_the_rest(text):
    shown = neutral(text)
    assert not {unicodedata.category(c) for c in shown if c not in "\n\t\u200c\u200d"} & {"Cc", "Cs", "Cf", "Cn", "Co"}
    # nothing is lost: the escapes say which character stood there
    harmless = [c for c in text if c.isprintable()]
    assert [c for c in shown if c.isprintable()][: len(harmless)] == harmless or len(shown) > len(text)
    assert neutral(shown) == shown


def printed(renderable) -> str:
    file = io.StringIO()
    Terminal(file=file, width=200).print(renderable)
    return file.getvalue()


MARKUP = "x [/red] [bold]b[/bold] [link=http://a]:smile: \\[z]"


@pytest.mark.parametrize("harmful", ["\x1b[31m", "\x1b]8;;http://a\x07", "\x9b1m", "\u202e"])
def test_no_renderable_lets_it_through(harmful):
    table = Table(title=f"{MARKUP} {harmful}")
    table.add_column(f"{MARKUP}{harmful}")
    table.add_row(f"{MARKUP}{harmful}")
    for renderable in (f"{MARKUP}{harmful}", Text(f"{MARKUP}{harmful}"), table):
        out = printed(renderable)
        assert MARKUP in out and harmful not in out and "\x1b" not in out


def test_styles_of_our_own_still_reach_a_terminal():
    file = io.StringIO()
    Terminal(file=file, force_terminal=True, width=80).print(Text("red", style="red"))
    assert "\x1b[31mred" in file.getvalue()


def test_progress_bars_draw_on_it():
    file = io.StringIO()
    with Progress(TextColumn("{task.description}", markup=False), console=Terminal(file=file, force_terminal=True)) as bar:
        bar.add_task(f"{MARKUP}\x1b[2J")
    assert MARKUP in file.getvalue() and "\x1b[2J" not in file.getvalue()


@pytest.mark.parametrize("width", [20, 40, 60, 80, 120])
def test_figures_are_cut_on_no_terminal(width):
    titles = ["book", "arm", "perplexity", "held out", "extra parameters"]
    rows = [["nostromo", "temp-lora rank=64", "1234.56", "50.12", "393,216"], ["tono-bungay", "locas", "7.25", "", "0"]]
    file = io.StringIO()
    table = Figures(titles, "Two [b]books", left=2)
    for row in rows:
        table.add_row(*row)
    Terminal(file=file, width=width).print(table)
    for word in ["Two [b]books", *(word for row in rows for cell in row for word in cell.split())]:
        assert word in file.getvalue()
    if width >= 40:
        assert max(map(len, file.getvalue().splitlines())) <= width


def test_a_closed_pipe_is_an_error_and_not_an_exit():
    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        Terminal(file=Closed()).print("a")


class Gone(io.StringIO):
    """What a full disk, a closed pipe or a terminal that has hung up makes of every write."""

    def write(self, text):
        raise OSError(5, "Input/output error")

    def flush(self):
        self.write("")


def test_what_cannot_be_said_on_standard_error_ends_no_run(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Gone())
    memory = locas.attach(tiny_host(), locas.LocasConfig(rank=2))
    assert memory.memorize(list(range(3, 51)), window=16, stride=8, progress=True).tokens == 47
    Terminal(stderr=True).print("x")


def test_results_that_cannot_be_written_are_an_error(monkeypatch):
    monkeypatch.setattr(sys, "stdout", Gone())
    with pytest.raises(OSError, match="Input/output"):
        Terminal().print("x")
