"""The methods of `locas perplexity`, each as a Reader of a host, and what one arm measures on one text."""

import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch

from locas_ext import memory as locas
from locas_ext.config import LocasConfig
from locas_ext.errors import LocasError, is_out_of_memory
from locas_ext.evaluation.texts import Text
from locas_ext.hosts.text_config import max_positions
from locas_ext.learning.initialization import backprop_for
from locas_ext.learning.keep import Keep, context_of
from locas_ext.learning.perplexity import perplexity
from locas_ext.learning.protocol import Protocol
from locas_ext.learning.update import BACKPROP_NUMBERS, backprop_numbers
from locas_ext.memory import Backprop, Chunk, MemorizeReport

from .adapter_files import save_lora
from .arm import CONTROLS, OTHER_TEXT, SHUFFLED, Arm
from .controls import other_text, shuffled
from .long_context import long_context
from .sliding import check_keep, sliding
from .temp_lora import lora, require_peft, temp_lora
from .truncation import truncation


@dataclass
class Measurement:
    """What one arm did on one text. Where `error` says why it ended early, `chunks` are those scored until then.

    seconds: of reading and learning; loading, the held-out texts and saving are not in it
    held_out_perplexity: after reading, with what was learned still in place; None without held-out texts
    peak_memory_bytes: of this process on its CUDA device; None on the CPU
    """

    chunks: list[Chunk] = field(default_factory=list)
    seconds: float = math.nan
    extra_parameters: int = 0
    held_out_perplexity: float | None = None
    error: str | None = None
    peak_memory_bytes: int | None = None


def held_out_perplexity(host, texts: list[Text], protocol: Protocol) -> float | None:
    """Over all texts together, read in windows side by side by the model as it is; None without texts."""
    reports = [truncation(host, text.ids, protocol.window, protocol.room, progress=False, bos=protocol.bos) for text in texts]
    tokens = sum(report.tokens for report in reports)
    return perplexity(math.fsum(report.nll for report in reports), tokens) if tokens else None


# ---- the methods ---------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Reader:
    """A host about to read one text by one method.

    read: takes input_ids, window, stride, bos, progress and callback as `truncation` does; returns a MemorizeReport
    extra_parameters: how many learn
    save: keeps what was learned in a folder
    """

    read: Callable[..., MemorizeReport]
    extra_parameters: int = 0
    save: Callable[[Path], None] = lambda folder: None


@contextmanager
def _truncation(host, arm: Arm) -> Iterator[Reader]:
    yield Reader(partial(truncation, host))


@contextmanager
def _sliding(host, arm: Arm) -> Iterator[Reader]:
    yield Reader(partial(sliding, host, sinks=arm.settings["sinks"]))


@contextmanager
def _long_context(host, arm: Arm) -> Iterator[Reader]:
    """A window of its own, but the chunks of all."""
    context = arm.settings["context"]
    yield Reader(lambda ids, window, stride, **options: long_context(host, ids, context, stride, **options))


@contextmanager
def _temp_lora(host, arm: Arm) -> Iterator[Reader]:
    settings = arm.settings
    learning = {name: settings[name] for name in ("learning_rate", "epochs")}
    with lora(host, settings["rank"], settings["alpha"], settings["seed"]) as parameters:
        read = partial(temp_lora, host, parameters, **learning)
        save = partial(save_lora, host, settings["rank"], settings["alpha"])
        yield Reader(read, sum(parameter.numel() for parameter in parameters), save)


def locas_settings(
    config: LocasConfig,
    learning: Mapping[str, Any],
    rehome: bool,
    context_gradient: bool,
    context: Mapping[str, Any],
    paper: bool = False,
) -> dict:
    """The settings of the method "locas": what attaches the memory and what it learns by, ready for JSON.

    learning: fields of Backprop; those left out are as `Memory.memorize` fills them in, or with `paper` the paper's
    context: what keep.py, `context_of`, reads; empty if each window is read anew
    """
    update = backprop_numbers(backprop_for(config, learning, paper))
    return {**config.to_dict(), **update, "rehome": rehome, "context_gradient": context_gradient, **context}


def locas_config(settings: dict) -> LocasConfig:
    return LocasConfig(**{field.name: settings[field.name] for field in fields(LocasConfig)})


def locas_update(settings: dict) -> Backprop:
    return Backprop(**{name: settings[name] for name in BACKPROP_NUMBERS})


@contextmanager
def _locas(host, arm: Arm) -> Iterator[Reader]:
    """The method and its controls."""
    settings = arm.settings
    memory = locas.attach(host, locas_config(settings), rehome=settings["rehome"])
    learning = {
        "update": locas_update(settings),
        "context_gradient": settings["context_gradient"],
        "context": context_of(settings) or "recompute",
        # Truncation says how hard the text is without a memory, and a run that diverges is a result too.
        "on_divergence": "ignore",
    }
    reads: dict[str, Callable[..., MemorizeReport]] = {
        "locas": partial(memory.memorize, **learning),
        SHUFFLED: partial(shuffled, memory, seed=settings["seed"], learning=learning),
    }
    if arm.other_text is not None:
        reads[OTHER_TEXT] = partial(other_text, memory, arm.other_text.ids, learning=learning)
    try:
        yield Reader(reads[arm.method], memory.num_parameters, memory.save_pretrained)
    finally:
        memory.detach()


_READERS = {
    "truncation": _truncation,
    "sliding": _sliding,
    "long-context": _long_context,
    "temp-lora": _temp_lora,
    **dict.fromkeys(("locas", *CONTROLS), _locas),
}


def reader(host, arm: Arm) -> AbstractContextManager[Reader]:
    """A fresh Reader of this arm; what it learned acts on the host until the block ends, and then is gone."""
    return _READERS[arm.method](host, arm)


def check_arm(host, arm: Arm, protocol: Protocol, longest: int = 0) -> None:
    """Raises what the arm would raise only hours later: ValueError, or LocasError where peft is not installed.

    longest: the tokens of the longest text, which a kept context has to fit
    """
    settings = arm.settings
    keep = Keep(sinks=settings["sinks"]) if arm.method == "sliding" else context_of(settings)
    if keep is not None:
        check_keep(host, protocol, keep, longest, settings.get("context_gradient", False))
    if arm.method == "temp-lora":
        require_peft()
    if arm.method == "long-context":
        least, most = protocol.stride + 1 if protocol.bos else max(2, protocol.stride), max_positions(host)
        if not least <= settings["context"] <= most:
            raise ValueError(
                f"--long-context is {settings['context']}; expected an integer from {least}, what a chunk takes, to "
                f"{most}, the host's positions"
            )
    if arm.method in CONTROLS and keep is not None:
        raise ValueError(f"{arm.method} scores windows that are read anew; expected --context recompute")
    if arm.method in ("locas", *CONTROLS):
        if settings["init"] == "activation" and settings["rank"] > protocol.stride:
            raise ValueError(
                f"init='activation' takes one token per slot: rank is {settings['rank']}, but the first chunk "
                f"has {protocol.stride} tokens; use a --stride of at least the rank"
            )
        with reader(host, arm):
            pass


# ---- one arm on one text -------------------------------------------------------------------------------------
def measure(
    host,
    arm: Arm,
    text: Text,
    protocol: Protocol,
    held_out: list[Text],
    memory_folder: Path,
    on_chunk: Callable[[Chunk], object],
    progress: bool,
) -> Measurement:
    """Reads a text with one arm; the host afterwards is as before.

    memory_folder: where what was learned is saved
    on_chunk: called with each finished Chunk

    An arm that runs out of memory, or whose loss is no longer finite, is a result: its measurement says so.
    """
    measurement = Measurement()

    def callback(chunk: Chunk) -> None:
        measurement.chunks.append(chunk)
        on_chunk(chunk)

    on_cuda = host.device.type == "cuda"
    if on_cuda:
        torch.cuda.reset_peak_memory_stats(host.device)
    started = time.perf_counter()
    try:
        with reader(host, arm) as reading:
            measurement.extra_parameters = reading.extra_parameters
            report = reading.read(
                text.ids, protocol.window, protocol.stride, bos=protocol.bos, progress=progress, callback=callback
            )
            measurement.seconds = report.seconds
            measurement.held_out_perplexity = held_out_perplexity(host, held_out, protocol)
            reading.save(memory_folder)
    except LocasError as error:
        measurement.error = str(error)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        measurement.error = "out of memory"
    if measurement.error is not None:
        measurement.seconds = time.perf_counter() - started
    if on_cuda:
        measurement.peak_memory_bytes = torch.cuda.max_memory_allocated(host.device)
        gc.collect()
        torch.cuda.empty_cache()
    return measurement
