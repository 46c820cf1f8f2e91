"""The keys and values that a run keeps of the inputs it has read: the text's first ones, and the latest ones."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

from locas_ext.ops.ranks import Ranks


@dataclass(frozen=True)
class LayerRoom:
    """How many rows of a layer are kept: of the text's first inputs, and of the latest."""

    first: int
    latest: int


@dataclass(frozen=True)
class WindowRoom:
    """How many rows a window has: before its inputs, and for these, at most."""

    before: int
    inputs: int


@dataclass
class RowGroup:
    """Tensors of one shape on one device: members are their numbers; row i of each is member i's.

          window [g, rows, H, D] -> | ...... | context ............... | inputs ...... |
                                             before - context          before

    first: [g, first, H, D], of the text's first inputs, as they were computed
    covered: [g, first, H, D], the window's rows in whose place the first ones stand
    """

    members: list[int]
    room: LayerRoom
    first: Tensor
    window: Tensor
    covered: Tensor


def _groups(rooms: Sequence[LayerRoom], like: Sequence[Tensor], window: WindowRoom) -> list[RowGroup]:
    """Empty groups for tensors such as these: rows [H, n, D], two per layer.

    Zeros: what a mask hides is still multiplied by 0, which NaN would survive.
    """
    members: dict[tuple, list[int]] = {}
    for number, tensor in enumerate(like):
        heads, _, size = tensor.shape
        members.setdefault((rooms[number // 2], heads, size, tensor.dtype, tensor.device), []).append(number)

    def zeros(count: int, rows: int, heads: int, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.zeros(count, rows, heads, size, dtype=dtype, device=device)

    return [
        RowGroup(
            numbers,
            room,
            zeros(len(numbers), room.first, *form),
            zeros(len(numbers), window.before + window.inputs, *form),
            zeros(len(numbers), room.first, *form),
        )
        for (room, *form), numbers in members.items()
    ]


@dataclass
class KeptRows:
    """Tensors are numbered layer by layer, keys before values: 2 * layer, 2 * layer + 1. They stay where they are.

    rooms: one per layer
    seen: how many inputs were read
    held: of how many of the latest of them the rows are held, by layers with room for so many; 0: nothing here is needed
    head: the tokens of the text's first inputs, as many as any layer keeps rows of
    window: of the groups
    groups: made by `on`
    covering: the context before which the first rows stand; None: they stand nowhere
    packed: what a file held, until it is put in place; None: nothing
    ranks: the processes that the heads are split among, in equal parts; None: all are here
    """

    rooms: list[LayerRoom]
    seen: int = 0
    held: int = 0
    head: list[int] = field(default_factory=list)
    window: WindowRoom | None = None
    groups: list[RowGroup] = field(default_factory=list, repr=False)
    covering: int | None = None
    packed: dict[str, Tensor] | None = field(default=None, repr=False)
    ranks: Ranks | None = field(default=None, repr=False)

    @property
    def first(self) -> int:
        """How many of the text's first inputs are kept at most."""
        return max(room.first for room in self.rooms)

    @property
    def before(self) -> int:
        """The row of a window's first input."""
        assert self.window is not None, "placed by `on`"
        return self.window.before

    # ---- rows in a window ------------------------------------------------------------------------------------
    def layers(self, begin: int, end: int) -> list[Tensor]:
        """The window's rows [begin, end) of each tensor, [n, H, D]."""
        return [group.window[place, begin:end] for group, place in self._places()]

    @torch.no_grad()
    def cover(self, context: int, first: Sequence[Tensor]) -> None:
        """Puts rows of the text's first inputs at the beginning of a context, until `uncover`.

        first: [g, first, H, D], one per group
        """
        assert self.covering is None
        begin = self.before - context
        for group, rows in zip(self.groups, first, strict=True):
            place = group.window[:, begin : begin + group.room.first]
            group.covered.copy_(place)
            place.copy_(rows)
        self.covering = context

    @torch.no_grad()
    def uncover(self) -> None:
        """Puts back what the first rows stand in the place of, if they do."""
        if self.covering is None:
            return
        begin = self.before - self.covering
        for group in self.groups:
            group.window[:, begin : begin + group.room.first] = group.covered
        self.covering = None

    @torch.no_grad()
    def put(self, rows: Sequence[Tensor], begin: int) -> None:
        """Puts rows [H, n, D], one tensor per number, into the window from row `begin` on."""
        for group in self.groups:
            new = [rows[number].transpose(0, 1) for number in group.members]
            torch._foreach_copy_(list(group.window[:, begin : begin + len(new[0])]), new)

    @torch.no_grad()
    def append(self, count: int) -> None:
        """Keeps the rows of the window's `count` inputs."""
        self.uncover()
        before = self.before
        for group in self.groups:
            inputs = group.window[:, before : before + count]
            if (fresh := min(group.room.first - self.seen, count)) > 0:
                group.first[:, self.seen : self.seen + fresh] = inputs[:, :fresh]
            _move(group.window, before - (group.room.first + group.room.latest), before, count)
        self.seen += count
        self.held += count

    @torch.no_grad()
    def replace(self, first: Sequence[Tensor], latest: Sequence[Tensor]) -> None:
        """Puts other rows in the place of those held: first and latest [H, n, D], one tensor per number."""
        self.uncover()
        for group in self.groups:
            for place, number in enumerate(group.members):
                beginning = first[number][:, : group.room.first].transpose(0, 1)
                group.first[place, : len(beginning)] = beginning
        self.held = latest[0].shape[1]
        self.put(latest, self.before - self.held)

    def forget(self) -> None:
        """Lets go of all rows, where the window is read anew next."""
        self.held = 0

    def on(self, like: Sequence[Tensor], window: WindowRoom, ranks: Ranks | None = None) -> "KeptRows":
        """These where tensors `like`, one per number, are and in their dtypes; itself where they lie there.

        ranks: the processes that the heads of `like` are split among

        ValueError for rows of other shapes.
        """
        form = lambda tensor, heads: (tensor.device, tensor.dtype, tensor.shape[heads], tensor.shape[-1])
        here = [form(group.window[place], 1) for group, place in self._places()]
        if self.window == window and here == [form(tensor, 0) for tensor in like]:
            return self
        packed, counts = self._rows() if self.packed is None else self.packed, row_counts(self.to_record())
        if self.packed is not None and ranks is not None:
            packed = {name: ranks.mine(rows, 0) for name, rows in packed.items()}
        groups = _groups(self.rooms, like, window)
        moved = KeptRows(self.rooms, self.seen, self.held, list(self.head), window, groups, ranks=ranks)
        for number, (group, place) in enumerate(moved._places()):
            if (name := row_names(number // 2)[number % 2]) not in counts:
                continue
            of_first, of_latest = counts[name]
            heads, _, size = packed[name].shape
            if (heads, size) != tuple(group.window.shape[2:]):
                raise ValueError(f"{name} is {list(packed[name].shape)}; expected heads and size of {list(like[number].shape)}")
            rows = packed[name].transpose(0, 1)
            group.first[place, :of_first] = rows[:of_first]
            group.window[place, window.before - of_latest : window.before] = rows[of_first:]
            if self.seen <= window.before:  # nothing has moved: they also stand where they were computed
                group.window[place, window.before - self.seen :][:of_first] = rows[:of_first]
        return moved

    def _places(self) -> Iterator[tuple[RowGroup, int]]:
        """Each tensor's group, and which of its members it is; nothing before `on`."""
        places = {number: (group, place) for group in self.groups for place, number in enumerate(group.members)}
        return (places[number] for number in sorted(places))

    # ---- in a file -------------------------------------------------------------------------------------------
    def to_record(self) -> dict:
        """All but the rows, JSON-ready."""
        rooms = [asdict(room) for room in self.rooms]
        return {"seen": self.seen, "held": self.held, "head": list(self.head), "rooms": rooms}

    def tensors(self) -> dict[str, Tensor]:
        """The rows that are needed, [H, n, D]: of the text's first inputs, then of the latest; only those there are.

        Of all heads: called by all processes that have some.
        """
        if self.packed is not None:
            return self.packed
        rows = self._rows()
        return rows if self.ranks is None else {name: self.ranks.gathered(tensor, 0) for name, tensor in rows.items()}

    def _rows(self) -> dict[str, Tensor]:
        """The same of the heads that are here."""
        self.uncover()
        counts = row_counts(self.to_record())
        result = {}
        for number, (group, place) in enumerate(self._places()):
            if (name := row_names(number // 2)[number % 2]) in counts:
                of_first, of_latest = counts[name]
                latest = group.window[place, self.before - of_latest : self.before]
                result[name] = torch.cat([group.first[place, :of_first], latest]).transpose(0, 1).contiguous()
        return result

    @classmethod
    def from_record(cls, record: dict, tensors: Mapping[str, Tensor]) -> "KeptRows":
        """The reverse of `to_record` and `tensors`: to be put in place by `on`, as a file's rooms may be any."""
        rooms = [LayerRoom(**room) for room in record["rooms"]]
        packed = {name: tensors[name] for name in row_counts(record)}
        return cls(rooms, record["seen"], record["held"], list(record["head"]), packed=packed)


def _move(window: Tensor, begin: int, end: int, count: int) -> None:
    """Moves what lies `count` rows behind window [g, rows, H, D]'s rows [begin, end) into these."""
    if 8 * count < end - begin:  # many copies of a few rows would take longer than one more copy of all
        window[:, begin:end] = window[:, begin + count : end + count].clone()
        return
    for start in range(begin, end, count):  # parts that do not overlap with where they come from
        stop = min(start + count, end)
        window[:, start:stop] = window[:, start + count : stop + count]


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
