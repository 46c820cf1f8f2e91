"""How the baselines stream a text: the chunks and windows of docs/method.md, "The online protocol"."""

import time
from collections.abc import Callable

import torch

from locas_ext.learning.chunk import Window
from locas_ext.learning.progress import NoProgress, StreamProgress
from locas_ext.memory import Chunk, MemorizeReport


def _check(model, input_ids, window: int, stride: int, bos: bool) -> tuple[torch.Tensor, int | None]:
    """-> the ids [n] on the CPU, and the BOS token if one is wanted."""
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


def stream(
    model,
    input_ids,
    window: int,
    stride: int,
    read_chunk: Callable[[Window, int, int], tuple[float, int]],
    title: str,
    progress: bool,
    callback: Callable[[Chunk], None] | None,
    bos: bool,
) -> MemorizeReport:
    """Reads a text chunk by chunk.

    read_chunk: called with the window of a chunk and its [start, end); returns the summed NLL of its targets and the
        version of the memory that scored them
    title: of the progress bar
    input_ids, window, stride, progress, callback, bos: as in `truncation`

    Raises ValueError for a window, stride or text that does not fit.
    """
    ids, token = _check(model, input_ids, window, stride, bos)
    report, started = MemorizeReport(), time.perf_counter()
    with StreamProgress(len(ids), 0, report, title) if progress else NoProgress() as bar:
        for start in range(0, len(ids), stride):
            end = min(start + stride, len(ids))
            if end == 1:  # the first token of a text is never scored
                continue
            part = Window.of(ids, start, end, window, token)
            nll, version = read_chunk(part, start, end)
            report.chunks.append(Chunk(start, end, len(part.targets), nll, version))
            report.seconds = time.perf_counter() - started
            bar.advance(end)
            if callback is not None:
                callback(report.chunks[-1])
    report.seconds = time.perf_counter() - started
    return report
