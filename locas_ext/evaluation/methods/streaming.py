"""How the baselines stream a text: the chunks and windows of docs/method.md, "The online protocol"."""

import math
from collections.abc import Callable

from locas_ext.errors import LocasError
from locas_ext.hosts.text_config import bos_token_id
from locas_ext.learning.chunk import Window
from locas_ext.learning.chunk_loop import Passage, progress_bar, read_chunks
from locas_ext.learning.inputs import token_ids
from locas_ext.learning.protocol import Protocol
from locas_ext.memory import Chunk, MemorizeReport


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

    Args:
        read_chunk: called with the window of a chunk, on the model's device, and its [start, end); returns the summed NLL
            of its targets and the version of the memory that scored them
        title: of the progress bar
        input_ids, window, stride, progress, callback, bos: as in `truncation`

    Raises ValueError or TypeError for a window, stride or text that does not fit, LocasError for a loss that is not finite.
    """
    protocol = Protocol.of(model, window, stride, bos)
    ids = token_ids(input_ids, model.config.get_text_config(decoder=True).vocab_size, at_least=2)
    passage, report = Passage(ids, protocol, bos_token_id(model) if bos else None), MemorizeReport()

    def read(part: Window, start: int, end: int) -> tuple[float, int]:
        loss, version = read_chunk(part.to(model.device), start, end)
        if not math.isfinite(loss):
            raise LocasError(f"{title}: the loss is {loss} at tokens {start} to {end - 1}")
        return loss, version

    with progress_bar(progress, passage, report, title) as bar:
        for chunk in read_chunks(passage, read, report, bar):
            if callback is not None:
                callback(chunk)
    return report
