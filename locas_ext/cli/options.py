"""Options that several commands have: one name, one type and one help text each."""

from pathlib import Path
from typing import Annotated

import typer

from locas_ext.config import paper_multiple


def _scale(text: str) -> str | float:
    if text == "host" or paper_multiple(text) is not None:
        return text
    try:
        return float(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r}; expected paper, a multiple such as 16x, host or a number") from None


def names(text: str) -> list[str]:
    """What an option that takes NAME,... names."""
    return [name.strip() for name in text.split(",") if name.strip()]


# ---- the host ------------------------------------------------------------------------------------------------
Model = Annotated[str, typer.Option(help="The host: a folder or a hub name.")]
Dtype = Annotated[
    str | None, typer.Option(help="float32, bfloat16 or float16; left out: float32 on CPU, the checkpoint's on CUDA.")
]
Device = Annotated[str | None, typer.Option(help="Such as cpu or cuda:0; left out: CUDA where there is one.")]
MemoryFolder = Annotated[Path, typer.Option(metavar="DIR", help="A folder that `locas memorize` wrote.")]

ResultsFolder = Annotated[
    Path, typer.Option(metavar="DIR", help="Where the results go; the same command goes on with a run that was ended.")
]

# ---- how a text is read --------------------------------------------------------------------------------------
Window = Annotated[int | None, typer.Option(help="Tokens seen at once; left out: 2048, or the host's positions if fewer.")]
Stride = Annotated[int | None, typer.Option(help="Tokens a chunk; left out: a quarter of the window.")]
HeldOut = Annotated[
    list[Path] | None,
    typer.Option(metavar="TEXT", help="A text to measure forgetting on, not read before; may be given several times."),
]
HeldOutTokens = Annotated[int | None, typer.Option(help="Read at most so many tokens of each held-out text.")]

# ---- Locas ---------------------------------------------------------------------------------------------------
Rank = Annotated[int, typer.Option(help="Locas: slots a layer.")]
Scale = Annotated[
    str, typer.Option(parser=_scale, metavar="paper|16x|host|NUMBER", help="Locas: the memory's output scale, tau.")
]
Init = Annotated[str, typer.Option(help="Locas: topk, bottomk, random, gaussian or activation.")]
Variant = Annotated[str, typer.Option(help="Locas: glu for hosts with a gated FFN, mlp for those with a two-layer one.")]
LearningRate = Annotated[float, typer.Option(help="Locas: of the optimizer.")]
Epochs = Annotated[int, typer.Option(help="Locas: learning passes over each chunk.")]
Clip = Annotated[bool, typer.Option("--clip/--no-clip", help="Locas: whether no row grows longer than 1.")]
Seed = Annotated[int, typer.Option(help="Of what is drawn at random.")]

# ---- Temp-LoRA -----------------------------------------------------------------------------------------------
TempLoraRank = Annotated[int, typer.Option(help="Temp-LoRA: of the adapter.")]
TempLoraAlpha = Annotated[float | None, typer.Option(help="Temp-LoRA: scale times rank; left out: the rank.")]
TempLoraRate = Annotated[float, typer.Option("--temp-lora-lr", help="Temp-LoRA: learning rate of AdamW.")]
TempLoraEpochs = Annotated[int, typer.Option(help="Temp-LoRA: learning passes over each chunk.")]

# ---- answers and questions -----------------------------------------------------------------------------------
MaxNewTokens = Annotated[int, typer.Option(help="How much to write at most.")]
BatchSize = Annotated[int, typer.Option(help="Questions answered at once.")]
