"""How a memory learns and forgets: the verbs that change the slots. Each one's work is a module of its own."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from locas_ext.hosts.sharding import companions
from locas_ext.learning.initialization import default_learning, initialize
from locas_ext.learning.inputs import TokenIds
from locas_ext.learning.keep import Keep, as_context
from locas_ext.learning.memorize import feed, memorize
from locas_ext.learning.report import MemorizeReport
from locas_ext.learning.run_guards import require_attached
from locas_ext.learning.selectors import Selector
from locas_ext.learning.settings import Settings
from locas_ext.learning.update import Backprop, Write, as_update, refuse_unknown
from locas_ext.learning.write import WriteReport, write
from locas_ext.signals import uninterrupted
from locas_ext.state.stream import Chunk
from locas_ext.transforms.compress import CompressReport, compress

from .facts import MemoryFacts


class MemoryLearning(MemoryFacts):
    """The part of `Memory` that learns."""

    def initialize(self, input_ids: TokenIds) -> None:
        """Sets the gate and key rows from one forward over `input_ids`, and the value rows to 0.

        `memorize` does this with its first chunk if it has not been done. What was learned before is lost: the version
        is 0 afterwards.

        Args:
            input_ids: [n] or [1, n] integers (tensor or list), n from 1 to the host's positions

        Raises:
            ValueError: the memory is detached, or the ids do not fit
            TypeError: input_ids holds something other than integers
            LocasError: the host's activations are not finite; the memory is unchanged
            RuntimeError: another thread is changing the memory

        Source: arXiv 2602.05085, section 3; docs/method.md, "Initialization".

        >>> import locas_ext as locas
        >>> from locas_ext.hosts.tiny import tiny_host
        >>> memory = locas.attach(tiny_host(), locas.LocasConfig(rank=4))
        >>> memory.initialize(list(range(3, 35)))
        >>> gate, key, value = memory.slots[0]
        >>> bool(gate.any()), bool(key.any()), bool(value.any()), memory.version
        (True, True, False, 0)
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

        The model's mode, its `requires_grad` flags and its config are the same afterwards. Ctrl-C ends the run after
        the chunk in progress.

        Args:
            input_ids: [n] or [1, n] integers (tensor or list), n >= 2
            window: int: W, the most tokens the model sees at once, chunk included; None: min(2048, the host's positions)
            stride: int: S, the tokens per chunk, at most W; None: W // 4
            learning_rate, epochs, optimizer: shortcuts for those of `update=locas.Backprop(...)`; refused beside any
                other update
            update: how a chunk is learned: "backprop" or `locas.Backprop(...)`, which also takes the process group of a
                data-parallel run; with Locas-MLP also "write" or `locas.Write(...)`, which add slots in closed form
            context_gradient: bool: whether the gradient also runs through the context before the chunk; slower
            context: "recompute": each window is read anew with the memory as it then is; "keep" or `locas.Keep(...)`: each
                chunk is read over the keys and values that earlier chunks left, which is faster; rotary hosts only
            progress: bool: whether a progress bar is shown
            callback: called with each finished Chunk; an exception it raises ends the run and is passed on. In a data-parallel
                run it is called after each step of all, with the last chunk again where this process's text has ended
            resume: a folder that save_pretrained(optimizer=True) wrote during a run over the same text with the same
                settings and host dtype: the run continues after the tokens already seen, bit for bit as if never interrupted
            bos: bool: whether the host's BOS token is put before every window
            title: str: a name for the text in `texts`
            on_divergence: what happens if the memory makes the text harder than the host alone does, which scores a few
                of the chunks too: "warn" warns early and continues, "stop" ends the run there, "ignore" never looks. A
                run that stops there, or that has not recovered by its end, puts the best state back, with its place in
                the text; `report.diverged` says so

        Returns:
            A MemorizeReport.

        Raises:
            ValueError: the memory is detached or disabled, or an argument does not fit
            TypeError: an argument is of another type
            LocasError: a loss or gradient is not finite, the folder to resume from does not fit, or another process of a
                data-parallel run has ended it
            FileNotFoundError, OSError: that folder cannot be read
            RuntimeError: another thread is changing the memory

            Arguments are checked before anything is learned. What ends a run later leaves the memory of the last
            finished update.

        Source: arXiv 2602.05085, section 3 and its experiment on PG-19; docs/method.md, "The online protocol".

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
        learning: dict[str, Any] = {"learning_rate": learning_rate, "epochs": epochs, "optimizer": optimizer}
        if update == "backprop":
            learning.update(default_learning(self.config, learning))
        chosen = as_update(update, learning)
        settings = Settings(window, stride, chosen, context_gradient, bos, as_context(context))
        return memorize(self._attachment, input_ids, settings, progress, callback, resume, title, on_divergence)

    def feed(
        self,
        input_ids: TokenIds,
        progress: bool = True,
        callback: Callable[[Chunk], None] | None = None,
        on_divergence: str = "warn",
    ) -> MemorizeReport:
        """Continues the last run with more of its text: same settings, position and optimizer.

        `memorize(a)` and `feed(b)` equal `memorize(a + b)` bit for bit when a's length is a multiple of the stride. The
        run may also be one of a loaded memory (saved with optimizer=True), of a snapshot or of the memory this is a fork of.

        Args:
            input_ids: [n] or [1, n] integers (tensor or list), n >= 1: only the new text; the end of the old one is kept
            progress: bool: whether a progress bar is shown
            callback, on_divergence: as in `memorize`

        Returns:
            A MemorizeReport of the whole text so far.

        Raises:
            ValueError: there is no run to continue, the memory is detached or disabled, or an argument does not fit
            TypeError, LocasError, RuntimeError: as in `memorize`

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

        A token's slot fires on the input that the FFN had where the token was predicted, and adds a step along the
        gradient of the token's log-likelihood, so that the token becomes likelier there. Nothing is trained. The version
        is one more afterwards, or two more if the memory was compressed. Ctrl-C takes effect once the tokens are written.

        Args:
            input_ids: [n] or [1, n] integers (tensor or list), n from 2 to the host's positions
            epsilon: float > 0: the length of the step over all layers together, before tau
            tokens: which tokens get a slot: "all" but the first, which is never predicted; `locas.TopLoss(n)`;
                `locas.LossAbove(nats)`; or positions in input_ids, a sequence of integers from 1 to n - 1
            exact: bool: whether each token's gradient is of its own log-likelihood alone, which takes one backward per
                token; otherwise one backward of their sum, which holds a position's effect on later tokens too
            capacity: int: the most slots per layer that the memory may come to hold; None: no limit, room is doubled as
                needed
            when_full: what is done at the capacity: "error", "drop_oldest" or "compress"; None: "compress" if
                compress_to is given, else "error"
            compress_to: int: the slots per layer that a compression keeps; None: half the capacity, or the hidden size
                if that is less

        Returns:
            A WriteReport.

        Raises:
            ValueError: the memory is detached, disabled or a Locas-GLU one, has no room for the tokens, or an argument
                does not fit; the memory is unchanged
            TypeError: an argument is of another type
            LocasError: a gradient is not finite; the memory is unchanged
            RuntimeError: another thread is changing the memory

        Source: arXiv 2602.05085, section 3 (Locas-MLP); docs/method.md, "Writing".

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
        """Replaces the slots of each layer of a Locas-MLP memory with at most `rank` that agree with them (NL-SVD).

        Along each probe the memory's output stays what it was. Computed in float64 whatever the host's dtype. The
        capacity becomes the number of slots kept, optimizer states start anew, and the version is one more.

        Args:
            rank: int from 1 to the slots used, and no more than the hidden size
            threshold: float >= 0: probes whose weighted norm is less than this are left out too

        Returns:
            A CompressReport.

        Raises:
            ValueError: the memory is detached, is a Locas-GLU one or has learned nothing, or an argument does not fit;
                the memory is unchanged
            TypeError: an argument is of another type
            RuntimeError: another thread is changing the memory

        Source: arXiv 2602.05085, appendix (NL-SVD); docs/method.md, "NL-SVD".

        >>> import locas_ext as locas
        >>> from locas_ext.hosts.tiny import tiny_host
        >>> memory = locas.attach(tiny_host(gated=False), locas.LocasConfig("mlp", rank=4))
        >>> memory.write(list(range(3, 35))).slots_used
        31
        >>> memory.compress(8).slots_used
        8
        """
        self._require_attached("compress")
        attachment = self._attachment
        with attachment.exclusive("compress"):
            return compress(attachment.state, attachment.ffns[0].activation, rank, threshold)

    def reset(self) -> None:
        """Forgets everything: slots and optimizer states are zero, the version is 0, the list of texts is empty.

        Raises:
            RuntimeError: another thread is changing the memory

        >>> import locas_ext as locas
        >>> from locas_ext.hosts.tiny import tiny_host
        >>> memory = locas.attach(tiny_host(), locas.LocasConfig(rank=4))
        >>> _ = memory.memorize(list(range(3, 35)), window=16, stride=8, progress=False)
        >>> memory.reset()
        >>> memory.version, bool(memory.slots.any()), memory.texts
        (0, False, ())
        """
        with uninterrupted(), self._attachment.exclusive("reset"):
            self.state.reset()
            self._attachment.stream, self._attachment.texts = None, []

    def _require_attached(self, verb: str) -> None:
        require_attached(self._attachment, verb)

    def _require_whole(self, verb: str, instead: str) -> None:
        if (ranks := companions(self.model)) is not None:
            how = "tp_plan" if self.state.ranks is not None else "fully_shard"
            said = f"the host is split among {ranks.size} processes ({how}), where this cannot be done"
            raise ValueError(f"{verb}: {said}; {instead.format(how=how)}")

    def _require_enabled(self, verb: str, consequence: str) -> None:
        if self.state.disabled:
            raise ValueError(f"{verb}: the memory is disabled here, so {consequence}; leave the disabled() block")
