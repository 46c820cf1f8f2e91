"""The updates of a study: answers without their passages, the text itself, and a guard for everything else."""

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from locas_ext.learning.backprop import check_gradient, check_loss, loss_scale
from locas_ext.learning.optimizers import OPTIMIZERS
from locas_ext.ops import token_nll
from locas_ext.patching.attachment import Attachment
from locas_ext.storage import snapshot

from .addresses import Addresses, update_values
from .guard import mean_distance
from .report import StudyReport
from .rows import Row, distance, joined, logits_of, targets_of
from .settings import StudySettings

BETWEEN = 5  # updates between two looks at the guard
FAR = 6.0  # times the distance allowed, from which on the last state within comes back
MOST_GUARD, LEAST_RATE, RECOVERY = 1024.0, 1 / 8, 1.1  # multiples of the settings; of the rate, at each look
_AIM = 0.7  # the share of the distance allowed that the guard's weight is steered to
WARM_UP, LAST_RATE = 50, 0.1  # updates; a share of the learning rate
RAW_FIRST = 2.0  # the weight of the text itself in the updates that learn mostly that


@dataclass(frozen=True)
class Material:
    """Everything that is learned with.

    lessons: answers, with what the host expects; raw: the text; guard, kept_back: what is to stay, a part of it to judge by
    addresses: where the memory's slots fire, which stay there, or None
    """

    lessons: Sequence[Row]
    raw: Sequence[Row]
    guard: Sequence[Row]
    kept_back: Sequence[Row]
    addresses: Addresses | None = None


@dataclass
class Progress:
    """How far learning has come.

    guard: what the guard's weight is multiplied by, rate: what the learning rate is; retreats: how often a state was put back;
    first: the distance to the host in the beginning, None before it is known
    """

    step: int = 0
    guard: float = 1.0
    rate: float = 1.0
    retreats: int = 0
    first: float | None = None


@dataclass
class Outcome:
    """What the updates so far showed.

    losses: nats a token of the answers, one an update; guard: the distance to the host; returned: whether it was too far at
    the end, so that the last state within was put back
    """

    losses: list[float] = field(default_factory=list)
    guard: float | None = None
    returned: bool = False


class Learner:
    """Runs the updates one by one, from wherever `progress` stands.

    A look at the guard steers its weight: up where the distance to the host comes near what is allowed, down where it is far
    below. Where it is much too far the last state within comes back with half the rate, which recovers from look to look.
    """

    def __init__(
        self, attachment: Attachment, material: Material, settings: StudySettings, loss: str, seed: int, progress: Progress
    ):
        self.attachment, self.material, self.settings = attachment, material, settings
        self.by_distance, self.seed, self.progress = loss == "kl", seed, progress
        self.device = attachment.host.input_device()
        self.outcome = Outcome()
        count = len(material.lessons)
        self.size = min(settings.batch, count)
        self.planned = max(settings.updates, math.ceil(count * settings.epochs / self.size))
        self._orders: dict[int, list[int]] = {}
        self._best: snapshot.Snapshot | None = None

    # ---- one update ----------------------------------------------------------------------------------------------
    def _drawn(self, rows: Sequence[Row], count: int, step: int) -> list[Row]:
        """Some rows, other ones at each step until all were there."""
        return [rows[(step * count + number) % len(rows)] for number in range(min(count, len(rows)))]

    def _mostly_raw(self, step: int) -> bool:
        return self.settings.raw > 0 and step < self.settings.raw_first * self.planned

    def _lessons(self, step: int) -> list[Row]:
        """The next ones of a row of epochs, each in another order; few while the text itself comes first."""
        count = len(self.material.lessons)
        places = range(step * self.size, step * self.size + (max(1, self.size // 4) if self._mostly_raw(step) else self.size))
        return [self.material.lessons[self._order(place // count)[place % count]] for place in places]

    def _raw(self, step: int) -> tuple[list[Row], float]:
        """-> rows of the text itself, and their weight"""
        batch, first = self.settings.batch, self._mostly_raw(step)
        if not self.settings.raw:
            return [], 0.0
        return self._drawn(
            self.material.raw, max(1, batch // (4 if first else 16)), step
        ), RAW_FIRST if first else self.settings.raw

    def _order(self, epoch: int) -> list[int]:
        if epoch not in self._orders:
            order = list(range(len(self.material.lessons)))
            random.Random(f"{self.seed} {epoch}").shuffle(order)
            self._orders = {key: value for key, value in self._orders.items() if key >= epoch - 1} | {epoch: order}
        return self._orders[epoch]

    def _loss(self, step: int) -> tuple[Tensor, Tensor]:
        """-> what is made smaller; the mean loss of the answers' tokens"""
        settings, material = self.settings, self.material
        lessons = self._lessons(step)
        raw, weight_of_raw = self._raw(step)
        guard = self._drawn(material.guard, max(4, 3 * settings.batch // 8), step) if settings.guard else []
        logits = logits_of(self.attachment.host.model, [*lessons, *raw, *guard], self.device)
        sizes = [sum(row.count for row in rows) for rows in (lessons, raw, guard)]
        of_lessons, of_raw, of_guard = logits.split(sizes)
        total, shown = self._of_lessons(of_lessons, lessons)
        if raw:
            total = total + weight_of_raw * self._missed(token_nll(of_raw.float(), targets_of(raw, logits.device)))
        if guard:
            weight = settings.guard * self.progress.guard
            total = total + weight * distance(of_guard, joined(guard, logits.device)).mean()
        return total, shown

    def _missed(self, nll: Tensor) -> Tensor:
        """The mean loss of tokens [n], of which those that are recalled count nothing."""
        return torch.where(nll.detach() <= -math.log(self.settings.recalled), 0.0, nll).mean()  # NaN stays

    def _of_lessons(self, logits: Tensor, lessons: list[Row]) -> tuple[Tensor, Tensor]:
        nll = token_nll(logits.float(), targets_of(lessons, logits.device))
        missed = self._missed(nll)
        if not self.by_distance:
            return missed, nll.detach().mean()
        gold = self.settings.gold
        kl = distance(logits, joined(lessons, logits.device)).mean()
        return (1 - gold) * kl + gold * missed, nll.detach().mean()

    def _rate(self, step: int) -> float:
        warm = max(1, min(WARM_UP, self.planned // 5))
        left = 1 - (step - warm) / max(1, self.planned - warm)
        share = (step + 1) / warm if step < warm else LAST_RATE + (1 - LAST_RATE) * left
        return self.settings.learning_rate * self.progress.rate * share

    def gradient(self, step: int) -> float:
        """The gradient of a step into the arenas. -> the answers' loss. LocasError if something is not finite."""
        state = self.attachment.state
        state.sync()
        with state.accumulating():
            total, shown = self._loss(step)
            state.backward(total * loss_scale(state))
        norms = [arena.gradient_norm().to(total.device) for arena in state.arenas]
        value, loss, *norms_here = torch.stack([total.detach(), shown, *norms]).tolist()
        check_loss(value, state, f"update {step} of the study")
        check_gradient(all(map(math.isfinite, norms_here)), state, f"update {step} of the study")
        return loss

    def _update(self) -> None:
        state, step = self.attachment.state, self.progress.step
        try:
            self.outcome.losses.append(self.gradient(step))
            scale, clip = 1.0 / loss_scale(state), bool(self.attachment.config.clip)
            if self.material.addresses is not None:
                update_values(state, self._rate(step), clip, scale)
            else:
                OPTIMIZERS["adamw"](state, self._rate(step), clip=clip, gradient_scale=scale)
        finally:
            state.zero_grad()
        self.progress.step += 1

    def seconds_per_step(self) -> float:
        """How long an update takes, by one that changes nothing."""
        started = time.perf_counter()
        try:
            self.gradient(0)
        finally:
            self.attachment.state.zero_grad()
        return time.perf_counter() - started

    # ---- the guard -----------------------------------------------------------------------------------------------
    def _grown(self) -> float:
        """How far the model has gone from the host, in shares of what is allowed."""
        self.outcome.guard = mean_distance(self.attachment.host.model, self.material.kept_back, self.device)
        return (self.outcome.guard - (self.progress.first or 0.0)) / self.settings.most_kl

    def _look(self) -> None:
        """Steers, keeps the state, or puts the last one back."""
        progress, grown = self.progress, self._grown()
        change = math.exp(max(-0.1, min(0.7, 0.5 * (grown - _AIM))))
        progress.guard = max(1 / 16, min(MOST_GUARD, change * progress.guard))
        if grown <= 1:
            self._best = self._taken()
        elif grown > FAR:
            progress.retreats += 1
            progress.rate = max(LEAST_RATE, progress.rate / 2)
            self._put_back()
            return
        progress.rate = min(1.0, RECOVERY * progress.rate)

    def _put_back(self) -> None:
        if self._best is not None:
            snapshot.restore(self.attachment.state, self.attachment.host, self._best)
            self._grown()

    def _taken(self) -> snapshot.Snapshot:
        return snapshot.take(self.attachment.state, self.attachment.host, None, [])

    # ---- all of it -----------------------------------------------------------------------------------------------
    def run(self, after_step: Callable[[], None]) -> Outcome:
        """Learns to the end of the plan. after_step: called after each update; what it raises ends the run."""
        guarded = len(self.material.kept_back) > 0
        if guarded:
            self._look_at_start()
        while self.progress.step < self.planned:
            self._update()
            step = self.progress.step
            if guarded and (step % BETWEEN == 0 or step < BETWEEN or step == self.planned):
                self._look()
            after_step()
        if guarded and self._grown() > 1:
            self.outcome.returned = True
            self._put_back()
        return self.outcome

    def tell(self, report: StudyReport, before: int) -> None:
        """Puts what the updates did into a report. before: how many there were when this learner began"""
        outcome, report.planned = self.outcome, self.planned
        report.steps, report.guard, report.returned = self.progress.step - before, outcome.guard, outcome.returned
        few = max(1, min(8, len(outcome.losses) // 4))
        if outcome.losses:
            report.loss_before = sum(outcome.losses[:few]) / few
            report.loss = sum(outcome.losses[-few:]) / few

    def _look_at_start(self) -> None:
        """The state that learning begins with is one to come back to."""
        if self.progress.first is None:
            self.progress.first = 0.0
            self._grown()
            self.progress.first = self.outcome.guard
        self._best = self._taken()
