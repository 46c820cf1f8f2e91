"""`locas generate`: its arguments and their help."""

from pathlib import Path
from typing import Annotated

import typer

from locas_ext.cli.options import Device, Dtype, MaxNewTokens, Model, Seed


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
    from locas_ext.cli.tasks.generate import run_generate

    run_generate(model, memory, prompt, max_new_tokens, temperature, seed, dtype, device)
