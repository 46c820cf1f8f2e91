"""A model gets a memory: a new one, or a saved one."""

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from locas_ext import checks
from locas_ext.caller import caller_stacklevel
from locas_ext.config import LocasConfig
from locas_ext.hosts.registry import inspect_host
from locas_ext.hosts.sharding import companions
from locas_ext.hosts.wrappers import unwrapped
from locas_ext.patching.attachment import Attachment
from locas_ext.signals import uninterrupted
from locas_ext.storage import checkpoint

from .memory import Memory

_attaching: set[int] = set()  # the models that are being given a memory
_attaching_lock = threading.Lock()


def attach(model: nn.Module, config: LocasConfig | None = None, rehome: bool = False) -> Memory:
    """Gives a Hugging Face causal language model a memory.

    The model's outputs stay bitwise the same until something is learned; its weights are frozen until detach().
    Where transformers has split the model among n processes (tp_plan), all of them call this and every verb, and each has
    r / n slots.
    Where FSDP2 shards it (fully_shard, before or after), all do too, and each has all slots.

    Args:
        model: a transformers causal language model
        config: a LocasConfig; None: LocasConfig()
        rehome: bool: whether the host's FFN weights move into buffers with room for the memory, so that one product
            computes both (docs/architecture.md, "Re-homing"); detach() moves them out again

    Returns:
        The Memory.

    Raises:
        TypeError: model is not a language model, or config is not a LocasConfig
        ValueError: no FFN can be found in the model, it already has a memory, a setting does not fit it, its weights
            cannot be rehomed, or it is split among processes whose number does not divide the rank
        IndexError: config.layers names a layer that the model does not have
        RuntimeError: another thread is giving the model a memory

        The model then is as it was.

    Source: arXiv 2602.05085, section 3 (the "sideway" FFN); docs/method.md.

    >>> import locas_ext as locas
    >>> from locas_ext.hosts.tiny import tiny_host
    >>> memory = locas.attach(tiny_host(), locas.LocasConfig(rank=4))
    >>> tuple(memory.slots.shape), memory.version
    ((2, 3, 4, 16), 0)
    """
    if config is not None and not isinstance(config, LocasConfig):
        raise TypeError(f"config is {type(config).__name__}; expected a LocasConfig or None")
    with _alone_with(model):
        attachment = Attachment(model, config or LocasConfig(), checks.boolean("rehome", rehome))
        memory = Memory(attachment)
        host: Any = memory.model
        try:
            with uninterrupted() as check_interrupt:
                attachment.bind(check_interrupt)
                host._locas_memory = memory
        except BaseException:
            memory.detach()  # Ctrl-C may have come when all was in place
            raise
    return memory


@contextmanager
def _alone_with(model: nn.Module) -> Iterator[None]:
    """Only one thread at a time gives a model a memory. RuntimeError in another one."""
    place = id(unwrapped(model))
    with _attaching_lock:
        if place in _attaching:
            raise RuntimeError("model is being given a memory in another thread; wait until that is done")
        _attaching.add(place)
    try:
        yield
    finally:
        _attaching.discard(place)


def load(model: nn.Module, path: str | Path, rehome: bool = False) -> Memory:
    """Attaches a saved memory.

    Args:
        model: the host that the memory was saved with
        path: str or Path: the folder that `Memory.save_pretrained` wrote
        rehome: bool: as in `attach`

    Returns:
        The Memory. A backend that is not available here is replaced by "auto", with a warning.

    Raises:
        FileNotFoundError, OSError: the folder or its files cannot be read
        LocasError: the files are damaged or of another host
        TypeError, ValueError, IndexError: as in `attach`

        The model then is as it was.

    >>> import tempfile
    >>> import locas_ext as locas
    >>> from locas_ext.hosts.tiny import tiny_host
    >>> memory = locas.attach(tiny_host(), locas.LocasConfig(rank=4))
    >>> _ = memory.memorize(list(range(3, 35)), window=16, stride=8, progress=False)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     memory.save_pretrained(folder)
    ...     loaded = locas.load(tiny_host(), folder)
    >>> loaded.version, bool((loaded.slots == memory.slots).all())
    (4, True)
    """
    saved = checkpoint.read(checks.path("path", path), companions(unwrapped(model)))
    saved.check_host(inspect_host(model))
    saved.check_room()
    memory, obstacle = _attach_saved(model, saved.config, rehome)
    try:
        if obstacle is not None:
            warnings.warn(
                f"{path} names a backend that is not available here: {obstacle}; 'auto' is used", stacklevel=caller_stacklevel()
            )
        saved.put_into(memory._attachment)
    except BaseException:
        memory.detach()
        raise
    return memory


def _attach_saved(model: nn.Module, config: LocasConfig, rehome: bool) -> tuple[Memory, str | None]:
    """Attaches with the config of a file, whose backend is a preference; also returns what stood against it, or None."""
    try:
        return attach(model, config, rehome), None
    except ValueError as error:
        if config.backend == "auto":
            raise
        return attach(model, replace(config, backend="auto"), rehome), str(error)


def memory_of(model: nn.Module) -> Memory:
    """The memory attached to a model; a deep copy of a model has a memory of its own.

    Args:
        model: an nn.Module

    Returns:
        The Memory.

    Raises:
        ValueError: the model has none

    >>> import locas_ext as locas
    >>> from locas_ext.hosts.tiny import tiny_host
    >>> model = tiny_host()
    >>> memory = locas.attach(model, locas.LocasConfig(rank=4))
    >>> locas.memory_of(model) is memory
    True
    """
    memory = getattr(model, "_locas_memory", None)
    if memory is None:
        raise ValueError("model has no memory attached; locas.attach(model) gives it one")
    return memory
