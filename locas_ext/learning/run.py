"""A run over a text: each chunk is scored, then learned from, and noted down."""

from collections.abc import Callable

import torch

from locas_ext.patching.attachment import Attachment
from locas_ext.state.stream import Chunk, Stream

from .backprop import agreed_loss, check_loss
from .chunk import Reader, Window
from .chunk_loop import Passage, progress_bar, read_chunks
from .divergence_watch import DivergenceWatch
from .host_kernels.kernels import fast_reader
from .initialization import score_and_initialize
from .protocol import Protocol
from .report import MemorizeReport
from .run_guards import interrupt_between_chunks, quiet_host, require_attached
from .settings import ResolvedSettings, ResolvedWrite
from .step import step_for
from .text_digest import BLOCK, TextDigest
from .texts import learned_now, put_record, record_of


def tail_length(protocol: Protocol) -> int:
    """How many of the latest tokens a run needs to be continued: those that a window and the digest reach back to."""
    return max(protocol.window, BLOCK) - 1


def longest_window(protocol: Protocol) -> int:
    """The most tokens that a window can have: with a stride as long as the window one stands before its chunk."""
    return max(protocol.window, protocol.stride) + 1


class Run:
    """A run over a text, and how far it has come."""

    def __init__(
        self,
        attachment: Attachment,
        settings: ResolvedSettings,
        reader: Reader,
        passage: Passage,
        digest: TextDigest,
        chunks: list[Chunk],
        title: str | None,
        on_divergence: str,
    ):
        """digest: of the text before the passage's first chunk; chunks: those scored before; title: None: as it was"""
        self.attachment, self.settings, self.reader = attachment, settings, reader
        self.passage, self.digest = passage, digest
        self.position = passage.begin
        self.report = MemorizeReport(chunks=list(chunks))
        self.record = record_of(attachment.texts, digest.hexdigest(), self.position) if self.position else None
        self.title = self.record.title if self.record is not None and title is None else title
        self.asked_for = settings.as_settings().to_record()
        state, update = attachment.state, settings.update
        if isinstance(update, ResolvedWrite) and update.room.reserved > state.capacity:
            state.resize(update.room.reserved)
        self.step = step_for(attachment, settings, reader)
        self.watch = DivergenceWatch(attachment, settings, reader, self.report, passage.count, on_divergence)

    def go(self, verb: str, progress: bool, callback: Callable[[Chunk], None] | None) -> MemorizeReport:
        """Reads the passage to its end."""
        attachment, model = self.attachment, self.attachment.host.model
        ranks = attachment.state.ranks
        first = ranks is None or ranks.rank == 0  # of processes that run alike
        attachment.state.zero_grad()
        attachment.host.reading.begin_run(model)
        with (
            progress_bar(progress and first, self.passage, self.report, "memorizing") as bar,
            interrupt_between_chunks(ranks) as check_interrupt,
            quiet_host(model) as quiet,
            torch.inference_mode(False),
            torch.enable_grad(),
            fast_reader(self.reader, self.passage.ids, longest_window(self.settings.protocol)) as self.kernels_report,
        ):
            for chunk in read_chunks(self.passage, self._learn, self.report, bar):
                self._note(chunk)
                self.watch.tell(chunk)
                if callback is not None:
                    callback(chunk)
                    require_attached(attachment, verb)
                    quiet()  # what a callback calls may have put the host back into training mode
                check_interrupt()
                if self.watch.stops:
                    break
            self.watch.finish()
        return self.report

    def _learn(self, window: Window, start: int, end: int) -> tuple[float, int]:
        """Scores a chunk, then learns it. -> its loss from before anything was learned of it, and who scored it."""
        state = self.attachment.state
        place = f"chunk {len(self.report.chunks)} (tokens {start} to {end - 1})"
        version, learned = state.version, state.learned
        losses = []
        if not state.initialized and not isinstance(self.settings.update, ResolvedWrite):
            losses.append(agreed_loss(score_and_initialize(self.attachment, window), state))
            check_loss(losses[0], state, place)
        self.watch.before(window)
        self._settle(window)
        for epoch in range(self.settings.epochs):
            losses.append(self.step(window, place))
            if epoch == 0:
                self.reader.scored()
        self.watch.after(window, losses[0], learned)
        self.window = window
        return losses[0], version

    def _settle(self, window: Window) -> None:
        """Decides in how many forwards the window is read, and reports why it is one."""
        why = self.reader.settle(window, self.settings.protocol.window)
        if why is not None and why not in self.report.one_forward:
            self.report.one_forward.append(why)

    def _note(self, chunk: Chunk) -> None:
        """Notes down where the run stands, and how much of the text is learned."""
        passage, attachment = self.passage, self.attachment
        self.digest.update(passage.between(self.position, chunk.end))
        self.position = chunk.end
        begin = max(passage.offset, chunk.end - tail_length(self.settings.protocol))
        tail = passage.between(begin, chunk.end).tolist()
        kept = self.reader.learned(self.window)
        attachment.stream = Stream(self.asked_for, chunk.end, self.digest.blocks, list(self.report.chunks), tail, kept)
        text = learned_now(self.title, self.digest.hexdigest(), chunk.end)
        put_record(attachment.texts, self.record, text)
        self.record = text
        self.report.graph, self.report.host_kernels = self.step.report(), self.kernels_report()
