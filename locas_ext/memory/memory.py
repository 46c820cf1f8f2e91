"""Memory: the public face. What it says of itself is in facts.py, how it learns in learning_verbs.py and studying.py."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from locas_ext import checks
from locas_ext.hosts.sharding import companions, fsdp_obstacle
from locas_ext.signals import uninterrupted
from locas_ext.storage import checkpoint
from locas_ext.storage import snapshot as snapshots
from locas_ext.storage.snapshot import Snapshot
from locas_ext.transforms.merge import merge

from .studying import MemoryStudy


class Memory(MemoryStudy):
    """A memory attached to a model; `locas.attach` makes one.

    It learns with `memorize`, `feed`, `write` and `study`, is kept with `save_pretrained`, `load`, `snapshot`, `restore` and
    `fork`, and ends with `detach` or `merge_and_unload`. The host's own weights never change, but for those that
    `merge_and_unload` widens.

    One thread at a time changes a memory. While one does, forwards of the model and verbs of the memory in other threads
    raise RuntimeError; inside `disabled()` they can still read the host alone. Any number of threads may read at once.

    >>> import locas_ext as locas
    >>> from locas_ext.hosts.tiny import tiny_host
    >>> memory = locas.attach(tiny_host(), locas.LocasConfig(rank=4, layers=[-1], scale=0.5))
    >>> memory
    Memory(glu, 1 layers x 4 slots x 16, version 0, on Qwen2ForCausalLM)
    >>> list(memory.slots.shape), memory.layers, memory.scale.tolist(), memory.num_parameters
    ([1, 3, 4, 16], (1,), [0.5], 192)
    """

    # ---- using it --------------------------------------------------------------------------------------------
    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside this block the model is the host alone, bit for bit; in this thread or asyncio task, not in others.

        Yields:
            None.

        >>> import locas_ext as locas, torch
        >>> from locas_ext.hosts.tiny import tiny_host
        >>> model, ids = tiny_host(), torch.arange(3, 35)[None]
        >>> before = model(ids).logits
        >>> memory = locas.attach(model, locas.LocasConfig(rank=4))
        >>> _ = memory.memorize(ids, window=16, stride=8, progress=False)
        >>> with memory.disabled():
        ...     bool((model(ids).logits == before).all())
        True
        """
        with self.state.disable():
            yield

    # ---- keeping it ------------------------------------------------------------------------------------------
    def save_pretrained(self, path: str | Path, optimizer: bool = False) -> None:
        """Writes locas_config.json and locas_memory.safetensors into the folder `path`, atomically.

        On a host that is split among processes, all must call this; the first one writes the files.

        Args:
            path: str or Path: a folder; made if it is not there
            optimizer: bool: whether the optimizer's states and the place in the text are saved too, as
                `memorize(resume=...)` and `feed` need

        Raises:
            OSError: the folder cannot be written or holds something else
            LocasError: the memory holds numbers that `load` would refuse, such as NaN
            RuntimeError: another thread is changing the memory

            What the folder held before is still there then.

        >>> import os, tempfile
        >>> import locas_ext as locas
        >>> from locas_ext.hosts.tiny import tiny_host
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     locas.attach(tiny_host(), locas.LocasConfig(rank=4)).save_pretrained(folder)
        ...     sorted(os.listdir(folder))
        ['locas_config.json', 'locas_memory.safetensors']
        """
        checkpoint.save(self._attachment, checks.path("path", path), checks.boolean("optimizer", optimizer))

    def load(self, path: str | Path) -> None:
        """Replaces the memory with the one saved in `path`; a compiled model stays compiled if the scale is the same.

        Args:
            path: str or Path: a folder that `save_pretrained` wrote

        Raises:
            FileNotFoundError, OSError: the folder or its files cannot be read
            LocasError: the files are damaged, of another host, or have slots that differ from these in layers, variant
                or rank; the memory is unchanged
            RuntimeError: another thread is changing the memory

        >>> import tempfile
        >>> import locas_ext as locas
        >>> from locas_ext.hosts.tiny import tiny_host
        >>> memory = locas.attach(tiny_host(), locas.LocasConfig(rank=4))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     memory.save_pretrained(folder)
        ...     _ = memory.memorize(list(range(3, 35)), window=16, stride=8, progress=False)
        ...     memory.load(folder)
        >>> memory.version
        0
        """
        saved = checkpoint.read(checks.path("path", path), companions(self.model))
        with uninterrupted(), self._attachment.exclusive("load"):
            saved.put_into(self._attachment)

    def snapshot(self) -> Snapshot:
        """A copy of the whole state (slots, optimizer states, place in the text), on the memory's device.

        Returns:
            A Snapshot, for `restore`.

        Raises:
            RuntimeError: another thread is changing the memory

        >>> import locas_ext as locas
        >>> from locas_ext.hosts.tiny import tiny_host
        >>> memory = locas.attach(tiny_host(), locas.LocasConfig(rank=4))
        >>> before = memory.snapshot()
        >>> _ = memory.memorize(list(range(3, 35)), window=16, stride=8, progress=False)
        >>> memory.restore(before)
        >>> memory.version, bool(memory.slots.any())
        (0, False)
        """
        attachment = self._attachment
        with self.state.exclusion.read("snapshot"):
            return snapshots.take(self.state, attachment.host, attachment.stream, attachment.texts)

    def restore(self, snapshot: Snapshot) -> None:
        """Puts a snapshot back, bit for bit.

        Args:
            snapshot: what `snapshot` returned, of this memory or of another one of the same host, layers and rank

        Raises:
            TypeError: it is not a Snapshot
            ValueError: it is of another host or of other slots; the memory is unchanged
            RuntimeError: another thread is changing the memory

        >>> import locas_ext as locas
        >>> from locas_ext.hosts.tiny import tiny_host
        >>> memory = locas.attach(tiny_host(), locas.LocasConfig(rank=4))
        >>> _ = memory.memorize(list(range(3, 35)), window=16, stride=8, progress=False)
        >>> learned = memory.snapshot()
        >>> memory.reset()
        >>> memory.restore(learned)
        >>> memory.version
        4
        """
        attachment = self._attachment
        with uninterrupted(), attachment.exclusive("restore"):
            attachment.stream, attachment.texts = snapshots.restore(self.state, attachment.host, snapshot)

    def fork(self) -> "Memory":
        """A second, independent memory that starts as a copy of this one, on a model of its own (`.model`).

        The two models share the host's weights, so a fork takes only as much room as the memory.

        Returns:
            The new Memory.

        Raises:
            ValueError: the memory is detached, or FSDP2 shards the host
            RuntimeError: another thread is changing the memory

        >>> import locas_ext as locas
        >>> from locas_ext.hosts.tiny import tiny_host
        >>> memory = locas.attach(tiny_host(), locas.LocasConfig(rank=4))
        >>> other = memory.fork()
        >>> _ = other.memorize(list(range(3, 35)), window=16, stride=8, progress=False)
        >>> memory.version, other.version, other.model.lm_head.weight is memory.model.lm_head.weight
        (0, 4, True)
        """
        self._require_attached("fork")
        if (problem := fsdp_obstacle(self.model)) is not None:
            raise ValueError(f"fork: {problem}, which it does in one model; use snapshot() and restore()")
        with self.state.exclusion.read("fork"):
            model: Any = snapshots.copy_sharing_weights(self.model)
        return model._locas_memory

    # ---- ending it -------------------------------------------------------------------------------------------
    def detach(self) -> None:
        """Takes the memory off: the host is bit for bit what it was. The slots stay readable here.

        A second call does nothing.

        Raises:
            RuntimeError: another thread is changing the memory

        >>> import locas_ext as locas
        >>> from locas_ext.hosts.tiny import tiny_host
        >>> model = tiny_host()
        >>> locas.attach(model, locas.LocasConfig(rank=4)).detach()
        >>> all(parameter.requires_grad for parameter in model.parameters())
        True
        """
        with uninterrupted(), self._attachment.exclusive("detach"):
            if self._attachment.attached:
                self._attachment.detach()
                del self.model._locas_memory

    def merge_and_unload(self, pad_to_multiple_of: int = 256) -> PreTrainedModel:
        """Makes the memory part of the host's own FFNs, which become wider, and detaches.

        Args:
            pad_to_multiple_of: int >= 1: the new width is rounded up to a multiple of this

        Returns:
            The same model: a plain transformers model that save_pretrained writes and from_pretrained reads without
            locas_ext. `locas.unmerge(model)` undoes it.

        Raises:
            ValueError: the memory is detached or a Locas-MLP one on a gated host, a layer's projections cannot be widened,
                or the host is split among processes; the model stays as it was, with the memory attached
            RuntimeError: another thread is changing the memory

        >>> import locas_ext as locas
        >>> from locas_ext.hosts.tiny import tiny_host
        >>> memory = locas.attach(tiny_host(), locas.LocasConfig(rank=4))
        >>> _ = memory.memorize(list(range(3, 35)), window=16, stride=8, progress=False)
        >>> model = memory.merge_and_unload(pad_to_multiple_of=8)
        >>> model.config.intermediate_size  # 32 + 4, rounded up
        40
        """
        self._require_attached("merge_and_unload")
        self._require_whole("merge_and_unload", "save the memory, and merge it in a model without {how}")
        with uninterrupted() as check_interrupt, self._attachment.exclusive("merge_and_unload"):
            with self._attachment.freeze.following():
                model = merge(self._attachment.host, self.state, pad_to_multiple_of, check_interrupt)
            self.detach()
        return model
