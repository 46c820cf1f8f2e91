"""The baseline: a plain language model that forgets whatever scrolled out of its window (docs/method.md, "The online
protocol")."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from locas_ext.learning.chunk import Window
from locas_ext.memory import Chunk, MemorizeReport

from .streaming import stream


@torch.inference_mode()
def truncation(
    model,
    input_ids,
    window: int,
    stride: int,
    progress: bool = True,
    callback: Callable[[Chunk], None] | None = None,
    bos: bool = False,
) -> MemorizeReport:
    """Scores a text with nothing but the window.

    Chunk [s, e) is predicted from the tokens b .. e-2 with b = max(0, e - window): the very windows that
    `Memory.memorize` scores in, so the two reports compare token by token. The model is used as it is.

    Args:
        model: a transformers causal language model in evaluation mode
        input_ids: [n] integers (tensor or list), at least 2
        window: the most tokens the model sees at once, chunk included
        stride: the tokens of a chunk, at most the window
        progress: whether a progress bar is shown
        callback: called with each finished Chunk; what it raises ends the run
        bos: whether the host's BOS token is put before every window

    Returns a MemorizeReport whose chunks all have memory_version 0. Raises ValueError for a window, stride or text
    that does not fit.
    """

    def read_chunk(part: Window, start: int, end: int) -> tuple[float, int]:
        context, inputs, targets = part
        everything = torch.cat([context, inputs])[None]
        logits = model(input_ids=everything, use_cache=False, logits_to_keep=len(targets)).logits
        return F.cross_entropy(logits[0].float(), targets, reduction="sum").item(), 0

    return stream(model, input_ids, window, stride, read_chunk, "truncation", progress, callback, bos)
