"""Lengths at which a host reads a text in another way than a shorter one, as its config states them."""

from dataclasses import dataclass

# What configs call the reach of attention that does not see everything before it.
_REACHES = (
    "sliding_window",
    "sliding_window_size",
    "attention_chunk_size",
    "attention_window_size",
    "window_size",
    "keep_window_size",
    "index_topk",
    "indexer_budget",
)


@dataclass(frozen=True)
class Lengths:
    """Token counts, each the longest text before something changes.

    rotary: beyond this many tokens every position turns by other frequencies (longrope)
    growing: beyond this many they turn by frequencies of each length's own (dynamic NTK)
    reaches: beyond this many some attention no longer sees the first tokens (sliding windows, chunks)
    """

    rotary: tuple[int, ...] = ()
    growing: tuple[int, ...] = ()
    reaches: tuple[int, ...] = ()

    @property
    def all(self) -> tuple[int, ...]:
        return self.rotary + self.growing + self.reaches

    def divides(self, context: int, tokens: int) -> int | None:
        """The length that keeps a context from being read before the rest of its window of so many tokens, or None."""
        for length in self.growing:
            if tokens > length:
                return length
        for length in self.rotary:
            if context <= length < tokens:
                return length
        return None


def _rope_dicts(values: dict) -> list[dict]:
    """The rotary settings of a config: one for all layers, or one per layer type."""
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    nested = [entry for entry in rope.values() if isinstance(entry, dict)]
    return nested or [rope]


def lengths_of(config) -> Lengths:
    """The lengths in a model's config."""
    values = vars(config.get_text_config(decoder=True))  # not getattr, which raises where the layers differ
    positions, rotary, growing = values.get("max_position_embeddings"), [], []
    for rope in _rope_dicts(values):
        kind = str(rope.get("rope_type", rope.get("type", "default")))
        original = values.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings") or positions
        if kind == "longrope":
            rotary.append(original)
        elif "dynamic" in kind:
            growing.append(positions)
    reaches = [value for name in _REACHES if isinstance(value := values.get(name), int) and value > 0]
    return Lengths(*(tuple(sorted({n for n in found if isinstance(n, int)})) for found in (rotary, growing, reaches)))
