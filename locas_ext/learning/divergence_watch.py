"""A run watched for divergence: the host alone scores some of its chunks too, and the best state is kept."""

import warnings
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from locas_ext.caller import caller_stacklevel
from locas_ext.errors import DivergenceWarning
from locas_ext.patching.attachment import Attachment
from locas_ext.state.kept_rows import KeptRows
from locas_ext.state.stream import Chunk, Stream, TextRecord

from .backprop import agreed_loss
from .chunk import Window
from .divergence import RECENT, UNJUDGED, Comparison, DivergenceTest
from .kept_reader import KeptReader
from .peers import Peers
from .report import Divergence, MemorizeReport
from .schedule import Step
from .settings import ResolvedSettings
from .step import Reader
from .update import Backprop

ON_DIVERGENCE = ("warn", "stop", "ignore")
WORTH_KEEPING = 16  # chunks of a call: from so many on, the state that it began with is compared and kept


def _on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()}


@dataclass(frozen=True)
class KeptState:
    """A memory's whole state, on the CPU, and its place in the text."""

    tensors: dict[str, Tensor]
    version: int
    used: int
    stream: Stream | None
    texts: list[TextRecord]

    @classmethod
    def of(cls, attachment: Attachment) -> "KeptState":
        state = attachment.state
        stream = attachment.stream  # another one takes its place with every chunk; kept rows stay and change
        if stream is not None and stream.kept is not None:
            rows = _on_cpu(stream.kept.tensors())
            stream = replace(stream, kept=KeptRows.from_record(stream.kept.to_record(), rows))
        return cls(_on_cpu(state.tensors()), state.version, state.used, stream, list(attachment.texts))

    def put_back(self, attachment: Attachment) -> None:
        attachment.state.load(self.tensors, self.version, self.used)
        attachment.stream, attachment.texts = self.stream, list(self.texts)


@dataclass
class _Best:
    """The newest state with which the text was no harder than by the host alone, or else the least harmful one."""

    state: KeptState | None = None
    excess: float = float("inf")

    def take(self, state: KeptState | None, excess: float) -> bool:
        """-> whether the state is the best now"""
        if state is None or not excess <= max(self.excess, 0.0):
            return False
        self.state, self.excess = state, excess
        return True


class DivergenceWatch:
    """Watches one call of memorize() or feed(); with on_divergence="ignore" it does nothing at all."""

    def __init__(
        self,
        attachment: Attachment,
        settings: ResolvedSettings,
        reader: Reader,
        report: MemorizeReport,
        chunks: int,
        on_divergence: str,
        peers: Peers | None = None,
    ):
        """chunks: how many the call is to read, behind those in the report; peers: those who learn in step with this process"""
        self.attachment, self.settings, self.report, self.peers = attachment, settings, report, peers
        self.chunks = report.chunks if peers is None else peers.chunks
        chunks = chunks if peers is None else peers.schedule.steps
        # What is kept was made by the memory; the host alone reads each window anew.
        self.keeps = isinstance(reader, KeptReader)
        self.reader = reader.anew if isinstance(reader, KeptReader) else reader
        self.mode = on_divergence
        self.first, self.last = len(self.chunks), len(self.chunks) + chunks - 1
        self.test = DivergenceTest(settings.protocol.stride)
        self.best = _Best()
        self.candidate: KeptState | None = None
        self.unjudged: KeptState | None = None
        self.anew: float | None = None  # what the memory scores a kept context's chunk when it reads the window anew
        # The latest, what the host alone scored, of how many tokens, and the peers' step, which is over when it is read again.
        self.compared: tuple[Window, float, int, Step | None] | None = None

    @property
    def stops(self) -> bool:
        """Whether the run is to end here."""
        return self.mode == "stop" and self.report.diverged is not None

    # ---- around each chunk -----------------------------------------------------------------------------------
    def before(self, window: Window) -> None:
        """Called before the next chunk is read: what scores a compared chunk is what may be kept."""
        self.candidate = self.anew = None
        if self.mode == "ignore":
            return
        due = self._is_due()
        if self.report.diverged is None and due:
            self.candidate = KeptState.of(self.attachment)
        elif self.report.diverged is None and len(self.chunks) in UNJUDGED:
            self.unjudged = KeptState.of(self.attachment)
        if due and self.keeps and self.test.wants_like_with_like:
            self.anew = self._loss(window)

    def after(self, window: Window, loss: float, tokens: int, learned: bool) -> None:
        """Called when the chunk is scored and learned. Compares it if it is its turn.

        loss: its summed loss, over so many tokens, the peers' with it; learned: whether the memory that scored it had learned
        anything
        """
        number = len(self.chunks)
        if self.mode == "ignore" or not (
            self._is_due() or self.test.surprises(number, loss, tokens, self.chunks[self.first :])
        ):
            return
        host = self._host_loss(window) if learned else loss
        comparison = Comparison(tokens, loss if self.anew is None else self.anew, host)
        if self.best.take(self.candidate, comparison.excess):
            self.unjudged = None
        step = None if self.peers is None else self.peers.step
        self.candidate, self.compared = None, (window, host, tokens, step)
        self.test.add(number, comparison, like_with_like=not self.keeps or self.anew is not None or not learned)

    def tell(self, chunk: Chunk) -> None:
        """Called when the chunk is noted down. Notes a divergence in the report, and warns of one that the run outlives."""
        harm = self.test.harmed_by
        if harm is None or self.report.diverged is not None:
            return
        self.report.diverged = Divergence(chunk, harm.memory / harm.tokens, harm.host / harm.tokens)
        if self.mode == "warn":
            self._warn("the run continues, and if it ends like that, the best state is put back; on_divergence='stop' ends it")

    def finish(self) -> None:
        """Called at the run's end: puts the best state back where the memory does harm."""
        diverged = self.report.diverged
        if diverged is None or not (self.stops or self.test.harms_still()):
            return
        state = self._best_state()
        if state is not None:
            state.put_back(self.attachment)
            self.report.diverged = replace(diverged, restored_version=state.version)
        if self.stops:
            back = "there was no better state to put back"
            if state is not None:
                place = self.attachment.stream.position if self.attachment.stream else 0
                back = f"the state of version {state.version} is put back, which has learned {place:,} tokens"
            self._warn(f"the run ends here; {back}")

    # ---- how -------------------------------------------------------------------------------------------------
    def _is_due(self) -> bool:
        number = len(self.chunks)
        ends = self.test.harmed_by is not None and number > self.last - RECENT
        begins = number == self.first and self.last - self.first + 1 >= WORTH_KEEPING
        return ends or begins or self.test.is_due(number)

    def _best_state(self) -> KeptState | None:
        """The unjudged state where it is newer and reads the chunk compared last no worse than the best one; else the best."""
        unjudged, best = self.unjudged, self.best
        if unjudged is None or self.compared is None:
            return best.state
        now, (window, host, tokens, step) = KeptState.of(self.attachment), self.compared
        unjudged.put_back(self.attachment)
        excess = (self._loss(window, step) - host) / tokens
        now.put_back(self.attachment)
        return unjudged if excess <= max(best.excess, 0.0) else best.state

    @torch.no_grad()
    def _loss(self, window: Window, step: Step | None = None) -> float:
        host = self.attachment.host
        if self.peers is not None:
            return self.peers.total(self.peers.turn(host, self.reader, window, lambda: self.reader.loss(window), step))
        return agreed_loss(self.reader.loss(window), self.attachment.state)

    def _host_loss(self, window: Window) -> float:
        with self.attachment.state.disable():
            return self._loss(window)

    def _warn(self, consequence: str) -> None:
        said = self.report.diverged
        assert said is not None
        chunk, config, update = said.chunk, self.attachment.config, self.settings.update
        if isinstance(update, Backprop):
            levers = [f"a smaller learning_rate (now {update.learning_rate:g})"]
        else:
            levers = [f"a smaller epsilon (now {update.epsilon:g})"]
        if config.scale != "paper":
            levers.append(f"a smaller scale (now {config.scale!r})")
        if config.init != "topk" and isinstance(update, Backprop):
            levers.append(f"init='topk' (now {config.init!r})")
        warnings.warn(
            f"the memory makes the text harder than the host alone: {said.memory:.2f} nats per token against {said.host:.2f}, "
            f"noticed at tokens {chunk.start} to {chunk.end - 1}. Try {' or '.join(levers)}. Now {consequence}",
            DivergenceWarning,
            stacklevel=caller_stacklevel(),
        )
