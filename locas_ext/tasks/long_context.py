"""The other baseline: the host's own attention over as many tokens as it can take."""

import time
from collections.abc import Callable
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from transformers import DynamicCache

from ..chunk import Window
from ..memory import Chunk, MemorizeReport
from ..progress import StreamProgress
from .truncation import check_stream


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
    ids, token = check_stream(model, input_ids, context, stride, bos)
    room = context if token is None else context - 1
    cache = DynamicCache(config=model.config)
    report = MemorizeReport()
    started = time.perf_counter()
    bar = StreamProgress(len(ids), 0, report, title="long context") if progress else nullcontext()
    with bar:
        for start in range(0, len(ids), stride):
            end = min(start + stride, len(ids))
            if end == 1:  # the first token of a text is never scored
                continue
            before, inputs, targets = Window.of(ids, start, end, context, token)
            if end > room:
                cache = None
            unread = before if cache is None else before[cache.get_seq_length() :]
            logits = model(
                input_ids=torch.cat([unread, inputs])[None].to(model.device), past_key_values=cache,
                use_cache=cache is not None, logits_to_keep=len(targets),
            ).logits
            nll = F.cross_entropy(logits[0].float(), targets.to(model.device), reduction="sum").item()
            report.chunks.append(Chunk(start, end, len(targets), nll, memory_version=0))
            report.seconds = time.perf_counter() - started
            if progress:
                bar.advance(end)
            if callback is not None:
                callback(report.chunks[-1])
    report.seconds = time.perf_counter() - started
    return report
