"""The verb that makes a text recallable."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from locas_ext.learning.study.report import StudyReport
from locas_ext.learning.study.settings import StudySettings
from locas_ext.learning.study.study import study

from .learning_verbs import MemoryLearning


class MemoryStudy(MemoryLearning):
    """The part of `Memory` that studies."""

    def study(
        self,
        texts: str | Sequence[str],
        tokenizer: Any,
        loss: str = "kl",
        pairs: Sequence[tuple[str, str]] | None = None,
        seed: int = 0,
        progress: bool = True,
        settings: StudySettings | None = None,
        cache: str | Path | None = None,
    ) -> StudyReport:
        """Learns texts so that questions about them can be answered without them in the window.

        The host reads each passage of the texts, writes questions about it and answers them with it in view; further questions
        are made from the passage's sentences. The memory then learns each answer from its question, without the passage, mixed
        with the text itself, while a guard keeps general answers and free text as the bare host gives them.

        Args:
            texts: a text or several, at least 8 tokens each
            tokenizer: the host's, with its chat template if it has one
            loss: "kl": the answer's distribution as the host gives it with the passage in view; "ce": the answer itself
            pairs: [(question, answer), ...] to learn instead of the host's own
            seed: int >= 0: of questions, draws and order
            progress: bool: whether progress bars are shown, and before writing and before learning about how long it will take
            settings: a `locas.StudySettings`; None: its defaults
            cache: a folder that keeps questions and progress, so that the same call continues where an ended one stood; None:
                nothing is kept on disk

        Returns:
            A StudyReport. Ctrl-C takes effect between updates: the memory is that of the last one, and the same call
            continues there. A run of `memorize` ends here: `feed` does not continue it after a study.

        Raises:
            ValueError: the memory is detached or disabled here, an argument is out of range, or the host is split among
                processes
            TypeError: an argument is of another type
            LocasError: no question can be used (with the counts), the cache is damaged, or a loss or gradient is not finite
            FileExistsError: the cache holds something else
            RuntimeError: another thread is changing the memory

        Source: arXiv 2506.06266 for learning from self-made questions; docs/method.md, "Study".

        >>> import locas_ext as locas
        >>> from locas_ext.evaluation.assets import MODEL, load_model
        >>> from transformers import AutoTokenizer
        >>> memory = locas.attach(load_model(), locas.LocasConfig(rank=4, scale="host"))
        >>> settings = locas.StudySettings(epochs=1, updates=1, guard=0.0, keys="learned")
        >>> pairs = [("Who keeps the gate?", "Anna"), ("Where does Anna live?", "Bergen")]
        >>> text = "Anna, who lives in Bergen, keeps the gate of the old town."
        >>> report = memory.study(text, AutoTokenizer.from_pretrained(MODEL), "ce", pairs, progress=False, settings=settings)
        >>> report.used, report.steps, memory.version
        (2, 1, 1)
        """
        self._require_attached("study")
        self._require_whole("study", "study in a model without {how}, and load the memory here")
        self._require_enabled("study", "nothing can be learned")
        return study(self._attachment, texts, tokenizer, loss, pairs, seed, progress, settings, cache)
