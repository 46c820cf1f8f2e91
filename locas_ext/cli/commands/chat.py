"""`locas chat`: its arguments and their help."""

from pathlib import Path
from typing import Annotated

from locas_ext.cli.config_file import ConfigFile
from locas_ext.cli.interrupts import importing
from locas_ext.cli.options import HOST, HostOptions, MaxNewTokens, MemoryOptions, Model, option
from locas_ext.cli.study_options import check_new_only
from locas_ext.cli.values import number, path
from locas_ext.terminal import Terminal

EXAMPLES = (
    "locas chat --model HuggingFaceTB/SmolLM2-135M-Instruct --memory notes",
    "locas chat --model Qwen/Qwen3-0.6B",
)


def chat(
    model: Model,
    memory: Annotated[Path | None, option(path("DIR"), "A memory folder; default: a new, empty memory.", panel=HOST)] = None,
    max_new_tokens: MaxNewTokens = 200,
    temperature: Annotated[float, option(number(low=0), "How freely tokens are drawn; 0: the likeliest each time.")] = 0.0,
    options: MemoryOptions = MemoryOptions(),
    host: HostOptions = HostOptions(),
    config: ConfigFile = None,
) -> None:
    """Talk to a model with a memory, in the terminal.

    /off and /on switch the memory, /study FILE learns a text, /save DIR keeps the memory, /new begins anew, /quit ends.
    """
    check_new_only(options, memory)
    with importing():
        from locas_ext.cli.tasks.chat import ChatTask, run_chat

    task = ChatTask(
        model=model,
        memory=memory,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        config=options.config(),
        dtype=host.dtype,
        device=host.device,
    )
    run_chat(task, Terminal())
