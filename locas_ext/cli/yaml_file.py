"""Reading a YAML file of settings: plain values only, nothing that builds objects, repeats itself or grows."""

import re
from pathlib import Path
from typing import Any

import yaml

MOST_BYTES = 64 * 1024
_MOST_DEPTH = 8
_OPENS = (yaml.FlowSequenceStartToken, yaml.FlowMappingStartToken, yaml.BlockSequenceStartToken, yaml.BlockMappingStartToken)
_CLOSES = (yaml.FlowSequenceEndToken, yaml.FlowMappingEndToken, yaml.BlockEndToken)
_REFUSED = {yaml.TagToken: "tags (!)", yaml.AnchorToken: "anchors (&)", yaml.AliasToken: "aliases (*)"}


class _Loader(yaml.SafeLoader):
    """YAML's safe loader with the numbers of YAML 1.2 (4e-3 is one, 010 is ten, 1:30 is text), dates as text, each key once."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict:
        keys = [key.value for key, _ in node.value]
        if twice := next((key for key in keys if keys.count(key) > 1), None):
            raise yaml.MarkedYAMLError(problem=f"the key {twice!r} stands there twice", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


_INT, _FLOAT = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"
_NUMBERS = {
    _INT: r"[-+]?[0-9]+$",
    _FLOAT: r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$",
}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _NUMBERS and not tag.endswith(":timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, _form in _NUMBERS.items():  # integers first: what is both is one
    _Loader.add_implicit_resolver(_tag, re.compile(_form), list("-+.0123456789"))
_Loader.add_constructor(_INT, lambda loader, node: int(node.value))


def _check_tokens(content: str) -> None:
    depth = 0
    for token in yaml.scan(content, Loader=_Loader):
        if type(token) in _REFUSED:
            raise yaml.MarkedYAMLError(problem=f"{_REFUSED[type(token)]} are not taken", problem_mark=token.start_mark)
        depth += isinstance(token, _OPENS) - isinstance(token, _CLOSES)
        if depth > _MOST_DEPTH:
            raise yaml.MarkedYAMLError(problem="too deeply nested", problem_mark=token.start_mark)


def _reason(error: yaml.YAMLError) -> str:
    """The problem and its line; what the library says is spread over many."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    return f"{problem or error}{f' (line {mark.line + 1})' if mark else ''}"


def read_mapping(file: Path) -> dict[str, Any]:
    """The keys and values of a YAML file; an empty one has none. ValueError says what is wrong with it."""
    with file.open("rb") as stream:
        content = stream.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise ValueError(f"{file} is larger than {MOST_BYTES // 1024} KiB; expected a file of settings")
    try:
        text = content.decode("utf-8")
        _check_tokens(text)
        mapping = yaml.load(text, _Loader)
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text (byte {error.start})") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{file} is not a YAML file of settings: {_reason(error)}") from None
    except ValueError as error:  # a number or a date that Python does not take
        raise ValueError(f"{file} holds a value that cannot be read: {error}") from None
    if mapping is not None and not isinstance(mapping, dict):
        raise ValueError(f"{file} holds {_article(mapping)}; expected a mapping of options, such as `rank: 128`")
    if strange := [key for key in mapping or {} if not isinstance(key, str)]:
        raise ValueError(f"{file}: the key {strange[0]!r} is not text; expected names of options")
    return mapping or {}


def _article(value: Any) -> str:
    return "a list" if isinstance(value, list) else "text" if isinstance(value, str) else "a single value"
