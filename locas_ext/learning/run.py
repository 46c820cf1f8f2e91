"""A run over a text: each chunk is scored, then learned from, and noted down."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from locas_ext.patching.attachment import Attachment
from locas_ext.state.stream import Chunk

from .alarm import alarm
from .backprop import agreed_loss, check_loss
from .chunk import Reader, Window
from .chunk_loop import progress_bar, read_chunks
from .divergence_watch import DivergenceWatch
from .host_kernels.kernels import fast_reader
from .initialization import score_and_initialize
from .leaving import Leaving
from .peers import Peers
from .progress import NoProgress, StreamProgress
from .protocol import Protocol
from .read_text import ReadText
from .report import MemorizeReport
from .run_guards import interrupt_between_chunks, quiet_host, require_attached
from .settings import ResolvedSettings, ResolvedWrite
from .step import step_for


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
        text: ReadText,
        on_divergence: str,
        peers: Peers | None = None,
    ):
        """peers: those who learn in step with this process; None: it learns alone"""
        self.attachment, self.settings, self.reader, self.text, self.peers = attachment, settings, reader, text, peers
        self.report = MemorizeReport(chunks=text.chunks)
        for each in [text] if peers is None else peers.texts:
            each.find_record(attachment.texts)
        if peers is not None and peers.each:
            self.report.ranks = [each.chunks for each in peers.texts]
        self.asked_for = {**settings.as_settings().to_record(), "dtype": attachment.host.dtype_name}
        state, update = attachment.state, settings.update
        if isinstance(update, ResolvedWrite) and update.room.reserved > state.capacity:
            state.resize(update.room.reserved)
        alike = attachment.host.ranks or attachment.ranks  # the processes that run this with us
        self.speaks = alike is None or alike.rank == 0  # for all of them, to whoever watches
        self.leaving = None if alike is None or peers is not None else Leaving(alike)  # peers say it in sums of theirs
        # Those that share every forward cannot be told in the sum of a step that one of them does not come to.
        self.alarm = alarm(alike, tells=peers is None or peers.lockstep)
        self.step = step_for(attachment, settings, reader, peers, self.leaving)
        self.watch = DivergenceWatch(attachment, settings, reader, self.report, text.passage.count, on_divergence, peers)

    def go(self, verb: str, progress: bool, callback: Callable[[Chunk], None] | None) -> MemorizeReport:
        """Reads the passage to its end."""
        attachment, model, peers = self.attachment, self.attachment.host.model, self.peers
        attachment.state.zero_grad()
        attachment.host.reading.begin_run(model)
        sample = self.text if peers is None else peers.texts[0]  # the same everywhere: what is found is too
        with (
            progress_bar(progress and self.speaks, self.text.passage, self.report, "memorizing") as bar,
            interrupt_between_chunks() as check_interrupt,
            self.alarm,
            quiet_host(model) as quiet,
            torch.inference_mode(False),
            torch.enable_grad(),
            fast_reader(self.reader, sample.passage.ids, longest_window(self.settings.protocol)) as self.kernels_report,
        ):
            for chunk in self._chunks(bar):
                self._note(chunk)
                self.watch.tell(chunk)
                if callback is not None and (self.leaving is None or self.leaving.ending is None):
                    self._call(callback, chunk, verb)
                    quiet()  # what a callback calls may have put the host back into training mode
                self._between_chunks(check_interrupt)
                if self.watch.stops:
                    break
            if self.leaving is not None:
                self.leaving.between_chunks(check_interrupt)  # what came after the last step that could say it
            self.watch.finish()
        if peers is not None and peers.ending is not None:
            raise peers.ending
        return self.report

    def _chunks(self, bar: StreamProgress | NoProgress) -> Iterator[Chunk]:
        """The text's chunks, each when it is learned; then the last one again while peers' texts go on."""
        yield from read_chunks(self.text.passage, self._learn, self.report, bar)
        while self.peers is not None and self.peers.goes_on:
            last = self.report.chunks[-1]
            self._learn(self.peers.step.window(self.peers.own), last.start, last.end)
            yield last

    def _call(self, callback: Callable[[Chunk], None], chunk: Chunk, verb: str) -> None:
        try:
            callback(chunk)
            require_attached(self.attachment, verb)
        except BaseException as error:
            if self.leaving is not None and self.attachment.attached:
                self.leaving.leave(error)
                return
            if self.peers is None:
                raise
            if self.peers.schedule.is_open and not self.watch.stops:
                self.peers.leave(self.attachment.state)
                raise
            self.peers.ending = error  # the run ends here for all: raised after what they do together in the end

    def _between_chunks(self, check_interrupt: Callable[[], None]) -> None:
        """Ends the run where Ctrl-C was pressed, or where another process ends it."""
        if self.peers is not None:
            self.peers.end_if_asked(check_interrupt)
        elif self.leaving is not None:
            self.leaving.between_chunks(check_interrupt)
        else:
            check_interrupt()

    def _learn(self, window: Window, start: int, end: int) -> tuple[float, int]:
        """Scores a chunk, then learns it. -> its loss from before anything was learned of it, and who scored it."""
        state, peers = self.attachment.state, self.peers
        place = f"chunk {len(self.report.chunks)} (tokens {start} to {end - 1})"
        version, learned = state.version, state.learned
        losses = []
        if not state.initialized and not isinstance(self.settings.update, ResolvedWrite):
            losses.append(self._initialize(window, place))
        self.watch.before(window)
        self._settle(window)
        for epoch in range(self.settings.epochs):
            losses.append(self.step(window, place))
            if not losses[1:] and peers is not None:
                self.scored = peers.losses
            if epoch == 0:
                self.reader.scored()
        loss, tokens = (losses[0], len(window.targets)) if peers is None else (sum(self.scored), peers.step.tokens)
        self.watch.after(window, loss, tokens, learned)
        self.window, self.version = window, version
        return losses[0], version

    def _initialize(self, window: Window, place: str) -> float:
        """Begins the memory with its first chunk. -> the chunk's loss."""
        state, peers = self.attachment.state, self.peers

        def scored(loss: Tensor) -> None:
            self.scored = [agreed_loss(loss, state)] if peers is None else peers.all_losses(loss)
            places = [place] if peers is None else peers.places(place)
            for each, of_rank in zip(self.scored, places, strict=True):
                check_loss(each, state, of_rank)

        score_and_initialize(self.attachment, window, scored, peers)
        return self.scored[0 if peers is None else peers.own]

    def _settle(self, window: Window) -> None:
        """Decides in how many forwards the window is read, and reports why it is one."""
        full, peers = self.settings.protocol.window, self.peers
        why = self.reader.settle(window, full) if peers is None else peers.settle(window, self.reader, full)
        if why is not None and why not in self.report.one_forward:
            self.report.one_forward.append(why)

    def _note(self, chunk: Chunk) -> None:
        """Notes down where the run stands, and how much of the text is learned."""
        attachment, peers = self.attachment, self.peers
        if peers is None:
            self.text.advance(chunk, attachment.texts)
        else:
            for text, theirs in peers.learned(self.scored, self.version):
                text.advance(theirs, attachment.texts)
        stream = self.text.stream(self.asked_for, self.reader.learned(self.window))
        if peers is not None and peers.each:
            stream.ranks = [text.stream(self.asked_for) for text in peers.texts]
        attachment.stream = stream
        self.report.graph, self.report.host_kernels = self.step.report(), self.kernels_report()
