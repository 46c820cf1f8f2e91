"""What holds while a run learns: the memory attached, the host in evaluation mode, Ctrl-C between chunks only."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from locas_ext.hosts.sharding import fsdp_obstacle
from locas_ext.patching.attachment import Attachment
from locas_ext.signals import noting, uninterrupted


def require_attached(attachment: Attachment, verb: str) -> None:
    """ValueError if the memory was detached."""
    if not attachment.attached:
        raise ValueError(f"{verb}: this memory is no longer attached to its model")


@contextmanager
def quiet_host(model: nn.Module) -> Iterator[Callable[[], None]]:
    """Evaluation mode, dropout off; every module's own mode is restored. Yields a function that sets the mode anew."""
    before = [(module, module.training) for module in model.modules()]

    def quiet() -> None:
        if any(module.training for module, _ in before):
            model.eval()

    try:
        quiet()
        yield quiet
    finally:
        with uninterrupted():
            for module, training in before:
                module.training = training


def surrounded(model: nn.Module) -> str | None:
    """What stands between a model's code and its caller, hooks of accelerate, FSDP2 or a compiled graph; None: nothing."""
    if (why := fsdp_obstacle(model)) is not None:
        return why
    for name, module in model.named_modules():
        if hasattr(module, "_hf_hook") or module._compiled_call_impl is not None:
            return f"{name or 'the model'} has hooks of accelerate or is compiled"
    return None


@contextmanager
def eager_host(model: nn.Module) -> Iterator[None]:
    """Compiled modules of the host run as they are written: a graph neither asks a context nor shows what is inside it."""
    if not any(module._compiled_call_impl is not None for module in model.modules()):
        yield  # the stance is the whole process's: left alone where nothing is compiled
        return
    with torch.compiler.set_stance("force_eager"):
        yield


@contextmanager
def interrupt_between_chunks() -> Iterator[Callable[[], None]]:
    """Yields a function that raises KeyboardInterrupt if Ctrl-C was pressed since.

    Within a chunk Ctrl-C only takes note, so that memory and place in the text never part.

    Where Ctrl-C does not mean KeyboardInterrupt here (another thread, a handler of the caller's), nothing changes. SIGTERM and
    SIGHUP are treated alike where they do.
    """
    with noting(b"\nstopping after this chunk\n") as check:
        yield check
