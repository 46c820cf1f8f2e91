"""Options that several commands have: one name, one kind of value and one help text each; and the groups they come in."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from locas_ext.config import BACKENDS, INITS, MOST_CLIP, ROW_LENGTHS, VARIANTS, LocasConfig
from locas_ext.learning.keep import CONTEXTS, Keep

from . import values
from .values import Kind, integer, number, one_of, path, text

DTYPES = ("float32", "bfloat16", "float16")
OPTIMIZERS = ("adamw", "sgd", "shampoo")
HOST, READING, MEMORY, LEARNING, WRITING = (
    "The host",
    "How the text is read",
    "The memory",
    "Learning",
    "Writing (--update write)",
)
TEMP_LORA, RUN = "Temp-LoRA", "This run"


_WIDEST = 13  # a longer list of choices goes from the column of kinds into the help text


def option(kind: Kind, help: str, *names: str, panel: str = RUN) -> Any:
    metavar = kind.metavar
    if len(metavar) > _WIDEST:
        metavar, help = "CHOICE", f"{help} Expected: {kind.expected}."
    return typer.Option(*names, parser=kind, metavar=metavar, help=help, rich_help_panel=panel)


def flag(help: str, *names: str, panel: str = RUN) -> Any:
    return typer.Option(*names, metavar="", help=help, rich_help_panel=panel)


def argument(kind: Kind, help: str) -> Any:
    return typer.Argument(parser=kind, metavar=kind.metavar, help=help, show_default=False)


# ---- what every command that loads a model has ----------------------------------------------------------------
Model = Annotated[str, option(values.MODEL, "A folder, a hub name or a GGUF file.", panel=HOST)]
Dtype = Annotated[
    str | None, option(one_of(DTYPES), "The host's dtype; default: float32 on CPU, the checkpoint's on CUDA.", panel=HOST)
]
Device = Annotated[str | None, option(text("cpu|cuda:N"), "Where the host runs; default: CUDA where there is one.", panel=HOST)]
DeviceOrCpu = Annotated[str | None, option(text("cpu|cuda:N"), "Where the host runs; default: the CPU.", panel=HOST)]
MemoryFolder = Annotated[Path, option(path("DIR"), "A folder that `locas memorize` wrote.", panel=HOST)]


@dataclass(frozen=True, kw_only=True)
class HostOptions:
    """How the host is loaded."""

    dtype: Dtype = None
    device: Device = None


# ---- how a text is read ---------------------------------------------------------------------------------------
Window = Annotated[
    int | None, option(integer(2), "Tokens seen at once; default: 2048, or the host's positions if fewer.", panel=READING)
]
Stride = Annotated[int | None, option(integer(1), "Tokens per chunk; default: a quarter of the window.", panel=READING)]
Bos = Annotated[bool, flag("Put the host's BOS token before every window.", "--bos", panel=READING)]
MaxTokens = Annotated[
    int | None, option(integer(2), "Read at most this many tokens of each text; default: all.", panel=READING)
]
HeldOut = Annotated[
    list[Path] | None,
    option(path("TEXT"), "A text to measure forgetting on, not read before; may be given several times.", panel=READING),
]
HeldOutTokens = Annotated[
    int | None, option(integer(2), "Read at most this many tokens of each held-out text; default: all.", panel=READING)
]


@dataclass(frozen=True, kw_only=True)
class ReadingOptions:
    """The windows in which a text is read."""

    window: Window = None
    stride: Stride = None


@dataclass(frozen=True, kw_only=True)
class ContextOptions:
    """How the context before a chunk comes about. sinks: None: the default of a kept one."""

    context: Annotated[
        str,
        option(
            one_of(CONTEXTS),
            "Read each window anew, or keep what earlier chunks left in the KV cache: faster, rotary hosts only.",
            panel=READING,
        ),
    ] = "recompute"
    sinks: Annotated[
        int | None,
        option(integer(0), "How many of the text's first tokens stay in a kept context; default: 4.", panel=READING),
    ] = None
    refresh_every: Annotated[
        int | None,
        option(integer(1), "Read a kept context anew before every N-th chunk; default: never.", panel=READING),
    ] = None

    def settings(self, with_baseline: bool = False) -> dict[str, Any]:
        """`context` and the fields of Keep where it is kept; otherwise nothing.

        with_baseline: whether there is a method beside that takes sinks

        ValueError for an option of a kept context where nothing takes it.
        """
        sinks = Keep().sinks if self.sinks is None else self.sinks
        if self.context == "keep":
            return {"context": "keep", "sinks": sinks, "refresh_every": self.refresh_every}
        given = {"--refresh-every": self.refresh_every, "--sinks": None if with_baseline else self.sinks}
        for name, value in given.items():
            if value is not None:
                raise ValueError(f"{name} is given, but --context is {self.context}; expected --context keep")
        return {"sinks": sinks} if self.sinks is not None else {}


# ---- Locas ----------------------------------------------------------------------------------------------------
Variant = Annotated[
    str, option(one_of(VARIANTS), "glu for hosts with a gated FFN, mlp for those with a two-layer one.", panel=MEMORY)
]
Rank = Annotated[int, option(integer(1), "Slots per layer.", panel=MEMORY)]
Layers = Annotated[
    Any,  # a tuple of integers or None: a tuple's type would make typer take several arguments
    option(values.LAYERS, "The layers that get a memory; negative ones count from the end; default: all.", panel=MEMORY),
]
Init = Annotated[str, option(one_of(INITS), "How gate and key rows start.", panel=MEMORY)]
Scale = Annotated[Any, option(values.SCALE, "The memory's output scale, tau; default: host.", panel=MEMORY)]
Clip = Annotated[bool, flag("Whether no row grows longer than 1.", "--clip/--no-clip", panel=MEMORY)]
Backend = Annotated[str, option(one_of(BACKENDS), "What computes the FFN with its memory.", panel=MEMORY)]
Seed = Annotated[int, option(integer(0), "Seed of the random draws.")]
LearningRate = Annotated[float | None, option(number(low=0), "Learning rate of the optimizer; default: 0.006.", panel=LEARNING)]
Epochs = Annotated[int | None, option(integer(1), "Learning passes over each chunk; default: 1.", panel=LEARNING)]
Paper = Annotated[
    bool,
    flag("Defaults are the paper's: scale paper, plain adamw, a learning rate of 0.004 that stays.", "--paper", panel=LEARNING),
]
Rehome = Annotated[
    bool,
    flag("Move the host's FFN weights next to the memory, so that one product computes both.", "--rehome", panel=MEMORY),
]
ContextGradient = Annotated[
    bool, flag("Let the gradient run through the context before the chunk too; slower.", "--context-gradient", panel=LEARNING)
]


@dataclass(frozen=True, kw_only=True)
class MemoryOptions:
    """The fields of LocasConfig."""

    variant: Variant = "glu"
    rank: Rank = 64
    layers: Layers = None
    init: Init = "topk"
    scale: Scale = None
    clip: Clip = True
    backend: Backend = "auto"
    seed: Seed = 0
    row_length: Annotated[
        str, option(one_of(ROW_LENGTHS), "Whether rows start with length 1 or as long as the host's.", panel=MEMORY)
    ] = "unit"
    clip_at: Annotated[
        float | None,
        option(
            number(above=0, high=MOST_CLIP),
            "Keep rows within this multiple of the host's mean row length, not of 1.",
            panel=MEMORY,
        ),
    ] = None

    def config(self, paper: bool = False) -> LocasConfig:
        """paper: whether what is None is as LocasConfig.paper() has it. ValueError for --clip-at beside --no-clip."""
        settings = {name: value for name, value in vars(self).items() if value is not None}
        length = settings.pop("clip_at", None)
        if length is not None and not self.clip:
            raise ValueError(f"--clip-at is {length:g} beside --no-clip; leave one of them out")
        make = LocasConfig.paper if paper else LocasConfig
        return make(**{**settings, "clip": self.clip if length is None else length})


@dataclass(frozen=True, kw_only=True)
class LearningOptions:
    """The fields of Backprop. None: its default, so that one given beside --update write can be told."""

    learning_rate: LearningRate = None
    epochs: Epochs = None
    optimizer: Annotated[str | None, option(one_of(OPTIMIZERS), "Default: shampoo.", panel=LEARNING)] = None
    gate_learning_rate: Annotated[
        float | None, option(number(low=0), "Learning rate of gate rows; default: that of all.", panel=LEARNING)
    ] = None
    value_learning_rate: Annotated[
        float | None, option(number(low=0), "Learning rate of value rows; default: that of all.", panel=LEARNING)
    ] = None
    decay_after: Annotated[
        int | None,
        option(
            integer(1),
            "Divide learning rates by sqrt(1 + u / N) after u updates of the memory; default: 10.",
            panel=LEARNING,
        ),
    ] = None
    cautious: Annotated[
        bool | None,
        flag(
            "Move only numbers whose gradient has the sign of the optimizer's mean of gradients; default: with shampoo.",
            "--cautious/--no-cautious",
            panel=LEARNING,
        ),
    ] = None

    def given(self) -> dict[str, Any]:
        """Those that the command line or the file says."""
        return {name: value for name, value in vars(self).items() if value is not None}


# ---- Temp-LoRA ------------------------------------------------------------------------------------------------
@dataclass(frozen=True, kw_only=True)
class TempLoraOptions:
    """Temp-LoRA as a method among others."""

    temp_lora_rank: Annotated[int, option(integer(1), "Rank of the adapter.", panel=TEMP_LORA)] = 64
    temp_lora_alpha: Annotated[
        float | None, option(number(above=0), "Scale times rank; default: the rank.", panel=TEMP_LORA)
    ] = None
    temp_lora_lr: Annotated[float, option(number(low=0), "Learning rate of AdamW.", "--temp-lora-lr", panel=TEMP_LORA)] = 5e-5
    temp_lora_epochs: Annotated[int, option(integer(1), "Learning passes over each chunk.", panel=TEMP_LORA)] = 2

    def settings(self, seed: int) -> dict[str, Any]:
        return {
            "rank": self.temp_lora_rank,
            "alpha": self.temp_lora_alpha,
            "learning_rate": self.temp_lora_lr,
            "epochs": self.temp_lora_epochs,
            "seed": seed,
        }


# ---- answers, questions, results --------------------------------------------------------------------------------
MaxNewTokens = Annotated[int, option(integer(1), "Write at most this many tokens.")]
BatchSize = Annotated[int, option(integer(1), "Questions answered at once.")]
ResultsFolder = Annotated[
    Path, option(path("DIR"), "Where the results go; the same command resumes a run that was interrupted.")
]
