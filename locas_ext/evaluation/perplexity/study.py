"""A study: texts, the arms that read them, and how, from the arguments of `locas perplexity`; loaded and checked."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from locas_ext.checks import one_of
from locas_ext.evaluation.arguments import at_least, check_temp_lora, choose, once
from locas_ext.evaluation.inputs import load_host, weights_digest
from locas_ext.evaluation.methods.arm import CONTROLS, METHODS, OTHER_TEXT, Arm, make_arm, slug
from locas_ext.evaluation.methods.registry import check_arm, held_out_perplexity
from locas_ext.evaluation.methods.truncation import truncation
from locas_ext.evaluation.texts import Text, check_readable, read_text
from locas_ext.hosts.text_config import max_positions
from locas_ext.learning.protocol import Protocol

from .ablations import NEED_HELD_OUT, PRESETS
from .parallel import world_size


@dataclass(frozen=True, kw_only=True)
class PerplexityTask:
    """The arguments of the command.

    methods: None: "truncation" and "locas", beside a kept context "sliding" too; with `ablate`: all of the preset
    locas, temp_lora: the settings of those methods; registry.py, `locas_settings`
    sinks: of "sliding"
    long_context: tokens; None: the host's positions
    held_out_tokens: at most so many of each held-out text; None: all
    control_text: what the memory of OTHER_TEXT learns, at most `max_tokens` of it; None: that method is not asked for
    """

    books: list[Path]
    model: str
    out: Path
    methods: list[str] | None
    ablate: str | None
    locas: dict
    temp_lora: dict
    sinks: int
    long_context: int | None
    window: int | None
    stride: int | None
    max_tokens: int | None
    held_out: list[Path]
    held_out_tokens: int | None
    control_text: Path | None
    bos: bool
    processes: int
    dtype: str | None
    device: str | None


# ---- arguments -----------------------------------------------------------------------------------------------
def _check(task: PerplexityTask) -> None:
    """ValueError or OSError for what can be seen before anything is loaded."""
    if task.methods is not None:
        choose("--methods", task.methods, METHODS)
    if task.ablate is not None:
        one_of("--ablate", task.ablate, tuple(PRESETS))
        if task.ablate in NEED_HELD_OUT and not task.held_out:
            raise ValueError(f"--ablate {task.ablate} compares learning with forgetting: it needs --held-out TEXT")
    if OTHER_TEXT in (task.methods or []) and task.control_text is None:
        raise ValueError(f"--methods names {OTHER_TEXT}, which needs --control-text TEXT")
    if task.control_text is not None and OTHER_TEXT not in (task.methods or []):
        raise ValueError(f"--control-text is given, but --methods does not name {OTHER_TEXT}, which learns it")
    once("--held-out", task.held_out)
    if task.held_out_tokens is not None and not task.held_out:
        raise ValueError(f"--held-out-tokens is {task.held_out_tokens}, but there is no --held-out TEXT")
    check_temp_lora(task.temp_lora)
    at_least(1, processes=task.processes)
    at_least(2, max_tokens=task.max_tokens, held_out_tokens=task.held_out_tokens)
    if task.processes > 1 and world_size() > 1:
        raise ValueError(f"--processes is {task.processes}, but {world_size()} processes were started already")
    names = [slug(book.stem) for book in task.books]
    if twice := [book for book, name in zip(task.books, names, strict=True) if names.count(name) > 1]:
        raise ValueError(f"{twice[0]} and {twice[1]} are two books of one name; records are named after their books")
    processes = max(task.processes, world_size())
    for path in (*task.books, *task.held_out, *([task.control_text] if task.control_text else [])):
        check_readable(path, processes)


def _arms(task: PerplexityTask, context: int) -> list[Arm]:
    base = {
        "truncation": {},
        "sliding": {"sinks": task.sinks},
        "long-context": {"context": context},
        "temp-lora": task.temp_lora,
        **dict.fromkeys(("locas", *CONTROLS), task.locas),
    }
    if task.ablate is None:
        kept = task.locas.get("context") == "keep"
        default = ("truncation", "sliding", "locas") if kept else ("truncation", "locas")
        return [make_arm(base, method) for method in task.methods or default]
    arms = [arm for arm in PRESETS[task.ablate](base) if task.methods is None or arm.method in task.methods]
    if not arms:
        assert task.methods is not None, "a preset has arms unless methods leave them out"
        raise ValueError(f"--ablate {task.ablate} has no arm with the methods {', '.join(task.methods)}")
    return arms


# ---- a study: what is read, by whom, how ---------------------------------------------------------------------
class Study:
    """The host, the texts and the arms of a task.

    Loading it checks everything: raises ValueError, LocasError or OSError for arguments that do not fit.
    """

    def __init__(self, task: PerplexityTask, device: str | None):
        _check(task)
        self.task = task
        self.host, tokenizer = load_host(task.model, task.dtype, device)
        self.protocol = Protocol.of(self.host, task.window, task.stride, task.bos, prefix="--")
        self.arms = _arms(task, max_positions(self.host) if task.long_context is None else task.long_context)
        self.books = [read_text(path, tokenizer, task.max_tokens) for path in task.books]
        if task.control_text is not None:
            other = read_text(task.control_text, tokenizer, task.max_tokens)
            self.arms = [arm.with_other_text(other) if arm.method == OTHER_TEXT else arm for arm in self.arms]
            self._check_long_enough(task.control_text, other)
        for arm in self.arms:
            check_arm(self.host, arm, self.protocol, max(len(book.ids) for book in self.books))
        for path, book in zip(task.books, self.books, strict=True):
            self._check_long_enough(path, book)
        self.held_out = [read_text(path, tokenizer, task.held_out_tokens) for path in task.held_out]

    def _check_long_enough(self, path: Path, text: Text) -> None:
        if len(text.ids) < self.protocol.window:
            raise ValueError(
                f"{path}: {len(text.ids)} tokens to read are fewer than the window, {self.protocol.window}; "
                "choose a longer text, more --max-tokens or a smaller --window"
            )

    @property
    def settings(self) -> dict:
        """Everything that decides the numbers."""
        task = self.task
        return {
            "command": "perplexity",
            "model": task.model,
            "model_type": self.host.config.model_type,
            "weights_sha256": self.weights_digest,
            "dtype": str(self.host.dtype).removeprefix("torch."),
            "seed": task.locas["seed"],
            "window": self.protocol.window,
            "stride": self.protocol.stride,
            "bos": self.protocol.bos,
            "max_tokens": task.max_tokens,
            "books": [book.fingerprint for book in self.books],
            "held_out": [text.fingerprint for text in self.held_out],
            "ablate": task.ablate,
            "arms": [{"arm": arm.label, "method": arm.method, **arm.settings} for arm in self.arms],
        }

    @cached_property
    def weights_digest(self) -> str:
        """The plain host's, as `held_out_before`."""
        return weights_digest(self.host)

    @cached_property
    def held_out_before(self) -> float | None:
        """The plain host's perplexity: ask for it while nothing is attached."""
        return held_out_perplexity(self.host, self.held_out, self.protocol)

    def warm_up(self) -> None:
        """CUDA loads its kernels at their first use, which is not the first method's fault."""
        if self.host.device.type == "cuda":
            window, stride = self.protocol.window, self.protocol.stride
            truncation(self.host, self.books[0].ids[: window + stride], window, stride, progress=False)
