"""The baseline of a kept context: a sliding window over keys and values that are computed once, without a memory."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from locas_ext.hosts.text_config import bos_token_id
from locas_ext.learning.chunk import Window
from locas_ext.learning.keep import Keep
from locas_ext.learning.kept_context import KeptContext, check_positions
from locas_ext.learning.protocol import Protocol
from locas_ext.memory import Chunk, MemorizeReport

from .streaming import stream


def check_keep(model, protocol: Protocol, keep: Keep, tokens: int, context_gradient: bool = False) -> None:
    """ValueError for a window, a text of so many tokens, a host or a gradient that a context cannot be kept for."""
    keep.check_fits(protocol.window, protocol.stride, context_gradient)
    check_positions(model, tokens - 1 + protocol.bos)
    KeptContext(model, model.device, protocol.window, keep.sinks, protocol.stride)


@torch.inference_mode()
def sliding(
    model,
    input_ids,
    window: int,
    stride: int,
    sinks: int = 4,
    progress: bool = True,
    callback: Callable[[Chunk], None] | None = None,
    bos: bool = False,
) -> MemorizeReport:
    """Scores a text over a KV cache whose oldest rows give way, with the text's first inputs as attention sinks.

    Every token is read once: what `Memory.memorize(context=Keep(sinks=sinks))` does with a memory that learns nothing.

    Args:
        sinks: how many of the text's first inputs stay in the window
        model, input_ids, window, stride, progress, callback, bos: as in `truncation`

    Returns a MemorizeReport whose chunks all have memory_version 0. Raises ValueError for a window, stride or text that
    does not fit, and for a host whose context cannot be kept.
    """
    protocol = Protocol.of(model, window, stride, bos)
    check_keep(model, protocol, Keep(sinks=sinks), len(input_ids))
    kept = KeptContext(model, model.device, protocol.window, sinks, protocol.stride)
    if bos and (token := bos_token_id(model)) is not None:
        kept.put_before(token)

    def read_chunk(part: Window, start: int, end: int) -> tuple[float, int]:
        kept.prepare(len(part.inputs))
        logits = kept.read(part.inputs)
        kept.keep(part.inputs, kept.left)
        return F.cross_entropy(logits.float(), part.targets, reduction="sum").item(), 0

    return stream(model, input_ids, window, stride, read_chunk, "sliding", progress, callback, bos)
