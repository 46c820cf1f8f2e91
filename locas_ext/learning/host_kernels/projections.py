"""How an attention module makes query, key and value of its input, and what it passes its result to."""

from typing import Any, NamedTuple

from torch import Tensor


class Layout(NamedTuple):
    """Names inside an attention module.

    inputs: three projections, or one whose columns are those of all heads of the query, then of the key, then of the value;
        by_head: or of each head in turn
    """

    inputs: tuple[str, ...]
    output: str
    by_head: bool = False


LAYOUTS = (
    Layout(("q_proj", "k_proj", "v_proj"), "o_proj"),  # Llama
    Layout(("q_proj", "k_proj", "v_proj"), "out_proj"),  # OPT
    Layout(("q_proj", "k_proj", "v_proj"), "dense"),  # Phi
    Layout(("qkv_proj",), "o_proj"),  # Phi-3
    Layout(("c_attn",), "c_proj"),  # GPT-2
    Layout(("query_key_value",), "dense", by_head=True),  # GPT-NeoX
)


class Projections:
    """The projections of one attention module, called as they are at the time: they may be replaced."""

    def __init__(self, module: Any, head_size: int, heads: int):
        """heads: of the query. ValueError for a module that has none of the known layouts."""
        self.module, self.head_size, self.heads = module, head_size, heads
        known = (layout for layout in LAYOUTS if all(hasattr(module, name) for name in (*layout.inputs, layout.output)))
        layout = next(known, None)
        if layout is None:
            raise ValueError("its projections have no known names")
        self.layout = layout

    def into(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query [n, H * D], key and value [n, G * D] of x [1, n, d]."""
        parts = [getattr(self.module, name)(x)[0] for name in self.layout.inputs]
        if len(parts) == 3:
            return parts[0], parts[1], parts[2]
        (joined,) = parts
        if self.layout.by_head:
            query, key, value = joined.view(len(joined), -1, 3, self.head_size).unbind(2)
            return query.flatten(1), key.flatten(1), value.flatten(1)
        queries = self.heads * self.head_size
        groups = (joined.shape[-1] - queries) // 2
        query, key, value = joined.split([queries, groups, groups], dim=-1)
        return query, key, value

    def out(self, attended: Tensor) -> Tensor:
        """[n, H * D] -> [1, n, d]"""
        return getattr(self.module, self.layout.output)(attended[None])
