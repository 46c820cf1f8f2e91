"""Temp-LoRA, the peer: a LoRA adapter that learns each chunk right after it was scored and is thrown away at the end.

As in its public code: LoRA on every linear layer but lm_head, AdamW with betas (0.9, 0.999) and no weight decay, a
constant learning rate after a linear warm-up of 2 updates, 2 epochs a chunk. Taken from `Memory.memorize` instead, so
that the two compare: the windows, the first epoch's loss as the score, the context in a KV cache without gradient
(docs/method.md, "The online protocol"), AdamW's eps of 1e-8. The optimizer lives as long as the adapter.
"""

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from locas_ext.errors import LocasError
from locas_ext.evaluation.arguments import needs_extra
from locas_ext.hosts.context_cache import one_forward, two_forwards
from locas_ext.hosts.window_reading import Way, WindowReading
from locas_ext.learning.chunk import Window
from locas_ext.memory import Chunk, MemorizeReport

from .streaming import stream

WARMUP = 2  # updates


def require_peft() -> None:
    """LocasError, naming the extra to install, if peft is not there."""
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise needs_extra("temp-lora", "peft", error) from None


@contextmanager
def lora(model, rank: int = 64, alpha: float | None = None, seed: int = 0) -> Iterator[list[nn.Parameter]]:
    """A fresh LoRA adapter on every linear layer of a host but lm_head, while the block runs.

    model: a transformers causal language model; calls of it use the adapter inside the block
    alpha: the adapter's output is scaled by alpha / rank; None: rank
    seed: of its random half; the other is zero, so it adds nothing until it has learned something

    Yields its parameters, float32. The host is frozen inside the block and exactly as before after it. Raises
    LocasError if peft is not installed.
    """
    require_peft()
    from peft import LoraConfig, get_peft_model

    required_grad = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    attributes = set(model.__dict__)
    config = LoraConfig(
        r=rank,
        lora_alpha=rank if alpha is None else alpha,  # type: ignore[arg-type]  # peft takes any number
        lora_dropout=0.0,
        bias="none",
        target_modules="all-linear",
    )
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers in an old way
        torch.manual_seed(seed)
        wrapper = get_peft_model(model, config)
    try:
        wrapper.eval()
        yield [parameter for parameter in wrapper.parameters() if parameter.requires_grad]
    finally:
        wrapper.unload()
        for name in set(model.__dict__) - attributes:  # peft_config, which older versions leave behind
            delattr(model, name)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(required_grad[name])


def _loss(model, reading: WindowReading, part: Window, full: int) -> Tensor:
    """Summed negative log-likelihood of a window's targets, with a graph over its inputs, or over all of it where two
    forwards do not give what one gives.

    full: the tokens of a full window
    """
    context, inputs, targets = part

    def read(way: Way) -> Tensor:
        if not way.in_two or not len(context):
            return one_forward(model, context, inputs)
        return two_forwards(model, context, inputs, way.positions)

    logits = read(reading.settle(len(context), targets, full - 1, read).way)
    return F.cross_entropy(logits.float(), targets, reduction="sum")


def temp_lora(
    model,
    parameters: list[nn.Parameter],
    input_ids,
    window: int,
    stride: int,
    learning_rate: float = 5e-5,
    epochs: int = 2,
    progress: bool = True,
    callback: Callable[[Chunk], None] | None = None,
    bos: bool = False,
) -> MemorizeReport:
    """Streams a text through a model inside a `lora` block and trains the adapter on each chunk after scoring it.

    Args:
        model: the host, in evaluation mode
        parameters: what `lora` yielded
        input_ids, window, stride, progress, callback, bos: as in `truncation`, the same windows
        learning_rate: after the warm-up
        epochs: updates a chunk

    Returns a MemorizeReport; memory_version counts the updates before the chunk's score. Raises ValueError for
    arguments that do not fit, LocasError at a loss that is not finite.
    """
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: min(1.0, (update + 1) / WARMUP))
    updates, reading = 0, WindowReading()
    reading.begin_run(model)

    def read_chunk(part: Window, start: int, end: int) -> tuple[float, int]:
        nonlocal updates
        version, losses = updates, []
        for _ in range(epochs):
            loss = _loss(model, reading, part, window)
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                raise LocasError(f"temp-lora: the loss is {losses[-1]} at tokens {start} to {end - 1}")
            (loss / len(part.targets)).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            updates += 1
        return losses[0], version

    return stream(model, input_ids, window, stride, read_chunk, "temp-lora", progress, callback, bos)
