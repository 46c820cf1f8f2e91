"""Online memorization: score a chunk, learn from it, go on (docs/method.md, "The online protocol").

A chunk's loss (chunk.py) is computed once: it is reported, then learned from by backpropagation (step.py; cuda_graph.py
on CUDA) or written in closed form (write.py).
"""

import hashlib
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from locas_ext.patching.attachment import Attachment
from locas_ext.state.stream import Chunk, Stream

from .chunk import Window, may_end_early, settle_reading
from .cuda_graph import MemorizeStep
from .fast_norms import fast_norms
from .initialization import score_and_initialize
from .inputs import TokenIds, bos_token, text_digest, token_ids
from .progress import NoProgress, StreamProgress
from .report import MemorizeReport
from .resume import saved_stream, take_up
from .run_guards import interrupt_between_chunks, quiet_host
from .settings import ResolvedSettings, Settings, resolve_settings
from .step import check_loss
from .write import WriteStep


@dataclass
class _Run:
    """A run over a text, and how far it has come."""

    attachment: Attachment
    settings: ResolvedSettings
    ids: Tensor
    stream: Stream  # where it begins: at the start, or where a saved run stood
    step: WriteStep | MemorizeStep
    ends_early: bool
    report: MemorizeReport
    started: float

    def __post_init__(self):
        self.bos = bos_token(self.attachment.host) if self.settings.bos else None
        self.hasher = hashlib.sha256(self.ids[: self.stream.position].numpy().tobytes())


def _prepare(
    attachment: Attachment, input_ids: TokenIds, settings: ResolvedSettings, resume: str | Path | None, resumed: Stream | None
) -> _Run:
    """Checks what depends on the text, takes up the memory of a saved run, and makes room for what is written."""
    state, config, host = attachment.state, attachment.config, attachment.host
    ids = token_ids(input_ids, host.vocab_size, at_least=2)
    first_chunk = min(settings.stride, len(ids))
    writes = settings.write is not None
    if not writes and config.init == "activation" and not state.initialized and resume is None and config.rank > first_chunk:
        raise ValueError(
            f"init='activation' takes one token a slot: rank is {config.rank}, but the first chunk has "
            f"{first_chunk} tokens; use a stride of at least the rank"
        )
    if resume is not None and resumed is not None:
        take_up(attachment, ids, settings, resume, resumed)
    stream = resumed or Stream(asdict(settings), 0, text_digest(ids[:0]), [])
    if settings.write is not None and (capacity := settings.write.capacity or 0) > state.capacity:
        state.resize(capacity)
    report = MemorizeReport(chunks=list(stream.chunks))
    ends_early = may_end_early(host.model)
    step = (WriteStep if writes else MemorizeStep)(attachment, settings, ends_early)
    return _Run(attachment, settings, ids, stream, step, ends_early, report, time.perf_counter())


def _learn_chunk(run: _Run, start: int, end: int) -> Chunk:
    """Scores the chunk [start, end), then learns it, and notes down where the run stands."""
    attachment, settings, report, state = run.attachment, run.settings, run.report, run.attachment.state
    place = f"chunk {len(report.chunks)} (tokens {start} to {end - 1})"
    version = state.version
    window = Window.of(run.ids, start, end, settings.window, run.bos)
    losses = []  # the first one is from before anything was learned of the chunk
    if not state.initialized and settings.write is None:
        losses.append(score_and_initialize(attachment, window).item())
        check_loss(losses[0], state, place)
    if not settings.context_gradient:
        why = settle_reading(attachment.host, window, settings.window, run.ends_early)
        if why is not None and why not in report.one_forward:
            report.one_forward.append(why)
    for _ in range(settings.epochs):
        losses.append(run.step(window, place))
    chunk = Chunk(start, end, len(window.targets), losses[0], version)
    report.chunks.append(chunk)
    run.hasher.update(run.ids[start:end].numpy().tobytes())
    attachment.stream = Stream(asdict(settings), end, run.hasher.hexdigest(), list(report.chunks))
    report.seconds, report.cuda_graph = time.perf_counter() - run.started, run.step.report()
    return chunk


def memorize(
    attachment: Attachment,
    input_ids: TokenIds,
    settings: Settings,
    progress: bool = True,
    callback: Callable[[Chunk], None] | None = None,
    resume: str | Path | None = None,
) -> MemorizeReport:
    """See `Memory.memorize`."""
    if not attachment.attached:
        raise ValueError("memorize: this memory is no longer attached to its model")
    host, state = attachment.host, attachment.state
    resumed = None if resume is None else saved_stream(resume)
    resolved = resolve_settings(settings, host, state, resumed)
    run = _prepare(attachment, input_ids, resolved, resume, resumed)
    length, stride, begin, report = len(run.ids), resolved.stride, run.stream.position, run.report
    state.zero_grad()
    with (
        StreamProgress(length, begin, report) if progress else NoProgress() as bar,
        interrupt_between_chunks() as check_interrupt,
        quiet_host(host.model),
        fast_norms(host.model),
        torch.inference_mode(False),
        torch.enable_grad(),
    ):
        for start in range(begin, length, stride):
            end = min(start + stride, length)
            if end == 1:  # a text's first token alone: nothing to score
                run.hasher.update(run.ids[:1].numpy().tobytes())
                continue
            chunk = _learn_chunk(run, start, end)
            bar.advance(end)
            if callback is not None:
                callback(chunk)
            check_interrupt()
    report.seconds = time.perf_counter() - run.started
    return report
