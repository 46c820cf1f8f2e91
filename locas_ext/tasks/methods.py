"""One arm on one text: each method of `locas perplexity` is a function here."""

import gc
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from .. import memory as locas
from ..config import LocasConfig
from ..errors import LocasError
from ..memory import Chunk
from .arms import Arm
from .loading import Text
from .long_context import long_context
from .temp_lora import lora, temp_lora
from .truncation import truncation


@dataclass(frozen=True)
class Protocol:
    """How every method of a study reads: docs/method.md, "The online protocol"."""

    window: int
    stride: int
    bos: bool


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


@dataclass(frozen=True)
class Reading:
    """Everything a method needs: the host, the text, how to read it, and where to say what it did."""

    host: torch.nn.Module
    arm: Arm
    text: Text
    protocol: Protocol
    held_out: list[Text]
    memory_folder: Path
    progress: bool
    callback: Callable[[Chunk], None]
    measurement: Measurement

    @property
    def options(self) -> dict:
        """What all methods' functions take alike."""
        return dict(stride=self.protocol.stride, bos=self.protocol.bos, progress=self.progress, callback=self.callback)

    def held_out_perplexity(self) -> float | None:
        return held_out_perplexity(self.host, self.held_out, self.protocol)


def held_out_perplexity(host, texts: list[Text], protocol: Protocol) -> float | None:
    """exp(sum NLL / tokens) over all texts, read in windows side by side by the model as it is; None without texts."""
    room = protocol.window - 1 if protocol.bos else protocol.window
    reports = [
        truncation(host, text.ids, protocol.window, room, progress=False, bos=protocol.bos) for text in texts
    ]
    tokens = sum(report.tokens for report in reports)
    return math.exp(math.fsum(report.nll for report in reports) / tokens) if tokens else None


# ---- the methods ---------------------------------------------------------------------------------------------
def _truncation(reading: Reading) -> None:
    report = truncation(reading.host, reading.text.ids, reading.protocol.window, **reading.options)
    reading.measurement.seconds = report.seconds
    reading.measurement.held_out_perplexity = reading.held_out_perplexity()


def _long_context(reading: Reading) -> None:
    report = long_context(reading.host, reading.text.ids, reading.arm.settings["context"], **reading.options)
    reading.measurement.seconds = report.seconds
    reading.measurement.held_out_perplexity = reading.held_out_perplexity()


def _temp_lora(reading: Reading) -> None:
    settings, measurement = reading.arm.settings, reading.measurement
    with lora(reading.host, settings["rank"], settings["alpha"], settings["seed"]) as parameters:
        measurement.extra_parameters = sum(parameter.numel() for parameter in parameters)
        report = temp_lora(
            reading.host, parameters, reading.text.ids, reading.protocol.window,
            learning_rate=settings["learning_rate"], epochs=settings["epochs"], **reading.options,
        )
        measurement.seconds = report.seconds
        measurement.held_out_perplexity = reading.held_out_perplexity()


def locas_config(arm: Arm) -> LocasConfig:
    names = ("variant", "rank", "init", "scale", "clip", "seed")
    return LocasConfig(**{name: arm.settings[name] for name in names})


def _locas(reading: Reading) -> None:
    settings, measurement = reading.arm.settings, reading.measurement
    memory = locas.attach(reading.host, locas_config(reading.arm))
    try:
        measurement.extra_parameters = memory.slots.numel()
        report = memory.memorize(
            reading.text.ids, reading.protocol.window,
            learning_rate=settings["learning_rate"], epochs=settings["epochs"], **reading.options,
        )
        measurement.seconds = report.seconds
        measurement.held_out_perplexity = reading.held_out_perplexity()
        memory.save_pretrained(reading.memory_folder)
    finally:
        memory.detach()


_RUN = {"truncation": _truncation, "long-context": _long_context, "temp-lora": _temp_lora, "locas": _locas}


def _is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def measure(
    host,
    arm: Arm,
    text: Text,
    protocol: Protocol,
    held_out: list[Text],
    memory_folder: Path,
    on_chunk: Callable[[Chunk], None],
    progress: bool,
) -> Measurement:
    """Reads a text with one arm; the host afterwards is as before.

    memory_folder: where the memory that Locas learned is saved
    on_chunk: called with each finished Chunk

    An arm that runs out of memory, or whose loss is no longer finite, is a result: its measurement says so.
    """
    measurement = Measurement()

    def callback(chunk: Chunk) -> None:
        measurement.chunks.append(chunk)
        on_chunk(chunk)

    reading = Reading(host, arm, text, protocol, held_out, memory_folder, progress, callback, measurement)
    on_cuda = host.device.type == "cuda"
    if on_cuda:
        torch.cuda.reset_peak_memory_stats(host.device)
    started = time.perf_counter()
    try:
        _RUN[arm.method](reading)
    except LocasError as error:
        measurement.error = str(error)
    except RuntimeError as error:
        if not _is_out_of_memory(error):
            raise
        measurement.error = "out of memory"
    if measurement.error is not None:
        measurement.seconds = time.perf_counter() - started
    if on_cuda:
        measurement.peak_memory_bytes = torch.cuda.max_memory_allocated(host.device)
        gc.collect()
        torch.cuda.empty_cache()
    return measurement
