"""`locas generate`: its arguments and their help."""

from pathlib import Path
from typing import Annotated

from locas_ext.cli.config_file import ConfigFile
from locas_ext.cli.interrupts import importing
from locas_ext.cli.options import HOST, HostOptions, MaxNewTokens, Model, Seed, option
from locas_ext.cli.values import number, path, text

EXAMPLES = (
    'locas generate --model Qwen/Qwen3-0.6B --memory book-memory --prompt "The silver of the mine"',
    'locas generate --model Qwen/Qwen3-0.6B --prompt "Once" --temperature 0.8 --seed 3',
)


def generate(
    prompt: Annotated[str, option(text("TEXT"), "The text to continue.")],
    model: Model,
    memory: Annotated[
        Path | None, option(path("DIR"), "A folder that `locas memorize` wrote; default: the host alone.", panel=HOST)
    ] = None,
    max_new_tokens: MaxNewTokens = 100,
    temperature: Annotated[float, option(number(low=0), "How freely tokens are drawn; 0: the likeliest each time.")] = 0.0,
    seed: Seed = 0,
    host: HostOptions = HostOptions(),
    config: ConfigFile = None,
) -> None:
    """Continue a prompt, with a memory attached or without."""
    with importing():
        from locas_ext.cli.tasks.generate import GenerateTask, run_generate

    task = GenerateTask(
        model=model,
        memory=memory,
        prompt=prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        dtype=host.dtype,
        device=host.device,
    )
    run_generate(task)
