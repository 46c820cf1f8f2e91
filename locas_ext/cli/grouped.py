"""Options that belong together as one parameter of a command."""

from collections.abc import Callable
from copy import copy
from dataclasses import fields, is_dataclass
from inspect import Parameter, Signature, signature
from operator import getitem
from typing import Annotated, Any, get_args, get_type_hints

from typer.models import OptionInfo


def _named(name: str, option: Any) -> Any:
    """An option's annotation, with its name said: typer 0.27 makes one of a metavar that is the same word in capitals.

    What an option is called when it is made is its first positional argument, which typer keeps as `default`.
    """
    kind, *infos = get_args(option)
    for number, info in enumerate(infos):
        if isinstance(info, OptionInfo) and info.metavar and info.default is ... and not info.param_decls:
            infos[number] = copy(info)
            infos[number].param_decls = (f"--{name.replace('_', '-')}",)
    return getitem(Annotated, (kind, *infos))


def grouped(function: Callable[..., None]) -> Callable[..., None]:
    """A function of single options from one whose parameters may be dataclasses of options; a field is an option.

    A parameter's default, an instance of its dataclass, gives the fields' defaults.
    """
    hints = get_type_hints(function, include_extras=True)
    parameters: list[Parameter] = []
    groups: dict[str, Any] = {}
    for parameter in signature(function).parameters.values():
        group = hints[parameter.name]
        if not is_dataclass(group):
            option = _named(parameter.name, group)
            parameters.append(parameter.replace(kind=Parameter.KEYWORD_ONLY, annotation=option))
            continue
        groups[parameter.name] = group
        options = get_type_hints(group, include_extras=True)
        for field in fields(group):
            default = field.default if parameter.default is Parameter.empty else getattr(parameter.default, field.name)
            parameters.append(
                Parameter(
                    field.name, Parameter.KEYWORD_ONLY, default=default, annotation=_named(field.name, options[field.name])
                )
            )

    def command(**values: Any) -> None:
        for name, group in groups.items():
            values[name] = group(**{field.name: values.pop(field.name) for field in fields(group)})
        function(**values)

    command.__name__, command.__doc__ = function.__name__, function.__doc__
    command.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command
