"""Names and answers of the user stay text: on the terminal, in report.md and in plots."""

import io
import itertools
import json
import os
import unicodedata
import warnings
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from rich.console import Console
from support import nasty
from support.locomo_samples import KITES
from support.reports import record, save
from transformers import AutoTokenizer

from locas_ext.evaluation.assets import MODEL
from locas_ext.evaluation.capability.command import _names as capability_names
from locas_ext.evaluation.display import code, json_block, markdown, one_line
from locas_ext.evaluation.locomo.data import read_dialogues
from locas_ext.evaluation.report.build import merge_reports, write_report
from locas_ext.evaluation.report.plots import style
from locas_ext.evaluation.report.tables import console_table
from locas_ext.evaluation.texts import read_text
from locas_ext.terminal import neutral

PARSER = MarkdownIt("commonmark").enable(["table", "strikethrough"])
SOME = settings(max_examples=100, deadline=None)
FEW = settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def is_harmless(text):
    return not any(unicodedata.category(character) == "Cc" or character in "\u202e\u2066\u2028" for character in text)


def shown(token):
    """The text of an inline token; fails for anything but text."""
    assert {child.type for child in token.children} <= {"text", "text_special"}, token.content
    return "".join(child.content for child in token.children)


def cells(text):
    """Every inline token of Markdown with the type of what it is in."""
    tokens = PARSER.parse(text)
    return [(before.type, token) for before, token in itertools.pairwise(tokens) if token.type == "inline"]


@SOME
@given(nasty.names)
@example("1. x")
@example("- x")
@example("=")
def test_markdown_shows_the_name_wherever_it_stands(name):
    text = "\n".join(
        [f"## {markdown(name)}", "", "| a | b |", "| :-- | --: |", f"| {markdown(name)} | x |", "", f"- {markdown(name)}", ""]
    )
    assert is_harmless(text.replace("\n", ""))
    found = cells(text)
    assert [kind for kind, _ in found] == ["heading_open", "th_open", "th_open", "td_open", "td_open", "paragraph_open"]
    for place in (0, 3, 5):
        assert shown(found[place][1]) == one_line(name)


@SOME
@given(nasty.names)
def test_a_span_of_code_shows_the_name(name):
    (_, token), *others = cells(f"see {code(name)}: here")
    assert not others
    spans = [child for child in token.children if child.type == "code_inline"]
    assert [span.content.strip() for span in spans] == [one_line(name)] and is_harmless(code(name))


@SOME
@given(st.dictionaries(nasty.names, st.lists(nasty.names)))
def test_a_block_of_json_is_json(content):
    block = json_block(content)
    (fence,) = PARSER.parse("\n".join(block))
    assert fence.type == "fence" and json.loads(fence.content) == content
    assert is_harmless(fence.content.replace("\n", ""))


@SOME
@given(nasty.names)
def test_a_console_table_has_neither_markup_nor_control_characters(name):
    name = " ".join(name.split())
    console = Console(file=io.StringIO(), width=400, force_terminal=False)
    console.print(console_table([name, "b"], [[name, "x"]], title=name))
    printed = console.file.getvalue()
    assert is_harmless(printed.replace("\n", "").replace("\t", " "))
    assert printed.count(neutral(name)) == 3


@FEW
@given(nasty.names, nasty.names, nasty.names)
def test_a_report_holds_any_name(tmp_path, book, arm, run):
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.setattr(style, "DPI", 20)
        warnings.simplefilter("error")
        records = [
            record("locas", arm=arm, book=book),
            record("truncation", book=book),
            record("temp-lora", book=book, run=run),
        ]
        records.append(record("long-context", arm=arm + "x", book=book, error=run))
        folder = save(tmp_path / "a", records, model=run, ablate="rank", dtype=arm)
        report = write_report(folder)
        for text in (report.read_text(), merge_reports([folder], tmp_path / "b").read_text()):
            assert is_harmless(text.replace("\n", ""))
            headings = [shown(token) for kind, token in cells(text) if kind == "heading_open"]
            assert one_line(book) in headings
            rows = [shown(token) for kind, token in cells(text) if kind == "td_open"]
            assert one_line(arm) in rows
            html = [token.content for token in PARSER.parse(text) if token.type == "html_block"]
            assert [part.strip() for part in html] == ["<details><summary>All settings</summary>", "</details>"]


def test_names_of_files_that_are_not_utf8_are_kept_as_text(tmp_path):
    place = Path(os.fsdecode(os.fsencode(tmp_path) + b"/t\xe9.json"))
    place.write_text(json.dumps(KITES))
    (dialogue,) = read_dialogues([place])
    text = read_text(place, AutoTokenizer.from_pretrained(MODEL), 20)
    assert [dialogue.name, text.name, *capability_names([place])] == ["t\\udce9", "t\\udce9", "t\\udce9.json"]
    folders = [place.with_name(os.fsdecode(name)) for name in (b"run\xe8", b"run\xe9")]
    for folder in folders:
        save(folder, [record(book=text.name)])
    report = merge_reports(folders, tmp_path / "merged")
    assert "run\\\\udce8" in report.read_text(encoding="utf-8")
