"""A list of settings, each learning the same texts on one host: `python -m bench.search GRID.json --model M --text T ...`.

GRID.json is a list of objects with fields of LocasConfig and Backprop, {"scale": "host", "learning_rate": 0.002}, or with
"method": "temp-lora" and its rank, alpha, learning_rate and epochs, or "method": "truncation". "each" stands for several:
{"scale": "host", "each": {"learning_rate": [0.001, 0.002]}} are two settings, with two names their product. "stride" is one
setting's own. They run in their order, each over all texts. Every result is a line of --out as soon as it is there, and what
is there is not run again.
"""

import argparse
import itertools
import json
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from locas_ext import LocasConfig
from locas_ext.errors import LocasError
from locas_ext.evaluation.inputs import load_host
from locas_ext.evaluation.methods.arm import Arm
from locas_ext.evaluation.methods.registry import held_out_perplexity, locas_settings, reader
from locas_ext.evaluation.texts import Text, read_text
from locas_ext.learning.protocol import Protocol

from .harness import machine

_TEMP_LORA = {"rank": 64, "alpha": None, "learning_rate": 5e-5, "epochs": 2, "seed": 0}


def expanded(entry: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The settings that an object of the grid stands for."""
    each = entry.get("each", {})
    fixed = {name: value for name, value in entry.items() if name != "each"}
    for values in itertools.product(*each.values()):
        yield {**fixed, **dict(zip(each, values, strict=True))}


@dataclass(frozen=True)
class Setting:
    """stride: its own, or None"""

    arm: Arm
    stride: int | None


def arm_of(setting: dict[str, Any]) -> Arm:
    """ValueError or TypeError for a setting that does not exist or is out of range."""
    given = {name: value for name, value in setting.items() if name not in ("method", "stride")}
    method = setting.get("method", "locas")
    label = " ".join(f"{name}={value}" for name, value in setting.items()) or "the defaults"
    if method == "locas":
        of_config = {field.name for field in fields(LocasConfig)}
        config = LocasConfig(**{name: value for name, value in given.items() if name in of_config})
        learning = {name: value for name, value in given.items() if name not in (*of_config, "context_gradient")}
        return Arm(method, label, locas_settings(config, learning, False, given.get("context_gradient", False), {}))
    known = {"temp-lora": _TEMP_LORA, "truncation": {}}
    if method not in known or not given.keys() <= known[method].keys():
        raise ValueError(f"{setting} is no setting of {method!r}; expected locas, or one of {known}")
    settings = {**known[method], **given}
    if settings.get("alpha", 0) is None:
        settings["alpha"] = settings["rank"]
    return Arm(method, label, settings)


def read_grid(file: Path) -> list[Setting]:
    """SystemExit, naming the entry, for a file that is no grid."""
    settings = []
    for number, entry in enumerate(json.loads(file.read_text())):
        try:
            settings += [Setting(arm_of(setting), setting.get("stride")) for setting in expanded(entry)]
        except (TypeError, ValueError) as error:
            raise SystemExit(f"{file}, entry {number}: {error}") from None
    return settings


def _whole(line: str) -> dict | None:
    """A line's result; None for a line that was cut."""
    try:
        return json.loads(line)
    except ValueError:
        return None


class Search:
    """A host, what is read after each text, and the results there are."""

    def __init__(self, host, others: list[Text], window: int, stride: int, out: Path):
        """stride: of settings without their own"""
        self.host, self.others, self.out = host, others, out
        self.window, self.stride = window, stride
        lines = out.read_text().split("\n") if out.exists() else []
        self.results = [result for line in lines if (result := _whole(line)) is not None]

    def protocol(self, setting: Setting) -> Protocol:
        """ValueError or TypeError for a stride that does not fit."""
        return Protocol.of(self.host, self.window, setting.stride or self.stride, False)

    def key(self, setting: Setting, text: Text) -> dict:
        """What a result is a result of."""
        protocol = self.protocol(setting)
        settings = json.loads(json.dumps(setting.arm.settings))
        read = {"text": text.fingerprint, "window": protocol.window, "stride": protocol.stride}
        return {"method": setting.arm.method, "settings": settings, **read}

    def found(self, setting: Setting, text: Text) -> dict | None:
        """The result of an earlier run."""
        key = self.key(setting, text)
        return next((each for each in self.results if {name: each.get(name) for name in key} == key), None)

    def run(self, setting: Setting, text: Text) -> dict:
        """Learns a text, reads the others, and writes the result at once."""
        started, protocol = time.perf_counter(), self.protocol(setting)
        torch.manual_seed(0)
        result = {**self.key(setting, text), "label": setting.arm.label, "perplexity": None, "others": {}}
        try:
            with reader(self.host, setting.arm) as reading:
                report = reading.read(text.ids, protocol.window, protocol.stride, bos=False, progress=False)
                result |= {"perplexity": report.perplexity, "parameters": reading.extra_parameters, "seconds": report.seconds}
                read = {other.name: held_out_perplexity(self.host, [other], protocol) for other in self.others}
                result |= {"others": read, "graph": report.cuda_graph}
        except (LocasError, RuntimeError) as error:  # a setting that diverges is a result
            result["error"] = " ".join(str(error).split())[:300]
        result["all_seconds"] = time.perf_counter() - started
        with self.out.open("a+") as file:
            file.write("\n" * (file.tell() > 0 and not self.out.read_text().endswith("\n")) + json.dumps(result) + "\n")
        self.results.append(result)
        return result


def line_of(result: dict) -> str:
    """A result in a line: the text's perplexity, in brackets those of the others, and the seconds of learning."""
    if result.get("error"):
        return f"{'-':>8}  {result['label']}: {result['error']}"
    others = " ".join(f"{value:.2f}" for value in result["others"].values())
    place = f"{result['text']['name']}  {result['label']}"
    eager = f"; graph: {result['graph']}" if "not" in result["graph"] and result["method"] == "locas" else ""
    return f"{result['perplexity']:8.3f} [{others}] {result['seconds']:5.1f} s  {place}{eager}"


def table(results: list[dict], others: list[Text]) -> Table:
    """All results, the best first."""
    shown = Table("perplexity", *(other.name for other in others), "s", "parameters", "text", "setting", box=None)
    good = [result for result in results if result.get("perplexity") is not None and not result.get("error")]
    for result in sorted(good, key=lambda result: (result["text"]["name"], result["perplexity"])):
        values = [f"{result['others'].get(other.name) or float('nan'):.2f}" for other in others]
        end = f"{result['seconds']:.1f}", f"{result['parameters'] / 1e6:.2f} M", result["text"]["name"], result["label"]
        shown.add_row(f"{result['perplexity']:.3f}", *values, *end)
    return shown


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.search", description=__doc__)
    parser.add_argument("grid", type=Path)
    parser.add_argument("--model", required=True, help="a folder or a GGUF file")
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="what is learned, each by a fresh memory")
    parser.add_argument("--other", type=Path, nargs="*", default=[], help="what is read after that: what was forgotten")
    parser.add_argument("--tokens", type=int, default=60_000, help="of each text")
    parser.add_argument("--other-tokens", type=int, default=8192)
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--stride", type=int, default=512)
    parser.add_argument("--device")
    parser.add_argument("--dtype")
    parser.add_argument("--limit", type=float, default=float("inf"), help="seconds after which no setting begins")
    parser.add_argument("--out", type=Path, required=True, help="JSON lines")
    return parser.parse_args()


def main() -> None:
    arguments, started = parsed(), time.perf_counter()
    settings = read_grid(arguments.grid)
    warnings.simplefilter("ignore")
    host, tokenizer = load_host(arguments.model, arguments.dtype, arguments.device)
    texts = [read_text(path, tokenizer, arguments.tokens) for path in arguments.text]
    others = [read_text(path, tokenizer, arguments.other_tokens) for path in arguments.other]
    search = Search(host, others, arguments.window, arguments.stride, arguments.out)
    print(json.dumps(machine()), f"loaded in {time.perf_counter() - started:.1f} s", flush=True)
    try:
        for setting, text in itertools.product(settings, texts):
            if time.perf_counter() - started > arguments.limit:
                break
            print(line_of(search.found(setting, text) or search.run(setting, text)), flush=True)
    except KeyboardInterrupt:
        print("interrupted; the same command continues", file=sys.stderr)
    Console(width=240).print(table(search.results, others))


if __name__ == "__main__":
    main()
