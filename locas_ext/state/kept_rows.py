"""The keys and values that a run keeps of the inputs it has read: the text's first ones, and the latest ones."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class LayerRoom:
    """How many rows of a layer are kept: of the text's first inputs, and of the latest."""

    first: int
    latest: int


@dataclass
class RowGroup:
    """Tensors of one shape on one device: members are their numbers; row i of each is member i's.

    first: [g, H, first, D]; latest: [g, H, latest, D], the newest row last
    """

    members: list[int]
    first: Tensor
    latest: Tensor


def _groups(rooms: Sequence[LayerRoom], rows: Sequence[Tensor]) -> list[RowGroup]:
    """Empty groups for tensors such as these: rows [H, n, D], two per layer."""
    members: dict[tuple, list[int]] = {}
    for number, tensor in enumerate(rows):
        heads, _, size = tensor.shape
        members.setdefault((rooms[number // 2], heads, size, tensor.dtype, tensor.device), []).append(number)
    return [
        RowGroup(
            numbers,
            torch.zeros(len(numbers), heads, room.first, size, dtype=dtype, device=device),
            torch.zeros(len(numbers), heads, room.latest, size, dtype=dtype, device=device),
        )
        for (room, heads, size, dtype, device), numbers in members.items()
    ]


@dataclass
class KeptRows:
    """Tensors are numbered layer by layer, keys before values: 2 * layer, 2 * layer + 1. They stay where they are.

    rooms: one per layer
    seen: how many inputs were read
    held: of how many of the latest of them the rows are held, by layers with room for so many; 0: nothing here is needed
    head: the tokens of the text's first inputs, as many as any layer keeps rows of
    groups: made when the first rows come
    packed: what a file held, until it is put in place; None: nothing
    """

    rooms: list[LayerRoom]
    seen: int = 0
    held: int = 0
    head: list[int] = field(default_factory=list)
    groups: list[RowGroup] = field(default_factory=list, repr=False)
    packed: dict[str, Tensor] | None = field(default=None, repr=False)

    @property
    def first(self) -> int:
        """How many of the text's first inputs are kept at most."""
        return max(room.first for room in self.rooms)

    def append(self, rows: Sequence[Tensor]) -> None:
        """Takes the rows [H, n, D] of the next n inputs, one tensor per number; their gradients are not kept."""
        with torch.no_grad():
            self.groups = self.groups or _groups(self.rooms, rows)
            count = rows[0].shape[1]
            for group in self.groups:
                new = [rows[number] for number in group.members]
                _put_first(group.first, new, self.seen)
                _shift_in(group.latest, new)
        self.seen += count
        self.held += count

    def replace(self, first: Sequence[Tensor], latest: Sequence[Tensor]) -> None:
        """Puts other rows in the place of those held: first and latest [H, n, D], one tensor per number."""
        with torch.no_grad():
            self.groups = self.groups or _groups(self.rooms, latest)
            for group in self.groups:
                _put_first(group.first, [first[number] for number in group.members], 0)
                _shift_in(group.latest, [latest[number] for number in group.members])
        self.held = latest[0].shape[1]

    def forget(self) -> None:
        """Lets go of all rows, where the window is read anew next."""
        self.held = 0

    def on(self, like: Sequence[Tensor]) -> "KeptRows":
        """These where tensors `like`, one per number, are and in their dtypes; itself where they lie there.

        ValueError for rows of other shapes.
        """
        form = lambda tensor: (tensor.device, tensor.dtype, tensor.shape[0], tensor.shape[2])
        if self.groups and all(form(latest) == form(like[number]) for number, (_, latest) in self._by_number().items()):
            return self
        packed, counts = self.tensors(), row_counts(self.to_record())
        moved = KeptRows(self.rooms, self.seen, self.held, list(self.head), _groups(self.rooms, like))
        for number, (first, latest) in moved._by_number().items():
            if (name := row_names(number // 2)[number % 2]) not in counts:
                continue
            of_first, of_latest = counts[name]
            if packed[name].shape[::2] != first.shape[::2]:
                raise ValueError(f"{name} is {list(packed[name].shape)}; expected heads and size of {list(first.shape)}")
            first[:, :of_first] = packed[name][:, :of_first]
            latest[:, latest.shape[1] - of_latest :] = packed[name][:, of_first:]
        return moved

    def _by_number(self) -> dict[int, tuple[Tensor, Tensor]]:
        """The first [H, first, D] and the latest rows [H, latest, D] of each tensor; empty before the first rows."""
        places = [(group, place, number) for group in self.groups for place, number in enumerate(group.members)]
        return {n: (group.first[place], group.latest[place]) for group, place, n in sorted(places, key=lambda item: item[2])}

    # ---- in a file -------------------------------------------------------------------------------------------
    def to_record(self) -> dict:
        """All but the rows, JSON-ready."""
        rooms = [asdict(room) for room in self.rooms]
        return {"seen": self.seen, "held": self.held, "head": list(self.head), "rooms": rooms}

    def tensors(self) -> dict[str, Tensor]:
        """The rows that are needed, [H, n, D]: of the text's first inputs, then of the latest; only those there are."""
        if self.packed is not None:
            return self.packed
        counts = row_counts(self.to_record())
        result = {}
        for number, (first, latest) in self._by_number().items():
            if (name := row_names(number // 2)[number % 2]) in counts:
                of_first, of_latest = counts[name]
                result[name] = torch.cat([first[:, :of_first], latest[:, latest.shape[1] - of_latest :]], dim=1)
        return result

    @classmethod
    def from_record(cls, record: dict, tensors: Mapping[str, Tensor]) -> "KeptRows":
        """The reverse of `to_record` and `tensors`: to be put in place by `on`, as a file's rooms may be any."""
        rooms = [LayerRoom(**room) for room in record["rooms"]]
        packed = {name: tensors[name] for name in row_counts(record)}
        return cls(rooms, record["seen"], record["held"], list(record["head"]), packed=packed)


def row_names(layer: int) -> tuple[str, str]:
    """What a file calls a layer's kept keys and values."""
    return f"kept_keys_{layer}", f"kept_values_{layer}"


def row_counts(record: dict) -> dict[str, tuple[int, int]]:
    """Per tensor in a file how many rows it has of the text's first inputs and of the latest; those without any have none."""
    counts = {}
    for layer, room in enumerate(record["rooms"]):
        first = min(room["first"], record["seen"]) if record["held"] else 0
        latest = min(room["latest"], record["held"])
        if first + latest:
            counts.update(dict.fromkeys(row_names(layer), (first, latest)))
    return counts


def _put_first(target: Tensor, rows: Sequence[Tensor], seen: int) -> None:
    """Into target [g, H, first, D] what of rows, g of [H, n, D] that follow on `seen` inputs, belongs there."""
    count = min(target.shape[2] - seen, rows[0].shape[1])
    if count > 0:
        torch._foreach_copy_(list(target[:, :, seen : seen + count]), [row[:, :count] for row in rows])


def _shift_in(target: Tensor, rows: Sequence[Tensor]) -> None:
    """Moves target [g, H, latest, D] on by rows, g of [H, n, D]."""
    room, count = target.shape[2], min(target.shape[2], rows[0].shape[1])
    if not count:
        return
    if count < room:
        target[:, :, : room - count] = target[:, :, count:].clone()
    torch._foreach_copy_(list(target[:, :, room - count :]), [row[:, rows[0].shape[1] - count :] for row in rows])
