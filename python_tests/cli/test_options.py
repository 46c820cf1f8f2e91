"""What the API has the command line has, under the same name; one kind, one help text and one group per option."""

import re
import subprocess
import sys
from dataclasses import dataclass, fields
from inspect import signature
from typing import Annotated, get_args

import pytest
import typer

import locas_ext as locas
from locas_ext.cli import main
from locas_ext.cli import options as options_module
from locas_ext.cli.app import app
from locas_ext.cli.commands import memorize as memorize_command
from locas_ext.cli.grouped import grouped
from locas_ext.cli.study_options import KEYS, KINDS, LOSSES, StudyOptions
from locas_ext.cli.tasks.generate import sampling
from locas_ext.evaluation.arguments import once
from locas_ext.evaluation.inputs import DTYPES as LOADABLE
from locas_ext.evaluation.perplexity.parallel import world_size
from locas_ext.learning.optimizers import OPTIMIZERS
from locas_ext.learning.study import settings as study_settings
from locas_ext.learning.update import UPDATES, WHEN_FULL

COMMANDS = typer.main.get_command(app).commands


def options(command: str) -> dict:
    return {parameter.name: parameter for parameter in COMMANDS[command].params}


def test_memorize_has_every_setting_of_the_api():
    api = {
        *signature(locas.attach).parameters,
        *signature(locas.Memory.memorize).parameters,
        *(field.name for kind in (locas.LocasConfig, locas.Backprop, locas.Write) for field in fields(kind)),
    }
    only_in_python = {"self", "input_ids", "progress", "callback", "on_divergence", "process_group"}
    assert api - only_in_python - {"refused", "unknown"} <= set(options("memorize")) | {"config"}


@pytest.mark.parametrize("command", ["perplexity", "locomo"])
def test_a_method_locas_has_the_options_of_memorize(command):
    wanted = {field.name for kind in (locas.LocasConfig, locas.Backprop) for field in fields(kind)} - {"process_group"}
    kept = {"context", "sinks", "refresh_every"}
    for name in (*wanted, *kept, "rehome", "context_gradient", "window", "stride"):
        here, there = options(command)[name], options("memorize")[name]
        for what in ("opts", "help", "default", "rich_help_panel"):
            assert getattr(here, what) == getattr(there, what), (name, what)


def test_choices_are_those_of_the_library():
    assert options_module.OPTIMIZERS == tuple(OPTIMIZERS)
    assert memorize_command.UPDATES == UPDATES and memorize_command.WHEN_FULL == WHEN_FULL
    assert options_module.DTYPES == tuple(LOADABLE)


@pytest.mark.parametrize("command", sorted(set(COMMANDS) - {"info", "report"}))
def test_every_command_with_settings_takes_a_file_and_shows_examples(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert "config" in options(command)
    assert main([command, "--help"]) == 0
    out = capsys.readouterr().out
    assert f"locas {command} " in out.split("Examples:")[1]
    assert "<str>" not in out and "left out" not in out


@pytest.mark.parametrize("command", sorted(set(COMMANDS) - {"report"}))
def test_every_command_that_loads_a_model_says_how(command):
    assert {"dtype", "device"} <= options(command).keys()


def test_one_option_is_the_same_wherever_it_is_declared():
    kept: dict = {}
    for command in COMMANDS:
        for name, parameter in options(command).items():
            if name in ("out", "memory", "window", "device", "methods", "max_tokens", "config"):
                continue  # what they mean differs by command
            if command in ("demo", "recall", "study") and name in ("learning_rate", "epochs"):
                continue  # their defaults, or what they mean, are their own
            assert len(set(parameter.opts)) == len(parameter.opts), (command, parameter.opts)
            help_text = kept.setdefault(name, parameter.help)
            assert parameter.help == help_text, (command, name)


def test_a_group_is_its_fields():
    @dataclass(frozen=True, kw_only=True)
    class Pair:
        left: Annotated[int, typer.Option()] = 1
        right: Annotated[int, typer.Option()] = 2

    seen = []

    def command(first: Annotated[int, typer.Option()], pair: Pair = Pair(right=5)) -> None:
        """Says it."""
        seen.append((first, pair))

    flat = grouped(command)
    assert flat.__doc__ == "Says it." and flat.__name__ == "command"
    assert {name: parameter.default for name, parameter in signature(flat).parameters.items() if name != "first"} == {
        "left": 1,
        "right": 5,
    }
    flat(first=0, left=3, right=4)
    assert seen == [(0, Pair(left=3, right=4))]


def test_an_option_keeps_its_name_whatever_its_metavar_is():
    """Some typer releases name an option after a metavar that is the same word in capitals."""

    def command(model: Annotated[str, typer.Option(metavar="MODEL")], plain: Annotated[int, typer.Option()] = 1) -> None:
        """Says it."""

    model, plain = signature(grouped(command)).parameters.values()
    assert get_args(model.annotation)[1].param_decls == ("--model",)
    assert not get_args(plain.annotation)[1].param_decls
    for name in COMMANDS:
        assert all(opt == opt.lower() for parameter in options(name).values() for opt in parameter.opts if opt[:1] == "-")


@pytest.mark.parametrize("columns", [40, 60, 75, 76, 120])
def test_names_of_options_are_cut_on_no_terminal(columns):
    result = subprocess.run(
        [sys.executable, "-m", "locas_ext", "memorize", "--help"],
        capture_output=True,
        text=True,
        env={"COLUMNS": str(columns), "PYTHONPATH": ":".join(sys.path), "PATH": ""},
    )
    assert result.returncode == 0, result.stderr
    for parameter in options("memorize").values():
        for name in parameter.opts:
            if name.startswith("--"):
                assert re.search(rf"{name}\b", result.stdout), name


def test_the_options_of_a_study_are_its_settings_and_have_their_defaults():
    study = options("study")
    given = StudyOptions().fields(study["epochs"].default, study["learning_rate"].default)
    assert locas.StudySettings(**given) == locas.StudySettings()
    assert (KINDS, KEYS, LOSSES) == (study_settings.KINDS, study_settings.KEYS, study_settings.LOSSES)
    assert StudyOptions().loss == signature(locas.Memory.study).parameters["loss"].default
    assert {field.name for field in fields(locas.StudySettings)} - set(given) == {"new_tokens"}


@pytest.mark.parametrize("temperature, drawn", [(0.0, False), (1e-300, False), (1e-45, False), (0.01, True), (5.0, True)])
def test_a_temperature_that_would_overflow_is_the_likeliest_token(temperature, drawn):
    assert sampling(temperature) == ({"do_sample": True, "temperature": temperature} if drawn else {"do_sample": False})


def test_a_file_named_twice_is_refused(tmp_path):
    once("--held-out", [tmp_path / "a", tmp_path / "b"])
    with pytest.raises(ValueError, match="--held-out names .* twice"):
        once("--held-out", [tmp_path / "a", tmp_path / "." / "b" / ".." / "a"])


@pytest.mark.parametrize("text, size", [("", 1), ("4", 4), ("0", None), ("x", None), ("-1", None)])
def test_what_a_launcher_says_is_a_number(monkeypatch, text, size):
    monkeypatch.setenv("WORLD_SIZE", text)
    if size is not None:
        assert world_size() == size
        return
    with pytest.raises(ValueError, match="WORLD_SIZE is .* in the environment; expected an integer >= 1"):
        world_size()
