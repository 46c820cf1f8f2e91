"""A text's kept context: what of it stands before the next chunk, and the chunk's forward over it.

        0 .. sinks-1 | ........ | b + sinks .......... s-2 | s-1 ......... e-2          inputs; b = max(0, e - W)
        first rows, turned to   | latest rows, as they     | S positions, gradient
        b .. b + sinks - 1      | were computed            | -> logits, and the rows that are kept of them

Inputs stand at their own places in the text. A layer whose attention slides keeps its own window and no first rows.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from locas_ext.errors import LocasError
from locas_ext.hosts.cache_names import cache_argument
from locas_ext.hosts.kept_cache import KeptCache
from locas_ext.hosts.key_turning import find_turning, reaches, turned
from locas_ext.hosts.lengths import lengths_of
from locas_ext.ops.ranks import Ranks
from locas_ext.state.kept_rows import KeptRows, LayerRoom, RowGroup, WindowRoom


def _rooms(model: Any, window: int, sinks: int) -> list[LayerRoom]:
    """What a window needs of each layer once it has moved. A reach of a whole window is none."""
    most = window - 2  # a chunk has at least one token, and the last one of a window is only a target
    return [
        LayerRoom(sinks, most - sinks) if reach is None or reach > most else LayerRoom(0, min(reach - 1, most))
        for reach in reaches(model)
    ]


def check_positions(model: Any, inputs: int) -> None:
    """ValueError for a host that turns positions otherwise in a text of so many inputs than in a shorter one."""
    lengths = lengths_of(model.config)
    kinds = [("longrope", length) for length in lengths.rotary] + [("dynamic scaling", length) for length in lengths.growing]
    for kind, length in kinds:
        if inputs > length:
            raise ValueError(
                f"context is 'keep', but the host's rotary positions have {kind}, which turns all of them otherwise in a "
                f"text of more than {length} tokens, and the text has {inputs}: kept keys would not fit; expected "
                "context='recompute'"
            )


class KeptContext:
    """Attributes:
    rows: what is kept
    context: how many of it stand before the next inputs
    inputs: how many these are
    left: the rows that the inputs read last left elsewhere than in the window; none: they lie there
    writes: as in ContextCache, for what is read anew
    """

    def __init__(self, model: Any, device: torch.device, window: int, sinks: int, inputs: int):
        """device: where token ids go; inputs: at most so many are read at once.

        ValueError for a host whose context cannot be kept.
        """
        try:
            rooms, self.turning = _rooms(model, window, sinks), find_turning(model, device)
        except ValueError as error:
            raise ValueError(f"context is 'keep', but {error}; expected context='recompute'") from None
        self.model, self.device = model, device
        self.room = WindowRoom(window - 2, inputs)  # a chunk has at least one token, and a window's last is only a target
        self.rows = KeptRows(rooms).on(self.turning.like, self.room)
        self.left: list[Tensor] = []
        self.writes: int | None = None
        self.begin = torch.zeros((), dtype=torch.int64, device=device)  # on the device: a CUDA graph reads it
        self.context = self.inputs = 0
        self.ahead: tuple[int, list[Tensor]] | None = None  # first rows, turned on by so many positions

    def share(self, ranks: Ranks) -> None:
        """Called by all processes that the host is split among, before anything is kept: whether each has heads of its own."""
        own = [rows.flatten().tolist() for rows in self.turning.like[:2]]
        self.rows.ranks = None if ranks.same(own) else ranks

    def resume(self, rows: KeptRows, seen: int) -> None:
        """Continues with rows that another run has kept. LocasError if they are not of this host, window and place."""
        try:
            if rows.rooms != self.rows.rooms or rows.seen != seen:
                raise ValueError(f"{rows.seen} inputs; expected {seen}, and rows for this host's layers and this window")
            self.rows = rows.on(self.turning.like, self.room, self.rows.ranks)
        except ValueError as error:
            raise LocasError(f"the kept context does not fit: {error}") from None
        self.ahead = None

    # ---- before a chunk --------------------------------------------------------------------------------------
    @torch.no_grad()
    def prepare(self, count: int) -> None:
        """Puts what stands before the next `count` inputs in its place."""
        rows = self.rows
        rows.uncover()
        self.context, self.inputs = min(rows.seen, self.room.before + 1 - count), count
        self.begin.fill_(rows.seen)
        if moved := rows.seen - self.context:
            if self.ahead is None or self.ahead[0] != moved:
                self.ahead = moved, self._all_turned(moved)
            rows.cover(self.context, self.ahead[1])

    @torch.no_grad()
    def look_ahead(self) -> None:
        """After `prepare`: turns the first rows to where they will stand before the next inputs, should these be as many."""
        if self.rows.seen > self.context:  # all of the first rows are there, and no chunk adds to them
            moved = self.rows.seen - self.context + self.inputs
            self.ahead = moved, self._all_turned(moved)

    def _all_turned(self, moved: int) -> list[Tensor]:
        return [self._turned(group, moved) for group in self.rows.groups]

    def _turned(self, group: RowGroup, moved: int) -> Tensor:
        """A group's first rows [g, first, H, D], their keys turned on by `moved` positions."""
        if not group.first.numel():
            return group.first
        ways: dict[Any, list[int]] = {}
        for place, number in enumerate(group.members):
            if number % 2 == 0 and (way := self.turning.layers[number // 2]) is not None:
                ways.setdefault(way, []).append(place)
        front = group.first.clone()
        old = torch.arange(group.room.first, device=self.device)
        for way, places in ways.items():
            cos, sin = (part.to(front.device)[:, None] for part in self.turning.angles(way.rotary, old, old + moved))
            if places == list(range(0, len(group.members), 2)):
                front[::2] = turned(front[::2], cos, sin, way.interleaved)  # all keys alike: no copies of them
                continue
            for place in places:
                front[place] = turned(front[place], cos, sin, way.interleaved)
        return front

    @torch.no_grad()
    def refresh(self, context: Tensor) -> None:
        """After `prepare`: reads the context anew, tokens [c], and the text's first inputs; with the memory as it is now."""
        latest = self._rows_of(context, self.rows.seen - self.context)
        first = self._rows_of(torch.tensor(self.rows.head, dtype=torch.int64), 0) if self.rows.head else latest
        self.rows.replace(first, latest)
        self.ahead = None

    def _rows_of(self, tokens: Tensor, begin: int) -> list[Tensor]:
        """The rows that tokens [n] leave at positions from `begin` on, with nothing before them."""
        tokens = tokens.to(self.device)
        cache = KeptCache(self.model, self.device, 0, [], self.writes)
        cache.fill(self.model, tokens[None], torch.arange(begin, begin + len(tokens), device=self.device)[None])
        return cache.left

    def put_before(self, token: int) -> None:
        """Reads a token that stands before the text."""
        inputs = torch.tensor([token])
        self.keep(inputs, self._rows_of(inputs, 0))

    # ---- a chunk ---------------------------------------------------------------------------------------------
    def behind(self) -> list[Tensor]:
        """Per tensor the rows [n, H, D] that stand before the inputs: of a layer that slides its latest ones."""
        rows, before = self.rows, self.room.before
        kept = [min(self.context, room.first + room.latest) for room in rows.rooms]
        assert max(kept) <= rows.held + rows.first, "rows are only let go of before they are read anew"
        return [layer[before - kept[number // 2] :] for number, layer in enumerate(rows.layers(0, before))]

    def positions(self, inputs: Tensor) -> Tensor:
        """Where the next inputs [n] stand in the text; after `prepare`."""
        return self.begin + torch.arange(len(inputs), device=self.device)

    def read(self, inputs: Tensor) -> Tensor:
        """The logits [n, V] of the next inputs [n], with a graph over these alone; after `prepare`."""
        cache = KeptCache(self.model, self.device, self.context, [rows.transpose(0, 1) for rows in self.behind()])
        logits = self.model(
            input_ids=inputs[None],
            position_ids=self.positions(inputs)[None],
            **cache_argument(self.model, cache),
            use_cache=True,
            return_dict=True,
        ).logits[0]
        self.left = cache.left
        return logits

    def keep(self, inputs: Tensor, left: Sequence[Tensor]) -> None:
        """Takes the rows that inputs [n] left. left: [H, n, D], one per tensor; none: they lie in the window"""
        rows = self.rows
        rows.head += inputs[: max(0, rows.first - rows.seen)].tolist()
        if left:
            rows.put(left, self.room.before)
        rows.append(len(inputs))
