"""Online memorization: score a chunk, learn from it, go on (docs/method.md, "The online protocol").

A chunk's loss (chunk.py) is computed once: it is reported, then learned from by backpropagation (step.py; cuda_graph.py
on CUDA) or written in closed form (write.py).
"""

import hashlib
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import torch

from locas_ext.patching.attachment import Attachment
from locas_ext.state.stream import Chunk, Stream

from .chunk import Window, may_end_early
from .cuda_graph import MemorizeStep
from .fast_norms import fast_norms
from .initialization import score_and_initialize
from .inputs import bos_token, text_digest, token_ids
from .progress import StreamProgress
from .report import MemorizeReport
from .resume import saved_stream, take_up
from .run_guards import interrupt_between_chunks, quiet_host
from .settings import Settings, resolve_settings
from .step import check_loss
from .write import WriteStep


def memorize(
    attachment: Attachment,
    input_ids,
    settings: Settings,
    progress: bool = True,
    callback: Callable[[Chunk], None] | None = None,
    resume: str | Path | None = None,
) -> MemorizeReport:
    """See `Memory.memorize`."""
    host, state, config = attachment.host, attachment.state, attachment.config
    if not attachment.attached:
        raise ValueError("memorize: this memory is no longer attached to its model")
    resumed = None if resume is None else saved_stream(resume)
    settings = resolve_settings(settings, host, state, resumed)
    ids = token_ids(input_ids, host.vocab_size, at_least=2)
    first_chunk = min(settings.stride, len(ids))
    writes = settings.update == "write"
    if not writes and config.init == "activation" and not state.initialized and resume is None and config.rank > first_chunk:
        raise ValueError(
            f"init='activation' takes one token a slot: rank is {config.rank}, but the first chunk has "
            f"{first_chunk} tokens; use a stride of at least the rank"
        )
    if resumed is not None:
        take_up(attachment, ids, settings, resume, resumed)
    stream = resumed or Stream(asdict(settings), 0, text_digest(ids[:0]), [])
    if writes and (settings.write.capacity or 0) > state.capacity:
        state.resize(settings.write.capacity)
    report = MemorizeReport(chunks=list(stream.chunks))
    hasher = hashlib.sha256(ids[: stream.position].numpy().tobytes())
    bos = bos_token(host) if settings.bos else None
    step = (WriteStep if writes else MemorizeStep)(attachment, settings, may_end_early(host.model))
    started = time.perf_counter()

    state.zero_grad()
    bar = StreamProgress(len(ids), stream.position, report) if progress else nullcontext()
    with (
        bar,
        interrupt_between_chunks() as check_interrupt,
        quiet_host(host.model),
        fast_norms(host.model),
        torch.inference_mode(False),
        torch.enable_grad(),
    ):
        for start in range(stream.position, len(ids), settings.stride):
            end = min(start + settings.stride, len(ids))
            place = f"chunk {len(report.chunks)} (tokens {start} to {end - 1})"
            if end == 1:  # a text's first token alone: nothing to score
                hasher.update(ids[:1].numpy().tobytes())
                continue
            version = state.version
            window = Window.of(ids, start, end, settings.window, bos)
            nll = None
            if not (state.initialized or writes):
                nll = score_and_initialize(attachment, window).item()
                check_loss(nll, state, place)
            for _ in range(settings.epochs):
                loss = step(window, place)
                nll = loss if nll is None else nll
            chunk = Chunk(start, end, len(window.targets), nll, version)
            report.chunks.append(chunk)
            hasher.update(ids[start:end].numpy().tobytes())
            attachment.stream = Stream(asdict(settings), end, hasher.hexdigest(), list(report.chunks))
            report.seconds, report.cuda_graph = time.perf_counter() - started, step.report()
            if progress:
                bar.advance(end)
            if callback is not None:
                callback(chunk)
            check_interrupt()
    report.seconds = time.perf_counter() - started
    return report
