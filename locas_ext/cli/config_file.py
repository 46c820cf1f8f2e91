"""--config FILE.yaml: the options of a command in a file. What stands on the command line wins."""

import difflib
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer

from .values import BadValue, Kind, brief, path

_META = "locas.config_file"  # the key in the contexts' common meta
_NOT_IN_A_FILE = ("config", "help", "version")


def _kinds(context: typer.Context) -> dict[str, tuple[Kind | None, bool]]:
    """Per option of the command: its kind (None: a flag) and whether it may be given several times."""
    hints = get_type_hints(inspect.unwrap(context.command.callback), include_extras=True)  # type: ignore[arg-type]
    kinds = {}
    for parameter in context.command.params:
        if parameter.name in hints and parameter.name not in _NOT_IN_A_FILE:
            hint = hints[parameter.name]
            info = next(each for each in hint.__metadata__ if hasattr(each, "parser"))
            kinds[parameter.name] = (info.parser, _is_list(get_args(hint)[0]))
    return kinds


def _is_list(hint: Any) -> bool:
    return get_origin(hint) is list or any(get_origin(each) is list for each in get_args(hint))


def _value(value: Any, kind: Kind | None, several: bool) -> Any:
    if several:
        return [_value(each, kind, False) for each in (value if isinstance(value, list) else [value])]
    if kind is None:
        if not isinstance(value, bool):
            raise BadValue(value, "true or false")
        return value
    if isinstance(value, bool) or (isinstance(value, str) and not kind.textual):
        raise BadValue(value, kind.expected)
    return kind(value)


def _settings(file: Path, context: typer.Context) -> Iterator[tuple[str, Any]]:
    from .yaml_file import read_mapping  # the YAML library, which other calls do not need

    kinds = _kinds(context)
    seen: dict[str, str] = {}
    optional = {parameter.name for parameter in context.command.params if not parameter.required and parameter.default is None}
    for key, value in read_mapping(file).items():
        name = key.replace("-", "_")
        if name not in kinds:
            near = difflib.get_close_matches(name, kinds, 1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise ValueError(f"{file}: unknown key {brief(key)}; {hint}expected {', '.join(kinds)}")
        if name in seen:
            raise ValueError(f"{file}: {seen[name]} and {key} are one setting; expected it once")
        seen[name] = key
        if value is None and name in optional:
            continue
        try:
            yield name, _value(value, *kinds[name])
        except BadValue as error:
            raise ValueError(f"{file}: {key} {error.message}") from None


def _take(context: typer.Context, file: Path | None) -> None:
    if file is None or context.resilient_parsing:
        return
    try:
        settings = dict(_settings(file, context))
    except OSError as error:
        raise ValueError(f"--config: {file}: {error.strerror}") from None
    context.default_map = {**(context.default_map or {}), **settings}
    context.meta[_META] = (file, context)


def origin(root: typer.Context, name: str) -> Path | None:
    """The file that the option `name` of the command comes from; None where it is the command line's or a default."""
    file, context = root.meta.get(_META, (None, None))
    source = context and context.get_parameter_source(name)
    return file if source and source.name == "DEFAULT_MAP" else None


ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config",
        parser=path("FILE.yaml"),
        metavar="FILE.yaml",
        callback=_take,
        is_eager=True,
        expose_value=False,
        help="Take options from this file, such as `rank: 128`; what the command line says wins.",
    ),
]
