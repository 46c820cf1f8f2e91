"""`locas perplexity`: its arguments and their help."""

from pathlib import Path
from typing import Annotated, Any

from locas_ext.cli.config_file import ConfigFile
from locas_ext.cli.interrupts import importing
from locas_ext.cli.options import (
    READING,
    Bos,
    ContextGradient,
    ContextOptions,
    HeldOut,
    HeldOutTokens,
    HostOptions,
    LearningOptions,
    MaxTokens,
    MemoryOptions,
    Model,
    Paper,
    ReadingOptions,
    Rehome,
    ResultsFolder,
    TempLoraOptions,
    argument,
    option,
)
from locas_ext.cli.values import integer, names, one_of, path
from locas_ext.evaluation.methods.arm import METHODS
from locas_ext.evaluation.perplexity.ablations import PRESETS
from locas_ext.learning.keep import Keep
from locas_ext.terminal import Terminal

EXAMPLES = (
    "locas perplexity book.txt --model Qwen/Qwen3-0.6B --methods truncation,locas,temp-lora --out results",
    "locas perplexity a.txt b.txt --model Qwen/Qwen3-0.6B --ablate rank --processes 2 --out ranks",
)


def perplexity(
    books: Annotated[list[Path], argument(path("BOOK"), "UTF-8 text files, each read on its own.")],
    model: Model,
    out: ResultsFolder,
    methods: Annotated[
        Any,  # list[str] | None: a list's type would make typer take the option several times
        option(
            names(),
            f"Of {', '.join(METHODS)}; default: truncation,locas, with --context keep also sliding, or all of the ablation.",
        ),
    ] = None,
    ablate: Annotated[
        str | None, option(one_of(tuple(PRESETS)), "Many settings side by side, of the kind that is named.")
    ] = None,
    reading: ReadingOptions = ReadingOptions(),
    context: ContextOptions = ContextOptions(),
    max_tokens: MaxTokens = None,
    memory: MemoryOptions = MemoryOptions(),
    rehome: Rehome = False,
    learning: LearningOptions = LearningOptions(),
    paper: Paper = False,
    context_gradient: ContextGradient = False,
    temp_lora: TempLoraOptions = TempLoraOptions(),
    long_context: Annotated[
        int | None,
        option(integer(2), "Tokens that long-context sees at once; default: the host's positions.", panel=READING),
    ] = None,
    held_out: HeldOut = None,
    held_out_tokens: HeldOutTokens = None,
    control_text: Annotated[
        Path | None,
        option(path("TEXT"), "What locas-other-text learns in place of the book, such as one by its author.", panel=READING),
    ] = None,
    bos: Bos = False,
    processes: Annotated[int, option(integer(1), "Share arms and books among this many; 1 to compare times.")] = 1,
    host: HostOptions = HostOptions(),
    config: ConfigFile = None,
) -> None:
    """Read books with several methods side by side, each scored before it learns; perplexity, time, forgetting."""
    with importing():
        from locas_ext.evaluation.methods.registry import locas_settings
        from locas_ext.evaluation.perplexity.command import run_perplexity
        from locas_ext.evaluation.perplexity.study import PerplexityTask

    kept = context.settings(with_baseline=ablate == "context" or "sliding" in (methods or []))
    task = PerplexityTask(
        books=books,
        model=model,
        out=out,
        methods=methods,
        ablate=ablate,
        locas=locas_settings(memory.config(paper), learning.given(), rehome, context_gradient, kept, paper),
        temp_lora=temp_lora.settings(memory.seed),
        sinks=kept.get("sinks", Keep().sinks),
        long_context=long_context,
        window=reading.window,
        stride=reading.stride,
        max_tokens=max_tokens,
        held_out=held_out or [],
        held_out_tokens=held_out_tokens,
        control_text=control_text,
        bos=bos,
        processes=processes,
        dtype=host.dtype,
        device=host.device,
    )
    run_perplexity(task, Terminal())
