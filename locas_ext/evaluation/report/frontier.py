"""The frontier of learning against forgetting: which arms are better than which on both axes."""

from collections.abc import Iterable
from dataclasses import dataclass

from .tables import ArmResults

LEARNING = ("locas", "temp-lora")
SHOWN = 1e12  # perplexities from here on are of arms that went astray: no axis shows them


@dataclass(frozen=True)
class Point:
    """An arm's two perplexities, averaged over the same books as every other's.

    learned: on the book
    held_out: on other texts after the book
    """

    label: str
    method: str
    learned: float
    held_out: float

    def dominates(self, other: "Point") -> bool:
        """No worse on either axis and better on one."""
        no_worse = self.learned <= other.learned and self.held_out <= other.held_out
        return no_worse and (self.learned, self.held_out) != (other.learned, other.held_out)


def shared_books(arms: Iterable[ArmResults]) -> set[str]:
    """The books that every one of the arms has finished."""
    return set.intersection(*books) if (books := [arm.books for arm in arms]) else set()


def collect_points(arms: list[ArmResults]) -> tuple[list[Point], set[str]]:
    """The arms that learn, by their perplexity on the book, the lowest first; and the books these are averaged over.

    Left out are arms without a held-out perplexity on every book they read, or with one that is beyond SHOWN.
    """
    learning = [
        arm
        for arm in arms
        if arm.method in LEARNING and all(_finite(arm.mean(name)) for name in ("perplexity", "held_out_perplexity"))
    ]
    books = shared_books(learning)
    shared = [arm.on(books) for arm in learning] if books else []
    points = []
    for arm in shared:
        learned, held_out = arm.mean("perplexity"), arm.mean("held_out_perplexity")
        assert learned is not None and held_out is not None, "known on all books of the arm, so on some"
        points.append(Point(arm.label, arm.method, learned, held_out))
    return sorted(points, key=lambda point: (point.learned, point.held_out)), books


def _finite(value: float | None) -> bool:
    return value is not None and value < SHOWN


def dominators(point: Point, points: list[Point]) -> list[Point]:
    """Those that dominate it, in the order of `points`."""
    return [other for other in points if other.dominates(point)]


def pareto_front(points: list[Point]) -> list[Point]:
    """Those that nothing dominates, in the order of `points`."""
    return [point for point in points if not dominators(point, points)]
