"""A text that is being learned: how far, and what a file says of it."""

from dataclasses import dataclass, field

from locas_ext.state.kept_rows import KeptRows
from locas_ext.state.stream import Beginning, Chunk, Stream, TextRecord

from .chunk_loop import Passage
from .protocol import Protocol
from .text_digest import BLOCK, TextDigest
from .texts import learned_now, put_record, record_of


def tail_length(protocol: Protocol) -> int:
    """How many of the latest tokens a run needs to be continued: those that a window and the digest reach back to."""
    return max(protocol.window, BLOCK) - 1


@dataclass
class ReadText:
    """A text of a run, and how far it has come.

    Attributes:
        passage: what the run reads of it
        digest: of the text as far as it was read
        chunks: those scored so far, earlier calls' too
        learned: those that were noted down; callers get `chunks`, and may do with it what they like
        title: None: none, or as it was
        position: how many tokens were read
        record: what the list of texts says of it; None: nothing yet
        known: of the text from where on the record is of it: a callback may reset the memory in the middle
        unknown: how many tokens stand before that
    """

    passage: Passage
    digest: TextDigest
    chunks: list[Chunk]
    title: str | None
    learned: list[Chunk] = field(init=False)
    position: int = field(init=False)
    record: TextRecord | None = field(init=False, default=None)
    known: TextDigest = field(init=False)
    unknown: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.learned, self.position, self.known = list(self.chunks), self.passage.begin, self.digest

    def find_record(self, texts: list[TextRecord]) -> None:
        """Finds what the list says of the text's beginning, where the run continues it."""
        if not self.position:
            return
        self.record = record_of(texts, self.digest.hexdigest(), self.position)
        if self.record is None and texts:  # an empty list is also that of a file from before there were lists
            self._begin_record()
        if self.record is not None and self.title is None:
            self.title = self.record.title

    def _begin_record(self) -> None:
        self.known, self.unknown = TextDigest(), self.position

    def advance(self, chunk: Chunk, texts: list[TextRecord]) -> None:
        """Notes down that a chunk was learned."""
        if self.record is not None and self.record not in texts:  # the memory was reset, or another one put in its place
            self._begin_record()
        ids = self.passage.between(self.position, chunk.end)
        for digest in {self.digest, self.known}:
            digest.update(ids)
        self.learned.append(chunk)
        self.position = chunk.end
        text = learned_now(self.title, self.known.hexdigest(), chunk.end - self.unknown)
        put_record(texts, self.record, text)
        self.record = text

    def stream(self, settings: dict, kept: KeptRows | None = None) -> Stream:
        """Where the run stands in the text."""
        begin = max(self.passage.offset, self.position - tail_length(self.passage.protocol))
        tail = self.passage.between(begin, self.position).tolist()
        return Stream(settings, self.position, self.digest.blocks, Beginning(self.learned), tail, kept)
