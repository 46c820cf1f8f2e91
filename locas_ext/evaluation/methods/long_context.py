"""The other baseline: the host's own attention over as many tokens as it can take."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from transformers import DynamicCache

from locas_ext.hosts.cache_names import cache_argument
from locas_ext.learning.chunk import Window
from locas_ext.memory import Chunk, MemorizeReport

from .streaming import stream


@torch.inference_mode()
def long_context(
    model,
    input_ids,
    context: int,
    stride: int,
    progress: bool = True,
    callback: Callable[[Chunk], None] | None = None,
    bos: bool = False,
) -> MemorizeReport:
    """Scores a text with a window of `context` tokens: what `truncation` does with so large a window.

    While the text fits into the window nothing scrolls out of it, so the KV cache of all that was read is exact and
    every token is read once. From then on every chunk moves the window, which changes what its tokens see, and the
    whole window is read again for each chunk.

    Args as in `truncation`, with `context` for its window. Returns a MemorizeReport; raises ValueError as it does, and
    torch.OutOfMemoryError where the device cannot hold so much.
    """
    room = context - 1 if bos else context
    cache = DynamicCache(config=model.config)

    def read_chunk(part: Window, start: int, end: int) -> tuple[float, int]:
        nonlocal cache
        before, inputs, targets = part
        if end > room:
            cache = None
        unread = before if cache is None else before[cache.get_seq_length() :]
        logits = model(
            input_ids=torch.cat([unread, inputs])[None],
            **cache_argument(model, cache),
            use_cache=cache is not None,
            logits_to_keep=len(targets),
        ).logits
        return F.cross_entropy(logits[0].float(), targets, reduction="sum").item(), 0

    return stream(model, input_ids, context, stride, read_chunk, "long context", progress, callback, bos)
