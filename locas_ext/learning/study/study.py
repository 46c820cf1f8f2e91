"""Studying a text: questions about it are written, and their answers learned without it in view."""

import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from functools import cached_property
from itertools import compress
from pathlib import Path
from typing import Any

import torch

from locas_ext.checks import boolean, integer, one_of
from locas_ext.hosts.fingerprint import fingerprint
from locas_ext.learning.initialization import initialize
from locas_ext.learning.progress import progress_bar
from locas_ext.learning.run_guards import interrupt_between_chunks, quiet_host
from locas_ext.learning.settings import require_parameters_that_learn
from locas_ext.learning.text_digest import text_digest
from locas_ext.learning.texts import learned_now, put_record
from locas_ext.patching.attachment import Attachment
from locas_ext.storage import checkpoint
from locas_ext.storage.config_file import digest as tensor_digest
from locas_ext.terminal import Terminal

from .addresses import Addresses, addressed_words
from .arguments import prompter_of, texts_of
from .asking import Asker, Written
from .guard import GuardRows
from .learner import Learner, Material, Progress
from .made import made_pairs
from .pairs import Pair, given_pairs, require_usable
from .passages import passages_of
from .report import StudyReport
from .rows import Row
from .salience import Salience
from .settings import ADDRESSED, ASKED, ASKED_FOR, LOSSES, StudySettings
from .store import Store, digest
from .teacher import ANSWERED, Lesson, lessons_of, lessons_without, surprises_of

_AT_ONCE = 16  # passages that are asked about together, and then kept
_RAW = 128  # tokens of the text in a row
_SAVE_AFTER = 60.0  # seconds of learning between two saves
Pairs = Sequence[tuple[str, str]]


class Study:
    """One study: its texts in passages, its host, and where it is kept."""

    def __init__(
        self,
        attachment: Attachment,
        texts: object,
        tokenizer: Any,
        loss: str,
        pairs: Pairs | None,
        settings: StudySettings,
        seed: int,
        progress: bool,
        cache: str | Path | None,
    ):
        """Raises ValueError or TypeError for what does not fit."""
        host = attachment.host
        self.attachment, self.settings, self.shows = attachment, settings, boolean("progress", progress)
        self.loss, self.seed = one_of("loss", loss, LOSSES), integer("seed", seed, 0)
        self.texts = texts_of(texts)
        self.prompter = prompter_of(tokenizer, host.vocab_size, self.texts)
        require_parameters_that_learn(attachment.state)
        self.passages = passages_of(self.prompter, self.texts, min(settings.chunk, host.max_positions // 2))
        self.given = None if pairs is None else given_pairs(pairs, self.passages)
        self.device, self.model = host.input_device(), host.model
        self.store = Store(None if cache is None else Path(cache), self._identity())
        self.report = StudyReport(passages=len(self.passages))

    def _identity(self) -> dict[str, Any]:
        """What decides the questions and the updates."""
        given = None if self.given is None else [(pair.question, pair.answer) for pair in self.given]
        return {
            "host": digest(fingerprint(self.attachment.host)),
            "dtype": self.attachment.host.dtype_name,
            "texts": digest(self.texts),
            "pairs": None if given is None else digest(given),
            "loss": self.loss,
            "seed": self.seed,
            "settings": json.loads(json.dumps(asdict(self.settings))),
        }

    # ---- questions -----------------------------------------------------------------------------------------------
    def bar(self, title: str, total: int, unit: str) -> AbstractContextManager[Callable[[int], None]]:
        """A progress bar, or nothing where none is wanted. Yields what advances it."""
        return _bar(title, total, unit) if self.shows else nullcontext(lambda count: None)

    @cached_property
    def salience(self) -> Salience:
        """Finds the words worth asking for; the model is the bare host here."""
        return Salience(surprises_of(self.model, self.prompter, self.passages, self.device))

    def pairs(self, check_interrupt: Callable[[], None]) -> list[Pair]:
        """All questions: those given, or those that the host writes (or has written before) and those made."""
        if self.given is not None:
            return self.given
        salient, settings = self.salience, self.settings
        written, done = self.store.written()
        if ASKED_FOR in settings.kinds or (ASKED in settings.kinds and self.prompter.has_chat):
            asker = Asker(self.model, self.prompter, self.passages, salient, settings, self.seed)
            missing = [number for number in range(len(self.passages)) if number not in done]
            if self.shows and missing:
                count, seconds = asker.seconds(missing)
                Terminal(stderr=True).print(f"{count:,} questions to write, about {seconds:,.0f} s")
            with self.bar("asking", len(missing), "passages") as advance:
                for start in range(0, len(missing), _AT_ONCE):
                    self._ask(asker, missing[start : start + _AT_ONCE], written, advance)
                    check_interrupt()
        self.report.asked, self.report.refused = written.asked, dict(written.refused)
        made = made_pairs(self.passages, settings.kinds, salient, self.seed)
        return [*dict.fromkeys([*written.pairs, *made])]

    def _ask(self, asker: Asker, numbers: list[int], written: Written, advance: Callable[[int], None]) -> None:
        part = asker.ask(numbers, advance)
        self.store.add(numbers, part)
        written.pairs += part.pairs
        written.asked += part.asked
        for why, count in part.refused.items():
            written.refused[why] = written.refused.get(why, 0) + count

    def lessons(self, pairs: list[Pair]) -> list[Lesson]:
        """What the host expects of each answer with the passage in view; those it does not answer are left out."""
        positions, by_distance = self.attachment.host.max_positions, self.loss == "kl" and self.settings.gold < 1
        unclear = [by_distance or (self.settings.check and pair.kind == ASKED) for pair in pairs]
        read = list(compress(pairs, unclear))
        found = lessons_without(self.prompter, [pair for pair, each in zip(pairs, unclear, strict=True) if not each], positions)
        with self.bar("reading", len(read), "questions") as advance:
            found += lessons_of(
                self.model, self.prompter, self.passages, read, self.settings.top_k, positions, self.device, advance
            )
        refused = self.report.refused
        if len(found) < len(pairs):
            refused["do not fit into the window"] = len(pairs) - len(found)
        if self.settings.check and self.given is None:
            true_anyway = self.loss == "ce" or self.settings.gold > 0
            kept = [lesson for lesson in found if lesson.answered >= ANSWERED or (true_anyway and lesson.pair.kind != ASKED)]
            if len(kept) < len(found):
                refused["are not answered with the passage in view"] = len(found) - len(kept)
            found = kept
        require_usable([lesson.pair for lesson in found], max(self.report.asked, len(pairs)), refused)
        for lesson in found:
            self.report.questions[lesson.pair.kind] = self.report.questions.get(lesson.pair.kind, 0) + 1
        return found

    # ---- learning ------------------------------------------------------------------------------------------------
    def material(self, lessons_found: list[Lesson]) -> Material:
        """The rows of a study; the model is the bare host here."""
        settings, begin = self.settings, tuple(self.prompter.passage(""))
        texts = (
            [token for passage in self.passages if passage.of == n for token in passage.ids] for n in range(len(self.texts))
        )
        size = min(_RAW, self.attachment.host.max_positions // 2)
        pieces = (ids[at : at + size] for ids in texts for at in range(0, len(ids), size))
        raw = [Row((*begin, *piece), max(1, len(begin))) for piece in pieces if len(piece) > 1]
        random.Random(self.seed).shuffle(raw)
        lessons = [lesson.row for lesson in lessons_found]
        if not settings.guard and settings.keys != ADDRESSED:
            return Material(lessons, raw, [], [])
        positions = self.attachment.host.max_positions
        guard = GuardRows(self.model, self.prompter, positions, settings.top_k, self.seed, self.device)
        rows, kept_back = guard.general()
        addresses = None
        if settings.keys == ADDRESSED:
            words = addressed_words(self.passages, self.salience, self.prompter, rows)
            addresses = Addresses.of(self.attachment, self.prompter, words, [*lessons, *raw], rows, self.seed, self.device)
            self.report.words = addresses.words
            if settings.guard:
                rows = guard.shuffled([*rows, *guard.of_words(words)])
        return Material(lessons, raw, *((rows, kept_back) if settings.guard else ([], [])), addresses)

    def start(self, addresses: Addresses | None) -> str:
        """Initializes the memory if need be, with optimizer states that begin anew. -> a digest of how it starts."""
        state = self.attachment.state
        if addresses is not None:
            if fresh := not state.initialized:
                shape = len(state.layers), state.planes, state.rank, state.hidden_size
                state.set_slots(state.arenas[0].slots.new_zeros(shape), version=0)
            addresses.put(state, fresh)
        elif not state.initialized:
            ids = [token for passage in self.passages for token in passage.ids]
            texts, stream = self.attachment.texts, self.attachment.stream
            initialize(self.attachment, ids[: min(2048, self.attachment.host.max_positions)])
            self.attachment.texts, self.attachment.stream = texts, stream
        for arena in state.arenas:
            arena.forget_optimizer()
        return tensor_digest(b"".join(arena.slots.cpu().numpy().tobytes() for arena in state.arenas))

    def learn(self, material: Material, check_interrupt: Callable[[], None]) -> None:
        """The updates, from where the store has them."""
        start = self.start(material.addresses)
        kept = self.store.progress(start)
        if kept is not None and self.store.memory is not None:
            checkpoint.read(self.store.memory).put_into(self.attachment)
        numbers = {name: value for name, value in (kept or {}).items() if name != "start"}
        learner = Learner(self.attachment, material, self.settings, self.loss, self.seed, Progress(**numbers))
        before = learner.progress.step
        if self.shows and before < learner.planned:
            seconds = learner.seconds_per_step() * (learner.planned - before)
            Terminal(stderr=True).print(f"{learner.planned - before:,} updates, about {seconds:,.0f} s")
        self.report.planned = learner.planned
        try:
            with self.bar("studying", learner.planned - before, "updates") as advance:
                self._run(learner, start, advance, check_interrupt)
        finally:
            self._note(learner, before)

    def _run(self, learner: Learner, start: str, advance: Callable[[int], None], check_interrupt: Callable[[], None]) -> None:
        saved = time.monotonic()

        def save() -> None:
            nonlocal saved
            if self.store.memory is not None:
                checkpoint.save(self.attachment, self.store.memory, optimizer=True)
                self.store.keep_progress({"start": start, **asdict(learner.progress)})
            saved = time.monotonic()

        def after_step() -> None:
            advance(1)
            if time.monotonic() - saved > _SAVE_AFTER:
                save()
            try:
                check_interrupt()
            except KeyboardInterrupt:
                save()
                raise

        learner.run(after_step)
        save()

    def _note(self, learner: Learner, before: int) -> None:
        """The report, and the record of what was learned."""
        report, attachment = self.report, self.attachment
        learner.tell(report, before)
        if report.steps or before:
            attachment.stream = None  # a run over a text cannot go on behind updates that are not its own
            for text in self.texts:
                ids = torch.tensor(self.prompter.encode(text), dtype=torch.int64)
                put_record(attachment.texts, None, learned_now(None, text_digest(ids), len(ids)))


@contextmanager
def _bar(title: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
    with progress_bar(unit, "{task.fields[rate]:,.1f}/s") as progress:
        task = progress.add_task(title, total=total, rate=0.0)

        def advance(count: int) -> None:
            done = progress.tasks[0].completed + count
            progress.update(task, advance=count, rate=done / (progress.tasks[0].elapsed or 1.0))

        yield advance


def study(
    attachment: Attachment,
    texts: object,
    tokenizer: Any,
    loss: str = "kl",
    pairs: Pairs | None = None,
    seed: int = 0,
    progress: bool = True,
    settings: StudySettings | None = None,
    cache: str | Path | None = None,
) -> StudyReport:
    """See `Memory.study`."""
    if settings is not None and not isinstance(settings, StudySettings):
        raise TypeError(f"settings is {type(settings).__name__}; expected locas.StudySettings(...) or None")
    with attachment.exclusive("study"):
        chosen = StudySettings() if settings is None else settings
        made = Study(attachment, texts, tokenizer, loss, pairs, chosen, seed, progress, cache)
        model, seconds = attachment.host.model, made.report.seconds
        with quiet_host(model), torch.inference_mode(False), interrupt_between_chunks() as check_interrupt:
            with attachment.state.disable():
                with timed(seconds, "writing"):
                    written = made.pairs(check_interrupt)
                with timed(seconds, "reading"):
                    material = made.material(made.lessons(written))
            check_interrupt()
            with torch.enable_grad(), timed(seconds, "learning"):
                made.learn(material, check_interrupt)
        return made.report


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Puts how long the block took into `seconds`, by name."""
    started = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - started
