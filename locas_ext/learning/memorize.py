"""Online memorization: score a chunk, learn from it, continue (docs/method.md, "The online protocol")."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from locas_ext.checks import boolean, one_of
from locas_ext.errors import LocasError
from locas_ext.hosts.text_config import bos_token_id
from locas_ext.patching.attachment import Attachment
from locas_ext.state.stream import Chunk

from .chunk_loop import Passage
from .divergence_watch import ON_DIVERGENCE
from .initialization import check_rate
from .inputs import TokenIds, require_same, token_ids
from .report import MemorizeReport
from .resume import check_same_run, saved_run, settings_of
from .run import Run, tail_length
from .settings import ResolvedSettings, ResolvedWrite, Settings
from .step import reader_for
from .text_digest import BLOCK, TextDigest

Callback = Callable[[Chunk], None] | None


def _check(progress: bool, callback: Callback, on_divergence: str) -> None:
    boolean("progress", progress)
    one_of("on_divergence", on_divergence, ON_DIVERGENCE)
    if callback is not None and not callable(callback):
        raise TypeError(f"callback is {callback!r}; expected a function that takes a Chunk, or None")


def _check_first_chunk(attachment: Attachment, settings: ResolvedSettings, ids: Tensor) -> None:
    """ValueError if the first chunk has too few tokens to initialize the memory from."""
    config, first_chunk = attachment.config, min(settings.protocol.stride, len(ids))
    if attachment.state.initialized or isinstance(settings.update, ResolvedWrite):
        return
    if config.init == "activation" and config.rank > first_chunk:
        raise ValueError(
            f"init='activation' takes one token per slot: rank is {config.rank}, but the first chunk has "
            f"{first_chunk} tokens; use a stride of at least the rank"
        )


def memorize(
    attachment: Attachment,
    input_ids: TokenIds,
    settings: Settings,
    progress: bool = True,
    callback: Callback = None,
    resume: str | Path | None = None,
    title: str | None = None,
    on_divergence: str = "warn",
) -> MemorizeReport:
    """See `Memory.memorize`."""
    _check(progress, callback, on_divergence)
    if title is not None and not isinstance(title, str):
        raise TypeError(f"title is {title!r}; expected a string or None")
    host = attachment.host
    with attachment.exclusive("memorize"):
        saved = None if resume is None else saved_run(resume, host.ranks)
        resolved = settings.resolve(host, attachment.state, None if saved is None else saved.settings)
        ids = token_ids(input_ids, host.vocab_size, at_least=2)
        require_same(host.ranks, ids, resolved)
        bos = bos_token_id(host.model) if resolved.protocol.bos else None
        reader = reader_for(host, resolved, len(ids))
        if saved is None:
            _check_first_chunk(attachment, resolved, ids)
        if on_divergence != "ignore":
            check_rate(attachment.config, resolved.update)
        if saved is None:
            passage = Passage(ids, resolved.protocol, bos)
            run = Run(attachment, resolved, reader, passage, TextDigest(), [], title, on_divergence)
        else:
            digest = check_same_run(attachment, ids, resolved, saved)
            reader.take_up(saved.stream)
            saved.memory.put_into(attachment)
            passage = Passage(ids, resolved.protocol, bos, begin=saved.stream.position)
            run = Run(attachment, resolved, reader, passage, digest, saved.stream.chunks, title, on_divergence)
        return run.go("memorize", progress, callback)


def feed(
    attachment: Attachment,
    input_ids: TokenIds,
    progress: bool = True,
    callback: Callback = None,
    on_divergence: str = "warn",
) -> MemorizeReport:
    """See `Memory.feed`."""
    _check(progress, callback, on_divergence)
    with attachment.exclusive("feed"):
        return _fed_run(attachment, input_ids, on_divergence).go("feed", progress, callback)


def _fed_run(attachment: Attachment, input_ids: TokenIds, on_divergence: str) -> Run:
    """The run that continues the last one."""
    host, stream = attachment.host, attachment.stream
    if stream is None:
        raise ValueError("feed: there is no run to continue; begin a text with memorize()")
    if stream.tail is None:
        raise ValueError(
            "feed: the run was saved without the tokens that it ended with, as files of format 1 are; continue with "
            "memorize(the whole text, resume=folder)"
        )
    resolved = settings_of(stream, "feed").resolve(host, attachment.state)
    reach = min(stream.position, tail_length(resolved.protocol))
    if len(stream.tail) < reach:
        raise LocasError(f"feed: the run's record holds its last {len(stream.tail)} tokens; expected {reach}")
    tail = token_ids(stream.tail, host.vocab_size, at_least=1)
    with torch.inference_mode(False):  # what is made there cannot be a target of a backward
        ids = torch.cat([tail, token_ids(input_ids, host.vocab_size, at_least=1)])
    require_same(host.ranks, ids, resolved)
    bos = bos_token_id(host.model) if resolved.protocol.bos else None
    reader = reader_for(host, resolved, stream.position - len(tail) + len(ids))
    reader.take_up(stream)
    passage = Passage(ids, resolved.protocol, bos, begin=stream.position, offset=stream.position - len(tail))
    digest = TextDigest(stream.text_digest, stream.tail[len(tail) - stream.position % BLOCK :])
    return Run(attachment, resolved, reader, passage, digest, stream.chunks, None, on_divergence)
