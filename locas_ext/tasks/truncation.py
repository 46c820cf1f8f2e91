"""The baseline: a plain language model that forgets whatever scrolled out of its window (docs/method.md, "The online
protocol")."""

import time
from collections.abc import Callable
from contextlib import nullcontext

import torch
import torch.nn.functional as F

from ..chunk import Window
from ..memory import Chunk, MemorizeReport
from ..progress import StreamProgress


def check_stream(model, input_ids, window: int, stride: int, bos: bool) -> tuple[torch.Tensor, int | None]:
    """-> the ids [n] on the CPU and the BOS token if one is wanted; ValueError for arguments that do not fit."""
    ids = torch.as_tensor(input_ids).cpu()
    if ids.dim() != 1 or len(ids) < 2:
        raise ValueError(f"input_ids has shape {list(ids.shape)}; expected [n] with at least 2 tokens")
    room = window - 1 if bos else window
    if not 1 <= stride <= room or window < 2:
        raise ValueError(
            f"window is {window} and stride is {stride}; expected window >= 2 and 1 <= stride <= {room}"
            f"{', the window without its BOS token' if bos else ''}"
        )
    token = model.config.get_text_config(decoder=True).bos_token_id if bos else None
    if bos and token is None:
        raise ValueError("bos is True, but the host's config has no bos_token_id")
    return ids, token


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
    ids, token = check_stream(model, input_ids, window, stride, bos)
    report = MemorizeReport()
    started = time.perf_counter()
    bar = StreamProgress(len(ids), 0, report, title="truncation") if progress else nullcontext()
    with bar:
        for start in range(0, len(ids), stride):
            end = min(start + stride, len(ids))
            if end == 1:  # the first token of a text is never scored
                continue
            context, inputs, targets = (part.to(model.device) for part in Window.of(ids, start, end, window, token))
            logits = model(
                input_ids=torch.cat([context, inputs])[None], use_cache=False, logits_to_keep=len(targets)
            ).logits
            nll = F.cross_entropy(logits[0].float(), targets, reduction="sum").item()
            report.chunks.append(Chunk(start, end, len(targets), nll, memory_version=0))
            report.seconds = time.perf_counter() - started
            if progress:
                bar.advance(end)
            if callback is not None:
                callback(report.chunks[-1])
    report.seconds = time.perf_counter() - started
    return report
