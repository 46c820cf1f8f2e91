"""Online memorization: score a chunk, learn from it, continue (docs/method.md, "The online protocol")."""

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from locas_ext.caller import caller_stacklevel
from locas_ext.checks import boolean, one_of
from locas_ext.errors import LocasError
from locas_ext.hosts.text_config import bos_token_id
from locas_ext.ops.ranks import Ranks, together
from locas_ext.patching.attachment import Attachment
from locas_ext.state.stream import Chunk, Stream

from .chunk_loop import Passage
from .divergence_watch import ON_DIVERGENCE
from .initialization import check_rate
from .inputs import TokenIds, require_same, token_ids
from .peers import Peers, facts_of, ranks_in_step
from .read_text import ReadText, tail_length
from .report import MemorizeReport
from .resume import SavedRun, check_same_run, saved_run, settings_of
from .run import Run
from .settings import ResolvedSettings, ResolvedWrite, Settings
from .step import reader_for
from .text_digest import BLOCK, TextDigest
from .update import Backprop

Callback = Callable[[Chunk], None] | None

_MANY_SLOTS = 512


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


def _warn_of_many_slots(attachment: Attachment, settings: ResolvedSettings) -> None:
    """Shampoo takes the root of an r x r matrix of each layer in every update."""
    state = attachment.state
    slots = state.shape[2] * state.processes
    if isinstance(settings.update, Backprop) and settings.update.optimizer == "shampoo" and slots > _MANY_SLOTS:
        warnings.warn(
            f"optimizer is 'shampoo', which takes about 60 r^3 operations per layer and update: {60.0 * slots**3:.1g} with the "
            f"memory's {slots:,} slots; optimizer='adamw' takes none of them",
            stacklevel=caller_stacklevel(),
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
    with attachment.exclusive("memorize"):
        group = settings.update.process_group if isinstance(settings.update, Backprop) else None
        ranks = ranks_in_step(attachment.host, group)
        place = 0 if ranks is None or group is None else ranks.rank
        with together(ranks or attachment.host.ranks):
            begun = _begun(attachment, input_ids, settings, resume, place, title, on_divergence)
        resolved, text, saved = begun
        about = {} if saved is None else {"the file to resume from": saved.memory.fields["memory_sha256"]}
        require_same(attachment.host.ranks, text.passage.ids, (resolved, about))
        peers = _peers(attachment, ranks, resolved, text, about)
        reader = reader_for(attachment.host, resolved, text.passage.end)
        if saved is not None:
            reader.resume(saved.stream)
            saved.memory.put_into(attachment)
        return Run(attachment, resolved, reader, text, on_divergence, peers).go("memorize", progress, callback)


def _begun(
    attachment: Attachment,
    input_ids: TokenIds,
    settings: Settings,
    resume: str | Path | None,
    place: int,
    title: str | None,
    on_divergence: str,
) -> tuple[ResolvedSettings, ReadText, SavedRun | None]:
    """Everything that a run begins with, checked. place: of this process's text among those that are learned at once"""
    host = attachment.host
    saved = None if resume is None else saved_run(resume, place)
    resolved = settings.resolve(host, attachment.state, None if saved is None else saved.settings)
    ids = token_ids(input_ids, host.vocab_size, at_least=2)
    bos = bos_token_id(host.model) if resolved.protocol.bos else None
    if saved is None:
        _check_first_chunk(attachment, resolved, ids)
    _warn_of_many_slots(attachment, resolved)
    if on_divergence != "ignore":
        check_rate(attachment.config, resolved.update)
    if saved is None:
        return resolved, ReadText(Passage(ids, resolved.protocol, bos), TextDigest(), [], title), None
    digest, stream = check_same_run(attachment, ids, resolved, saved), saved.stream
    passage = Passage(ids, resolved.protocol, bos, begin=stream.position)
    return resolved, ReadText(passage, digest, list(stream.chunks), title), saved


def _peers(
    attachment: Attachment, ranks: Ranks | None, settings: ResolvedSettings, text: ReadText, about: dict[str, Any]
) -> Peers | None:
    """Those who learn in step with this process, which have to have been given the same; None: nobody.

    about: what else has to be the same, by the names of messages
    """
    attachment.ranks = ranks
    if ranks is None:
        return None
    config, record = attachment.config.to_dict(), settings.as_settings().to_record()
    facts = {f"config.{name}": value for name, value in config.items()} | record
    facts |= facts_of(attachment.host, attachment.state) | about
    peers = Peers.meet(ranks, attachment.host, facts, text, settings.texts > 1, settings.epochs)
    return peers if isinstance(settings.update, Backprop) else None  # a write is computed alike everywhere


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
    resolved, ranks = _fed_settings(attachment, stream)
    with together(ranks or host.ranks):
        reach = min(stream.position, tail_length(resolved.protocol))
        if len(stream.tail) < reach:
            raise LocasError(f"feed: the run's record holds its last {len(stream.tail)} tokens; expected {reach}")
        tail = token_ids(stream.tail, host.vocab_size, at_least=1)
        with torch.inference_mode(False):  # what is made there cannot be a target of a backward
            ids = torch.cat([tail, token_ids(input_ids, host.vocab_size, at_least=1)])
    require_same(host.ranks, ids, resolved)
    bos = bos_token_id(host.model) if resolved.protocol.bos else None
    passage = Passage(ids, resolved.protocol, bos, begin=stream.position, offset=stream.position - len(tail))
    digest = TextDigest(stream.text_digest, stream.tail[len(tail) - stream.position % BLOCK :])
    text = ReadText(passage, digest, list(stream.chunks), None)
    peers = _peers(attachment, ranks, resolved, text, {})
    reader = reader_for(host, resolved, passage.end)
    reader.resume(stream)
    return Run(attachment, resolved, reader, text, on_divergence, peers)


def _fed_settings(attachment: Attachment, stream: Stream) -> tuple[ResolvedSettings, Ranks | None]:
    """The settings of the run that is continued, and the processes that continue it together."""
    settings, ranks = settings_of(stream, "feed"), attachment.ranks
    if settings.texts == 1:
        return settings.resolve(attachment.host, attachment.state), ranks_in_step(attachment.host, None)
    if ranks is None or ranks.size != settings.texts:
        raise ValueError(
            f"feed: the run learned {settings.texts} texts at once, in other processes; continue with memorize(the whole text "
            "of this rank, update=locas.Backprop(process_group=...), resume=folder)"
        )
    settings = replace(settings, update=replace(settings.update, process_group=ranks.group))
    return settings.resolve(attachment.host, attachment.state), ranks
