"""A study: texts, the arms that read them, and how, from the arguments of `locas perplexity`; loaded and checked."""

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from .. import memory as locas
from .ablations import NEED_HELD_OUT, PRESETS
from .arms import METHODS, Arm, choose, make_arm, slug
from .loading import load_host, read_text
from .methods import Protocol, held_out_perplexity, locas_config
from .parallel import world_size
from .temp_lora import require_peft
from .truncation import truncation


@dataclass(frozen=True)
class PerplexityTask:
    """The arguments of the command.

    methods: None: "truncation" and "locas"; with `ablate`: all of the preset
    locas, temp_lora: the settings of those methods
    long_context: tokens; None: the host's positions
    held_out_tokens: at most so many of each held-out text; None: all
    """

    books: list[Path]
    model: str
    out: Path
    methods: list[str] | None
    ablate: str | None
    locas: dict
    temp_lora: dict
    long_context: int | None
    window: int | None
    stride: int | None
    max_tokens: int | None
    held_out: list[Path]
    held_out_tokens: int | None
    bos: bool
    processes: int
    dtype: str | None
    device: str | None


# ---- arguments -----------------------------------------------------------------------------------------------
def _check_learning(settings: dict, rank: str, learning_rate: str, epochs: str) -> None:
    """The settings of one method and the options that they come from."""
    if not 0 <= settings["learning_rate"] < math.inf:
        raise ValueError(f"{learning_rate} is {settings['learning_rate']}; expected a finite number >= 0")
    for option, value in ((rank, settings["rank"]), (epochs, settings["epochs"])):
        if value < 1:
            raise ValueError(f"{option} is {value}; expected an integer >= 1")


def _check(task: PerplexityTask) -> None:
    """ValueError or OSError for what can be seen before anything is loaded."""
    if task.methods is not None:
        choose("--methods", task.methods, METHODS)
        if not task.methods:
            raise ValueError(f"--methods is empty; expected some of {', '.join(METHODS)}")
    if task.ablate is not None:
        choose("--ablate", [task.ablate], PRESETS)
        if task.ablate in NEED_HELD_OUT and not task.held_out:
            raise ValueError(f"--ablate {task.ablate} compares learning with forgetting: it needs --held-out TEXT")
    _check_learning(task.locas, "--rank", "--learning-rate", "--epochs")
    _check_learning(task.temp_lora, "--temp-lora-rank", "--temp-lora-lr", "--temp-lora-epochs")
    alpha = task.temp_lora["alpha"]
    if alpha is not None and not 0 < alpha < math.inf:
        raise ValueError(f"--temp-lora-alpha is {alpha}; expected a finite number > 0")
    if task.processes < 1:
        raise ValueError(f"--processes is {task.processes}; expected an integer >= 1")
    if task.processes > 1 and world_size() > 1:
        raise ValueError(f"--processes is {task.processes}, but {world_size()} processes were started already")
    for name, tokens in (("--max-tokens", task.max_tokens), ("--held-out-tokens", task.held_out_tokens)):
        if tokens is not None and tokens < 2:
            raise ValueError(f"{name} is {tokens}; expected an integer >= 2")
    names = [slug(book.stem) for book in task.books]
    if twice := [book for book, name in zip(task.books, names) if names.count(name) > 1]:
        raise ValueError(f"{twice[0]} and {twice[1]} are two books of one name; records are named after their books")
    for path in (*task.books, *task.held_out):
        path.open("rb").close()


def _arms(task: PerplexityTask, context: int) -> list[Arm]:
    base = {"truncation": {}, "long-context": {"context": context}, "temp-lora": task.temp_lora, "locas": task.locas}
    if task.ablate is None:
        return [make_arm(base, method) for method in task.methods or ("truncation", "locas")]
    arms = [arm for arm in PRESETS[task.ablate](base) if task.methods is None or arm.method in task.methods]
    if not arms:
        raise ValueError(f"--ablate {task.ablate} has no arm with the methods {', '.join(task.methods)}")
    return arms


def _protocol(task: PerplexityTask, positions: int) -> Protocol:
    window = min(2048, positions) if task.window is None else task.window
    if not 2 <= window <= positions:
        raise ValueError(f"--window is {window}; expected an integer from 2 to {positions}, the host's positions")
    stride = max(1, window // 4) if task.stride is None else task.stride
    room = window - 1 if task.bos else window
    if not 1 <= stride <= room:
        raise ValueError(f"--stride is {stride}; expected an integer from 1 to {room}, what the window holds")
    return Protocol(window, stride, task.bos)


# ---- a study: what is read, by whom, how ---------------------------------------------------------------------
class Study:
    """The host, the texts and the arms of a task.

    Loading it checks everything: raises ValueError, LocasError or OSError for arguments that do not fit.
    """

    def __init__(self, task: PerplexityTask, device: str | None):
        _check(task)
        self.task = task
        self.host, tokenizer = load_host(task.model, task.dtype, device)
        self.positions = self.host.config.get_text_config(decoder=True).max_position_embeddings
        self.protocol = _protocol(task, self.positions)
        context = self.positions if task.long_context is None else task.long_context
        self.arms = _arms(task, context)
        self._check_arms()
        self.books = [read_text(path, tokenizer, task.max_tokens) for path in task.books]
        for path, book in zip(task.books, self.books):
            if len(book.ids) < self.protocol.window:
                raise ValueError(
                    f"{path}: {len(book.ids)} tokens to read are fewer than the window, {self.protocol.window}; "
                    "choose a longer text, more --max-tokens or a smaller --window"
                )
        self.held_out = [read_text(path, tokenizer, task.held_out_tokens) for path in task.held_out]

    def _check_arms(self) -> None:
        """Raises what an arm would raise only hours later."""
        if any(arm.method == "temp-lora" for arm in self.arms):
            require_peft()
        if self.protocol.bos and self.host.config.get_text_config(decoder=True).bos_token_id is None:
            raise ValueError("--bos: the host's config has no bos_token_id")
        for arm in self.arms:
            if arm.method == "long-context":
                self._check_context(arm.settings["context"])
            if arm.method != "locas":
                continue
            if arm.settings["init"] == "activation" and arm.settings["rank"] > self.protocol.stride:
                raise ValueError(
                    f"init='activation' takes one token a slot: rank is {arm.settings['rank']}, but the first chunk "
                    f"has {self.protocol.stride} tokens; use a --stride of at least the rank"
                )
            locas.attach(self.host, locas_config(arm)).detach()

    def _check_context(self, context: int) -> None:
        least = self.protocol.stride + 1 if self.protocol.bos else max(2, self.protocol.stride)
        if not least <= context <= self.positions:
            raise ValueError(
                f"--long-context is {context}; expected an integer from {least}, what a chunk takes, to "
                f"{self.positions}, the host's positions"
            )

    @property
    def settings(self) -> dict:
        """Everything that decides the numbers."""
        task = self.task
        return {
            "command": "perplexity", "model": task.model, "model_type": self.host.config.model_type,
            "dtype": str(self.host.dtype).removeprefix("torch."), "seed": task.locas["seed"],
            "window": self.protocol.window, "stride": self.protocol.stride, "bos": self.protocol.bos,
            "max_tokens": task.max_tokens, "books": [book.fingerprint for book in self.books],
            "held_out": [text.fingerprint for text in self.held_out], "ablate": task.ablate,
            "arms": [{"arm": arm.label, "method": arm.method, **arm.settings} for arm in self.arms],
        }

    @cached_property
    def held_out_before(self) -> float | None:
        """The plain host's; so to be asked for while it is plain."""
        return held_out_perplexity(self.host, self.held_out, self.protocol)

    def warm_up(self) -> None:
        """CUDA loads its kernels at their first use, which is not the first method's fault."""
        if self.host.device.type == "cuda":
            window, stride = self.protocol.window, self.protocol.stride
            truncation(self.host, self.books[0].ids[: window + stride], window, stride, progress=False)
