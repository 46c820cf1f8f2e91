"""What results.json and the files beside it hold: every field's type and range, written once.

Fields that are not named here may be there: a later version may have written them. Numbers that were not finite are null.
"""

import re
from collections.abc import Mapping
from typing import Any

from locas_ext.storage.schema import Kind, Wrong, boolean, integer, list_of, nullable, number, short, text

MOST = 1 << 53  # up to here every integer is a float too


# ---- kinds ---------------------------------------------------------------------------------------------------
def anything(value: Any, place: str) -> None:
    pass


def json_object(value: Any, place: str) -> None:
    if type(value) is not dict:
        raise Wrong(f"{place or 'its content'} is {short(value)}; expected an object")


def mapping(kind: Kind, key: str = ".*") -> Kind:
    """An object with any keys of this form, and values of this kind."""

    def check(value: Any, place: str) -> None:
        json_object(value, place)
        for name, item in value.items():
            if not re.fullmatch(key, name, re.DOTALL):
                raise Wrong(f"{place} has the key {short(name)}; expected keys of the form {key}")
            kind(item, _join(place, name))

    return check


def fields(needed: Mapping[str, Kind], optional: Mapping[str, Kind] | None = None) -> Kind:
    """An object with these keys, and perhaps others."""

    def check(value: Any, place: str) -> None:
        json_object(value, place)
        for name, kind in needed.items():
            if name not in value:
                raise Wrong(f"{_join(place, name)} is missing")
            kind(value[name], _join(place, name))
        for name, kind in (optional or {}).items():
            if name in value:
                kind(value[name], _join(place, name))

    return check


def _join(place: str, name: str) -> str:
    return f"{place}.{name if name.isprintable() else ascii(name)[1:-1]}".lstrip(".")


def row_of(*kinds: Kind) -> Kind:
    """A list of as many items as there are kinds."""

    def check(value: Any, place: str) -> None:
        if type(value) is not list or len(value) != len(kinds):
            raise Wrong(f"{place} is {short(value)}; expected a list of {len(kinds)}")
        for index, (item, kind) in enumerate(zip(value, kinds, strict=True)):
            kind(item, f"{place}[{index}]")

    return check


_count = integer(0, MOST)
_positive = number(1e-12, 1e308)  # what a logarithm can be taken of
_not_negative = number(0, 1e308)
_any_number = number(-1e308, 1e308)
_interval = nullable(row_of(_any_number, _any_number))

# ---- records -------------------------------------------------------------------------------------------------
_COMMON: dict[str, Kind] = {"run": text, "arm": text, "book": text}
_PERPLEXITY_NAMES: dict[str, Kind] = {"method": text, "arm": text, "book": text}
_PERPLEXITY: dict[str, Kind] = {
    "error": nullable(text),
    "arm_settings": nullable(
        fields({}, {"rank": integer(1, MOST), "learning_rate": _not_negative, "init": text}),
    ),
    **dict.fromkeys(("tokens", "words", "bytes", "extra_parameters", "peak_memory_bytes"), nullable(_count)),
    **dict.fromkeys(("perplexity", "perplexity_per_word", "perplexity_per_byte"), nullable(_positive)),
    **dict.fromkeys(("held_out_perplexity", "held_out_perplexity_before"), nullable(_positive)),
    **dict.fromkeys(("nll", "seconds"), nullable(_any_number)),
    "milestones": nullable(mapping(nullable(_positive), "[1-9][0-9]{0,14}")),
    "curve": nullable(list_of(row_of(_count, nullable(_positive)))),
    "reading_order": nullable(list_of(_count)),
}
PERPLEXITY_RECORD = fields(_PERPLEXITY_NAMES, _PERPLEXITY | {"run": text, "relative_time": nullable(_positive)})
JOB_RECORD = fields(_PERPLEXITY_NAMES | _PERPLEXITY | {"seconds": _positive})  # what the same version has just written
LOCOMO_RECORD = fields(
    {
        "method": text,
        "dialogue": text,
        "cut_tokens": _count,
        "seconds": _not_negative,
        "scores": mapping(fields({"count": integer(1, MOST), "f1": number(-1, 1)})),
    },
    _COMMON | {"questions": _count},
)
PREDICTION = fields({"dialogue": text})
_CAPABILITY_TEXT = fields(
    {
        "state": text,
        "text": text,
        "tokens": _count,
        "windows": _count,
        "perplexity": nullable(_positive),
        **dict.fromkeys(("perplexity_ratio", "top1_agreement", "kl"), nullable(_any_number)),
        **dict.fromkeys(("perplexity_ratio_interval", "top1_agreement_interval", "kl_interval"), _interval),
        "same_bits_as_host": boolean,
        "seconds": _not_negative,
    },
    _COMMON | {"pooled": boolean},
)
_WINDOW = row_of(integer(1, MOST), _any_number, _any_number, _not_negative, nullable(_any_number))
_CAPABILITY_TASK = fields(
    {
        "state": text,
        "task": text,
        "metric": text,
        "value": _any_number,
        "stderr": nullable(_any_number),
        "questions": _count,
        "difference": _any_number,
        "difference_interval": _interval,
        "same_bits_as_host": boolean,
        "per_question": nullable(list_of(_any_number)),
        "responses_sha256": text,
    },
    _COMMON | {"cut_questions": _count},
)


def _capability_record(value: Any, place: str) -> None:
    """The record of a task, of a text, or of all texts together: `pooled`."""
    json_object(value, place)
    if "task" in value:
        return _CAPABILITY_TASK(value, place)
    _CAPABILITY_TEXT(value, place)
    if value.get("pooled"):
        return
    fields({"per_window": list_of(_WINDOW)}, {"first_difference": nullable(row_of(_count, _count))})(value, place)
    if not value["same_bits_as_host"] and value.get("first_difference") is None:
        raise Wrong(f"{place}.first_difference is missing; expected the tokens at which the bits differ")


_share = number(0, 1)
_RECALL_ANSWER = fields(
    {"kind": text, "contained": boolean},
    {
        **dict.fromkeys(("question", "prediction"), text),
        "gold": nullable(text),
        "f1": nullable(_share),
        **dict.fromkeys(("choice", "calibrated"), nullable(boolean)),
        "gold_nats": nullable(_any_number),
    },
)
_RECALL_DONE = fields(
    {
        "perplexity": nullable(_positive),
        "other_kl": nullable(_any_number),
        "kept": nullable(_share),
        "kept_interval": _interval,
        "answers": list_of(_RECALL_ANSWER),
    },
    {
        **dict.fromkeys(("extra_parameters", "kept_questions"), _count),
        **dict.fromkeys(("kept_in_float32", "kept_by_rounding"), nullable(_share)),
        "kept_in_float32_interval": _interval,
        "notes": list_of(text),
    },
)


def _recall_record(value: Any, place: str) -> None:
    """The record of a method that could not answer: `error` alone."""
    fields({"method": text, "document": text, "error": nullable(text), "seconds": _not_negative}, _COMMON)(value, place)
    if value["error"] is None:
        _RECALL_DONE(value, place)
        fields({}, {"after": _RECALL_DONE})(value, place)


# ---- settings and machine ------------------------------------------------------------------------------------
_SETTINGS: dict[str, Kind] = {
    **dict.fromkeys(("model", "model_type", "ablate", "dtype", "device"), nullable(text)),
    **dict.fromkeys(("window", "stride", "seed", "max_tokens"), nullable(integer(-MOST, MOST))),
}
_LISTS = dict.fromkeys(("arms", "books"), nullable(list_of(anything)))
_LOCOMO_SETTINGS: dict[str, Kind] = {"methods": list_of(text), "dialogues": mapping(text), "prompts": mapping(text)}
_CORRECTIONS = nullable(fields({"file": text, "dialogues": mapping(fields({"audited": _count, "wrong": _count}))}))
_MACHINE: dict[str, Kind] = {
    **dict.fromkeys(("processor", "torch", "locas_ext"), nullable(text)),
    "gpus": nullable(list_of(text)),
}


def _settings(value: Any, place: str) -> None:
    """The settings of one run, or of several: what they share, and each one's under `runs`."""
    json_object(value, place)
    command = {"command": nullable(text)}
    own = _LOCOMO_SETTINGS if value.get("command") == "locomo" else {}
    corrected = {"corrections": _CORRECTIONS} if own else {}
    optional = command | _SETTINGS | _LISTS | corrected
    if "runs" in value:
        fields({"runs": mapping(fields(own, optional))}, own | optional)(value, place)
    else:
        fields(own, optional)(value, place)


RECORDS: dict[str | None, Kind] = {
    "capability": _capability_record,
    "locomo": LOCOMO_RECORD,
    "perplexity": PERPLEXITY_RECORD,
    "recall": _recall_record,
}


def results(value: Any, place: str) -> None:
    """The content of results.json; of a command that is not known here, only that there are settings and records."""
    machine = fields({}, _MACHINE | {"runs": mapping(fields({}, _MACHINE))})
    fields({"settings": _settings, "machine": machine, "records": list_of(json_object)})(value, place)
    list_of(RECORDS.get(value["settings"].get("command"), json_object))(value["records"], "records")
