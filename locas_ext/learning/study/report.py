"""What a study did."""

from dataclasses import dataclass, field


@dataclass
class StudyReport:
    """What a study wrote and learned; print() shows it in two lines.

    Attributes:
        passages: how many the texts were cut into
        asked: how many questions the host was to write
        refused: why questions were not used: {reason: how many}
        questions: how many were learned, by kind
        words: how many have a slot that answers to them in each addressed layer; 0 where keys are learned
        steps: updates in this call
        planned: updates in all
        loss_before, loss: nats a token over the answers, of the first and the last updates; None without any
        guard: nats a token to the host, on general prompts and free text that were kept back; None without a guard
        returned: whether that was too far at the end, so that the memory is what it was when it last was within
        seconds: {"writing", "reading", "learning"}: of questions written, of the host's expectations, of updates

    >>> import locas_ext as locas
    >>> print(locas.StudyReport(passages=2, questions={"blank": 3}, steps=1, planned=1, seconds={"learning": 0.5}))
    3 questions about 2 passages (3 blank)
    1 of 1 updates, 0.5 s
    """

    passages: int = 0
    asked: int = 0
    refused: dict[str, int] = field(default_factory=dict)
    questions: dict[str, int] = field(default_factory=dict)
    words: int = 0
    steps: int = 0
    planned: int = 0
    loss_before: float | None = None
    loss: float | None = None
    guard: float | None = None
    returned: bool = False
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def used(self) -> int:
        """How many questions were learned."""
        return sum(self.questions.values())

    def __str__(self) -> str:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in self.questions.items())
        refused = ", ".join(f"{count:,} {why}" for why, count in self.refused.items())
        words = f", {self.words:,} words with slots" if self.words else ""
        first = f"{self.used:,} questions about {self.passages:,} passages ({kinds}){words}" + (
            f"; not used: {refused}" if refused else ""
        )
        loss = "" if self.loss is None or self.loss_before is None else f", {self.loss_before:.2f} -> {self.loss:.2f} nats"
        guard = "" if self.guard is None else f", KL to the host {self.guard:.3f}"
        returned = "; an earlier state was put back, the last one that is close enough to the host" if self.returned else ""
        second = f"{self.steps:,} of {self.planned:,} updates, {sum(self.seconds.values()):.1f} s{loss}{guard}{returned}"
        return f"{first}\n{second}"
