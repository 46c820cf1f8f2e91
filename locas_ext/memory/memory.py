"""Memory: the public face. Each verb is a module of its own; this one only names them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from locas_ext.learning.initialization import default_rate, initialize
from locas_ext.learning.inputs import TokenIds
from locas_ext.learning.keep import Keep, as_context
from locas_ext.learning.memorize import feed, memorize
from locas_ext.learning.report import MemorizeReport
from locas_ext.learning.run_guards import require_attached
from locas_ext.learning.selectors import Selector
from locas_ext.learning.settings import Settings
from locas_ext.learning.update import Backprop, Write, as_update, refuse_unknown
from locas_ext.learning.write import WriteReport, write
from locas_ext.state.stream import Chunk
from locas_ext.storage import checkpoint, snapshot
from locas_ext.storage.snapshot import Snapshot
from locas_ext.transforms.compress import CompressReport, compress
from locas_ext.transforms.merge import merge

from .studying import StudyingMemory


class Memory(StudyingMemory):
    """A memory attached to a model; `locas.attach` makes one.

    Everything here leaves the host's own weights alone, and a call that fails leaves the memory as it was.
    """

    # ---- using it --------------------------------------------------------------------------------------------
    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside this block the model is the host alone, bit for bit; in this thread or asyncio task, not in others."""
        with self.state.disable():
            yield

    def initialize(self, input_ids: TokenIds) -> None:
        """Sets gate and key rows from one forward over `input_ids` and the values to 0 (docs/method.md).

        Args:
            input_ids: [n] or [1, n] integers, no more than the host has positions

        `memorize` does this with its first chunk if it has not been done. What was learned before is lost: the version
        is 0 afterwards. Raises ValueError or TypeError for ids that do not fit, LocasError where the host's activations
        are not finite; the memory then is as it was. Source: docs/method.md, "Initialization".
        """
        self._require_attached("initialize")
        initialize(self._attachment, input_ids)

    def memorize(
        self,
        input_ids: TokenIds,
        window: int | None = None,
        stride: int | None = None,
        learning_rate: float | None = None,
        epochs: int | None = None,
        optimizer: str | None = None,
        update: str | Backprop | Write = "backprop",
        context_gradient: bool = False,
        context: str | Keep = "recompute",
        progress: bool = True,
        callback: Callable[[Chunk], None] | None = None,
        resume: str | Path | None = None,
        bos: bool = False,
        title: str | None = None,
        on_divergence: str = "warn",
        **unknown: object,
    ) -> MemorizeReport:
        """Streams a text through the model and learns it: each chunk is scored first and learned from after.

        Args:
            input_ids: [n] or [1, n] integers (tensor or list), at least 2
            window: int: W, the most tokens the model sees at once, chunk included; None: min(2048, the host's positions)
            stride: int: S, the tokens of a chunk, at most W; None: W // 4
            learning_rate, epochs, optimizer: short for those of `update=locas.Backprop(...)`; refused beside any other
                update
            update: how a chunk is learned: "backprop" or `locas.Backprop(...)`; with Locas-MLP also "write" or
                `locas.Write(...)`: slots in closed form
            context_gradient: bool: whether the gradient also runs through the context before the chunk; slower
            context: "recompute": each window is read anew with the memory as it is; "keep" or `locas.Keep(...)`: over the keys
                and values that earlier chunks left, which is faster; rotary hosts only
            progress: bool: whether a progress bar is shown
            callback: called with each finished Chunk; what it raises ends the run with the memory of the last update
            resume: a folder that save_pretrained(optimizer=True) wrote in a run over the same text with the same
                settings: goes on behind the tokens already seen, bit for bit as if never interrupted
            bos: bool: whether the host's BOS token is put before every window
            title: str: a name for the text in `texts`
            on_divergence: what happens where the memory makes the text harder than the host alone does, which scores a
                few of the chunks too: "warn" warns early and goes on, "stop" ends the run there, "ignore" never looks.
                A run that stops or ends like that puts the best state back, with its place in the text; `report.diverged`
                says so

        Returns a MemorizeReport. Raises ValueError, TypeError or LocasError for arguments that do not fit, and
        LocasError at a loss or gradient that is not finite (the memory then is that of the last finished update).
        Ctrl-C takes effect between chunks. The model's mode, its gradients' settings and its config are as before.
        Source: docs/method.md, "The online protocol" (the paper's section on PG-19).

        >>> import locas_ext as locas
        >>> from locas_ext.hosts.tiny import tiny_host
        >>> memory = locas.attach(tiny_host(), locas.LocasConfig(rank=4))
        >>> report = memory.memorize(list(range(3, 51)), window=16, stride=8, progress=False, title="a scale")
        >>> report.tokens, memory.version, memory.texts[0].title
        (47, 6, 'a scale')
        """
        self._require_attached("memorize")
        self._require_enabled("memorize", "nothing can be learned")
        refuse_unknown(unknown)
        if learning_rate is None and update == "backprop" and optimizer in (None, "adamw"):
            learning_rate = default_rate(self.config)
        chosen = as_update(update, {"learning_rate": learning_rate, "epochs": epochs, "optimizer": optimizer})
        settings = Settings(window, stride, chosen, context_gradient, bos, as_context(context))
        return memorize(self._attachment, input_ids, settings, progress, callback, resume, title, on_divergence)

    def feed(
        self,
        input_ids: TokenIds,
        progress: bool = True,
        callback: Callable[[Chunk], None] | None = None,
        on_divergence: str = "warn",
    ) -> MemorizeReport:
        """Goes on where the last run ended, with what comes next in its text: same settings, position and optimizer.

        `memorize(a)` and `feed(b)` equal `memorize(a + b)` bit for bit when a's length is a multiple of the stride. The
        run may also be one of a loaded memory (saved with optimizer=True), of a snapshot or of the memory this is a fork of.

        Args:
            input_ids: [n] or [1, n] integers (tensor or list), at least 1: without the text before, whose end is kept
            progress: bool: whether a progress bar is shown
            callback, on_divergence: as in `memorize`

        Returns a MemorizeReport of the whole text so far. Raises ValueError if there is no run to go on with, and what
        `memorize` raises.

        >>> import locas_ext as locas
        >>> from locas_ext.hosts.tiny import tiny_host
        >>> memory = locas.attach(tiny_host(), locas.LocasConfig(rank=4))
        >>> _ = memory.memorize(list(range(3, 35)), window=16, stride=8, progress=False)
        >>> memory.feed(list(range(35, 51)), progress=False).tokens
        47
        """
        self._require_attached("feed")
        self._require_enabled("feed", "nothing can be learned")
        return feed(self._attachment, input_ids, progress, callback, on_divergence)

    def write(
        self,
        input_ids: TokenIds,
        epsilon: float = 1e-2,
        tokens: Selector | Sequence[int] | Tensor = "all",
        exact: bool = False,
        capacity: int | None = None,
        when_full: str | None = None,
        compress_to: int | None = None,
    ) -> WriteReport:
        """Writes one slot per token into every layer of a Locas-MLP memory, from one forward and one backward.

        A token's slot fires on what the FFN took in where the token was predicted, and adds a step along the gradient of
        the token's log-likelihood, so that the token becomes likelier there. Nothing is trained.

        Args:
            input_ids: [n] or [1, n] integers, 2 to as many as the host has positions
            epsilon: float > 0: the length of the step over all layers together, before tau
            tokens: which tokens get a slot: "all" but the first, which is never predicted; `locas.TopLoss(n)`;
                `locas.LossAbove(nats)`; or positions in input_ids, a sequence of integers from 1 to n - 1
            exact: bool: whether each token's gradient is of its own log-likelihood alone, at the cost of a backward per
                token; otherwise one backward of their sum, which holds a position's effect on later tokens too
            capacity: int: the most slots per layer that the memory may come to hold; None: no limit, room is doubled as
                needed
            when_full: what is done at the capacity: "error", "drop_oldest" or "compress"; None: "compress" if
                compress_to is given, else "error"
            compress_to: int: to how many slots; None: half the capacity, or the hidden size if that is less

        Returns a WriteReport; the version is one more, two if the memory was compressed. Raises ValueError or TypeError for
        arguments that do not fit (a memory without room for the tokens is one), and LocasError where a gradient is not
        finite; nothing is written then. Ctrl-C takes effect once the tokens are written. Source: docs/method.md, "Writing"
        (the paper's Locas-MLP).

        >>> import locas_ext as locas
        >>> from locas_ext.hosts.tiny import tiny_host
        >>> memory = locas.attach(tiny_host(gated=False), locas.LocasConfig("mlp", rank=4))
        >>> memory.write([5, 9, 13, 17], tokens=locas.TopLoss(2)).slots_used
        2
        """
        self._require_attached("write")
        if not self.state.grows:
            raise ValueError("write: the variant is 'glu'; only a Locas-MLP memory (variant='mlp') can be written")
        self._require_enabled("write", "nothing can be written")
        request = Write(epsilon=epsilon, capacity=capacity, when_full=when_full, compress_to=compress_to)
        return write(self._attachment, input_ids, tokens, exact, request)

    def compress(self, rank: int, threshold: float = 0.0) -> CompressReport:
        """Replaces the slots of each layer of a Locas-MLP memory by at most `rank` that agree with them (NL-SVD).

        Args:
            rank: int from 1 to the slots used, and no more than the hidden size
            threshold: float >= 0: probes whose weighted norm is under this are left out too

        Along each probe the memory's output stays what it was. Computed in float64 whatever the host's dtype. The
        capacity becomes the slots kept, optimizer states start anew, the version is one more. Returns a CompressReport.
        Raises ValueError or TypeError for arguments that do not fit; the memory then is as it was. Source: docs/method.md,
        "NL-SVD" (the paper's appendix).
        """
        self._require_attached("compress")
        attachment = self._attachment
        with attachment.exclusive("compress"):
            return compress(attachment.state, attachment.ffns[0].activation, rank, threshold)

    def reset(self) -> None:
        """Forgets everything: slots and optimizer states are zero, the version is 0, the list of texts is empty."""
        with self._attachment.exclusive("reset"):
            self.state.reset()
            self._attachment.stream, self._attachment.texts = None, []

    # ---- keeping it ------------------------------------------------------------------------------------------
    def save_pretrained(self, path: str | Path, optimizer: bool = False) -> None:
        """Writes locas_config.json and locas_memory.safetensors into the folder `path`, atomically.

        Args:
            path: a folder; made if it is not there
            optimizer: bool: whether the optimizer's states and the place in the text go along, as `memorize(resume=...)`
                and `feed` need

        Raises OSError if the folder cannot be written or holds something else; what was there before survives.
        """
        checkpoint.save(self._attachment, path, optimizer)

    def load(self, path: str | Path) -> None:
        """Swaps in the memory saved in `path`; the model stays attached, and compiled if its scale is the same.

        Raises FileNotFoundError, or LocasError if the files are damaged, of another host, or of other slots than
        these; the memory in use then stays.
        """
        saved = checkpoint.read(path)
        with self._attachment.exclusive("load"):
            saved.put_into(self._attachment)

    def snapshot(self) -> Snapshot:
        """A copy of the whole state (slots, optimizer, place in the text), on the memory's device."""
        attachment = self._attachment
        return snapshot.take(self.state, attachment.host, attachment.stream, attachment.texts)

    def restore(self, snapshot_: Snapshot) -> None:
        """Puts a snapshot back, bit for bit. ValueError if it is of another host or of other slots."""
        attachment = self._attachment
        with attachment.exclusive("restore"):
            attachment.stream, attachment.texts = snapshot.restore(self.state, attachment.host, snapshot_)

    def fork(self) -> "Memory":
        """A second, independent memory that starts as this one, on a model of its own (`.model`).

        The two models share the host's weights, so a fork costs the memory's size only.
        """
        self._require_attached("fork")
        model: Any = snapshot.copy_sharing_weights(self.model)
        return model._locas_memory

    # ---- ending it -------------------------------------------------------------------------------------------
    def detach(self) -> None:
        """Gives the host back exactly as it was. The slots stay readable here. A second call does nothing."""
        if self._attachment.attached:
            self._attachment.detach()
            del self.model._locas_memory

    def merge_and_unload(self, pad_to_multiple_of: int = 256) -> PreTrainedModel:
        """Makes the memory part of the host's own FFNs, which become wider, and detaches.

        pad_to_multiple_of: the new width is rounded up to a multiple of this.

        Returns the same model: a plain transformers model that save_pretrained writes and from_pretrained reads
        without locas_ext. All or nothing; `locas.unmerge(model)` undoes it. Raises ValueError where the host's
        projections cannot be widened, naming the layer.
        """
        self._require_attached("merge_and_unload")
        with self._attachment.exclusive("merge_and_unload"):
            with self._attachment.freeze.following():
                model = merge(self._attachment.host, self.state, pad_to_multiple_of)
            self.detach()
        return model

    def _require_attached(self, verb: str) -> None:
        require_attached(self._attachment, verb)

    def _require_enabled(self, verb: str, consequence: str) -> None:
        if self.state.disabled:
            raise ValueError(f"{verb}: the memory is disabled here, so {consequence}; leave the disabled() block")
