"""The command line: arguments in, one line for what goes wrong. The work is in locas_ext/tasks.

Exit status: 0 done, 1 failed, 2 bad arguments (a path that is not what it should be is one), 130 ended by Ctrl-C.
"""

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from .cli_options import (
    BatchSize, Clip, Device, Dtype, Epochs, HeldOut, HeldOutTokens, Init, LearningRate, MaxNewTokens, MemoryFolder,
    Model, Rank, ResultsFolder, Scale, Seed, Stride, TempLoraAlpha, TempLoraEpochs, TempLoraRank, TempLoraRate, Variant,
    Window, names,
)
from .config import LocasConfig
from .errors import LocasError
from .tasks import Interrupted

_WRONG_PATH = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError)
UsageError = typer.BadParameter.__base__  # typer's or click's, whichever this typer is built on

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Memories for Hugging Face language models that learn while they read.",
)


def _console() -> Console:
    # Soft wrapping: piped into a file or pasted into a report, lines stay whole.
    return Console(highlight=False, soft_wrap=True)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the plot and the memory go.")] = Path("."),
    max_tokens: Annotated[int, typer.Option(min=256, help="Read at most so many tokens of the book.")] = 50_000,
    rank: Rank = 64,
    learning_rate: LearningRate = 5e-3,
    scale: Scale = "0.3",
    epochs: Epochs = 1,
) -> None:
    """Let the shipped small model memorize the shipped novel; print a table, write a plot and the memory."""
    from .tasks.demo import DemoSettings, run_demo

    run_demo(DemoSettings(out, max_tokens, rank, learning_rate, scale, epochs), _console())


@app.command()
def memorize(
    texts: Annotated[list[Path], typer.Argument(metavar="TEXT...", help="UTF-8 text files, read one after another.")],
    model: Model,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the memory goes: a new folder, or see --resume.")],
    window: Window = None,
    stride: Stride = None,
    rank: Rank = 64,
    learning_rate: LearningRate = 4e-3,
    scale: Scale = "paper",
    epochs: Epochs = 1,
    init: Init = "topk",
    variant: Variant = "glu",
    clip: Clip = True,
    optimizer: Annotated[str, typer.Option(help="adamw or sgd.")] = "adamw",
    seed: Seed = 0,
    update: Annotated[
        str, typer.Option(help="backprop; with --variant mlp also write: slots in closed form.")
    ] = "backprop",
    epsilon: Annotated[float, typer.Option(help="Of --update write: the length of the step a slot makes.")] = 1e-2,
    capacity: Annotated[
        int | None,
        typer.Option(help="Of --update write: slots a layer at most; left out: twice the stride or the rank."),
    ] = None,
    compress_to: Annotated[
        int | None,
        typer.Option(help="Of --update write: slots kept when the capacity is reached; left out: half of it."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run that --out holds.")] = False,
    save_every: Annotated[int, typer.Option(help="Save after so many chunks.")] = 50,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Stream texts through a model into a memory."""
    from .tasks.memorize import MemorizeTask, run_memorize

    settings = dict(
        window=window, stride=stride, learning_rate=learning_rate, epochs=epochs, optimizer=optimizer, update=update,
        epsilon=epsilon, capacity=capacity, compress_to=compress_to,
    )
    config = LocasConfig(variant=variant, rank=rank, init=init, scale=scale, clip=clip, seed=seed)
    run_memorize(MemorizeTask(texts, model, out, config, settings, resume, save_every, dtype, device), _console())


@app.command()
def perplexity(
    books: Annotated[list[Path], typer.Argument(metavar="BOOK...", help="UTF-8 text files, each read on its own.")],
    model: Model,
    out: ResultsFolder,
    methods: Annotated[
        str | None,
        typer.Option(parser=names, metavar="NAME,...", help="Of truncation, long-context, temp-lora, locas; left out: "
                     "truncation,locas, or all of the ablation."),
    ] = None,
    ablate: Annotated[
        str | None,
        typer.Option(metavar="PRESET", help="Many settings side by side: init, rank, learning-rate or scale."),
    ] = None,
    window: Window = None,
    stride: Stride = None,
    max_tokens: Annotated[int | None, typer.Option(help="Read at most so many tokens of each book.")] = None,
    rank: Rank = 64,
    learning_rate: LearningRate = 4e-3,
    scale: Scale = "paper",
    epochs: Epochs = 1,
    init: Init = "topk",
    variant: Variant = "glu",
    clip: Clip = True,
    temp_lora_rank: TempLoraRank = 64,
    temp_lora_alpha: TempLoraAlpha = None,
    temp_lora_lr: TempLoraRate = 5e-5,
    temp_lora_epochs: TempLoraEpochs = 2,
    long_context: Annotated[
        int | None,
        typer.Option(metavar="N", help="Tokens that long-context sees at once; left out: the host's positions."),
    ] = None,
    held_out: HeldOut = None,
    held_out_tokens: HeldOutTokens = None,
    seed: Seed = 0,
    bos: Annotated[bool, typer.Option("--bos", help="Put the host's BOS token before every window.")] = False,
    processes: Annotated[int, typer.Option(help="Share the arms and books among so many; for times, use 1.")] = 1,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Read books with several methods side by side, each scored before it learns; perplexity, time, forgetting."""
    from .tasks.perplexity import run_perplexity
    from .tasks.study import PerplexityTask

    locas = dict(
        variant=variant, rank=rank, init=init, scale=scale, clip=clip, learning_rate=learning_rate, epochs=epochs,
        seed=seed,
    )
    temp_lora = dict(
        rank=temp_lora_rank, alpha=temp_lora_alpha, learning_rate=temp_lora_lr, epochs=temp_lora_epochs, seed=seed
    )
    task = PerplexityTask(
        books, model, out, methods, ablate, locas, temp_lora, long_context, window, stride, max_tokens, held_out or [],
        held_out_tokens, bos, processes, dtype, device,
    )
    run_perplexity(task, _console())


@app.command()
def generate(
    prompt: Annotated[str, typer.Option(help="The text to go on from.")],
    model: Model,
    memory: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="A folder that `locas memorize` wrote; without it: the host alone."),
    ] = None,
    max_new_tokens: MaxNewTokens = 100,
    temperature: Annotated[float, typer.Option(help="0: the likeliest token each time.")] = 0.0,
    seed: Seed = 0,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Continue a prompt with a memory attached."""
    from .tasks.generate import run_generate

    run_generate(model, memory, prompt, max_new_tokens, temperature, seed, dtype, device)


@app.command()
def locomo(
    data: Annotated[list[Path], typer.Argument(metavar="DATA...", help="LoCoMo's JSON files, or folders of them.")],
    model: Model,
    out: ResultsFolder,
    methods: Annotated[
        str, typer.Option(parser=names, metavar="NAME,...", help="full-context, no-context, and both with +locas or "
                          "+temp-lora: a memory that has read the dialogue.")
    ] = "full-context,no-context,full-context+locas,no-context+locas",
    window: Window = None,
    stride: Stride = None,
    rank: Rank = 64,
    learning_rate: LearningRate = 4e-3,
    scale: Scale = "paper",
    epochs: Epochs = 1,
    init: Init = "topk",
    variant: Variant = "glu",
    clip: Clip = True,
    temp_lora_rank: TempLoraRank = 64,
    temp_lora_alpha: TempLoraAlpha = None,
    temp_lora_lr: TempLoraRate = 5e-5,
    temp_lora_epochs: TempLoraEpochs = 2,
    seed: Seed = 0,
    max_new_tokens: MaxNewTokens = 32,
    batch_size: BatchSize = 8,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Answer LoCoMo's questions about long dialogues, with the dialogue in the window, in a memory, both or neither."""
    from .tasks.locomo import LocomoTask, run_locomo

    locas = dict(
        variant=variant, rank=rank, init=init, scale=scale, clip=clip, learning_rate=learning_rate, epochs=epochs,
        seed=seed,
    )
    temp_lora = dict(
        rank=temp_lora_rank, alpha=temp_lora_alpha, learning_rate=temp_lora_lr, epochs=temp_lora_epochs, seed=seed
    )
    task = LocomoTask(
        data, model, methods, out, locas, temp_lora, window, stride, max_new_tokens, batch_size, dtype, device
    )
    run_locomo(task, _console())


@app.command()
def merge(
    model: Model,
    memory: MemoryFolder,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the merged checkpoint goes: a new folder.")],
    pad_to_multiple_of: Annotated[int, typer.Option(help="The new FFN width is rounded up to this.")] = 128,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; left out: float32.")] = None,
) -> None:
    """Make a memory a permanent part of its host: a plain, wider checkpoint."""
    from .tasks.merge import run_merge

    run_merge(model, memory, out, pad_to_multiple_of, dtype, _console())


@app.command()
def capability(
    model: Model,
    memory: MemoryFolder,
    held_out: HeldOut = None,
    held_out_tokens: HeldOutTokens = None,
    window: Annotated[int, typer.Option(help="Tokens seen at once; a memory is judged window by window.")] = 128,
    merged: Annotated[
        bool | None,
        typer.Option(help="Whether the merged model is measured, which needs a second copy of the FFNs; "
                     "left out: on texts, not on --tasks."),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            parser=names, metavar="NAME,...", help="lm-eval's tasks too, such as mmlu,arc_easy; needs the extra eval."
        ),
    ] = None,
    few_shot: Annotated[
        int | None, typer.Option(help="Examples before each question; left out: what the task says.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Questions a task; left out: all.")] = None,
    batch_size: BatchSize = 8,
    include_path: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Further task files of lm-eval's kind; their data may be local.")
    ] = None,
    seed: Seed = 0,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where results.json and report.md go; left out: the tables only.")
    ] = None,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """What a memory does to the host's general ability: before, attached, merged, detached.

    Without --held-out, on the text that is shipped.
    """
    from .tasks.capability import DEFAULT_TEXT, CapabilityTask, HarnessTasks, run_capability

    if not tasks and (tasks, few_shot, limit, include_path) != (None, None, None, None):
        raise ValueError(
            "--tasks is empty; expected names of lm-eval's tasks, which --few-shot, --limit and --include-path are for"
        )
    asked = HarnessTasks(tuple(tasks), few_shot, limit, batch_size, include_path) if tasks else None
    task = CapabilityTask(
        model, memory, held_out or [DEFAULT_TEXT], held_out_tokens, window, merged, asked, seed, out, dtype, device
    )
    run_capability(task, _console())


@app.command()
def report(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Output folders of runs of one command.")],
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where the runs' common report goes; left out: DIR's own is made anew."),
    ] = None,
) -> None:
    """Tables and plots of a run, or of several runs in one report."""
    from .tasks.report import run_report

    run_report(folders, out, _console())


@app.command()
def info() -> None:
    """Versions, build, devices and a self-test of the kernels, to paste into a bug report."""
    from .tasks.info import info as print_info

    if not print_info(_console()):
        raise LocasError("the self-test failed: the lines above say where")


def _complain(message: str) -> None:
    Console(stderr=True, highlight=False, soft_wrap=True).print(Text(f"locas: {' '.join(message.split())}"))


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line (None: that of this process) and returns the exit status."""
    try:
        status = app(arguments, prog_name="locas", standalone_mode=False) or 0
    except Interrupted as interrupt:
        _complain(f"interrupted: {interrupt}")
        return 130
    except (KeyboardInterrupt, typer.Abort):
        status = 130
    except UsageError as error:
        if message := error.format_message():  # empty where help was printed instead
            _complain(message)
        return 2
    except OSError as error:
        # What the system says comes without the file's name, what transformers says as a whole sentence.
        _complain(f"{error.filename}: {error.strerror}" if error.filename else str(error))
        return 2 if isinstance(error, _WRONG_PATH) else 1
    except LocasError as error:
        _complain(str(error))
        return 1
    except ValueError as error:
        _complain(str(error))
        return 2
    if status == 130:
        _complain("interrupted: nothing was kept")
    return status


if __name__ == "__main__":
    sys.exit(main())
