"""A decoder layer whose residuals are added by the kernel that norms their sum, across layers too.

x --norm--> attention --[norm]--+ x --norm--> FFN --[norm]--+ --norm of the next layer-->
                                one kernel                  one kernel, whose norm the next layer uses
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

from torch import Tensor, nn

from .binding import why_not_bound
from .norms import FastNorm


class NormNames(NamedTuple):
    """Where a layer has its norms; None: nowhere."""

    before_attention: str | None
    after_attention: str | None
    before_ffn: str | None
    after_ffn: str | None


# By what tells them apart; the first that a layer has all of, and no other norm, is taken.
ARRANGEMENTS = (
    NormNames("input_layernorm", None, "post_attention_layernorm", None),  # Llama
    NormNames(
        "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"
    ),  # Gemma 2
    NormNames("input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm"),  # GLM 4
    NormNames(None, "post_attention_layernorm", None, "post_feedforward_layernorm"),  # OLMo 2
)


class GivenNorm:
    """The norm of a layer's input, left by the layer before: (the input, its norm)."""

    def __init__(self) -> None:
        self.given: tuple[Tensor, Tensor] | None = None

    def take(self, x: Tensor) -> Tensor | None:
        """The norm of x where it was left, once."""
        given, self.given = self.given, None
        return given[1] if given is not None and given[0] is x else None


class FastLayer:
    """Stands in for the forward of one decoder layer."""

    def __init__(self, layer: Any, norms: dict[nn.Module, FastNorm]):
        """norms: the kernels of the layer's norms. ValueError, which says why, for a layer that is built otherwise."""
        self.layer = layer
        if (why := why_not_bound(layer)) is not None:
            raise ValueError(why)
        if not hasattr(layer, "self_attn") or not hasattr(layer, "mlp"):
            raise ValueError("it has no self_attn and mlp")
        if getattr(layer, "residual_multiplier", 1) != 1:
            raise ValueError("it scales its residual")
        present = {name for name, child in layer.named_children() if "norm" in name.lower()}
        names = next((a for a in ARRANGEMENTS if {name for name in a if name} == present), None)
        if names is None:
            raise ValueError(f"its norms are {', '.join(sorted(present)) or 'none'}")
        fast = [None if name is None else norms.get(getattr(layer, name)) for name in names]
        for name, norm in zip(names, fast, strict=True):
            if name is not None and norm is None:
                raise ValueError(f"its {name} is not a plain RMS norm")
        self.before_attention, self.after_attention, self.before_ffn, self.after_ffn = fast
        self.input_norm = GivenNorm()
        self.next_norm: FastNorm | None = None  # what reads this layer's output
        self.next_input: GivenNorm | None = None

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        return self.over(hidden_states, lambda x: self.layer.self_attn(hidden_states=x, **kwargs)[0])

    def over(self, x: Tensor, attention: Callable[[Tensor], Tensor]) -> Tensor:
        normed = self.input_norm.take(x)
        if normed is None:
            normed = x if self.before_attention is None else self.before_attention.forward(x)
        attended = attention(normed)
        if self.after_attention is not None:
            attended = self.after_attention.forward(attended)
        normed, x = _added(attended, x, self.before_ffn)
        added = self.layer.mlp(normed)
        if self.after_ffn is not None:
            added = self.after_ffn.forward(added)
        normed, x = _added(added, x, self.next_norm)
        if self.next_input is not None:
            self.next_input.given = (x, normed)
        return x


def _added(x: Tensor, residual: Tensor, norm: FastNorm | None) -> tuple[Tensor, Tensor]:
    """-> (the norm of x + residual, x + residual); without a norm the sum twice."""
    if norm is None:
        total = residual + x
        return total, total
    return norm.add(x, residual)


class FinalNorm:
    """Stands in for the norm behind the last layer, which that layer has already computed."""

    def __init__(self, norm: FastNorm):
        self.norm = norm
        self.input_norm = GivenNorm()

    def forward(self, x: Tensor) -> Tensor:
        given = self.input_norm.take(x)
        return self.norm.forward(x) if given is None else given


def chain(layers: list[FastLayer | None], final: FinalNorm | None) -> None:
    """Lets every layer compute the norm of the one behind it, where both are ours."""
    for layer, following in pairwise(layers):
        if layer is not None and following is not None and following.before_attention is not None:
            layer.next_norm, layer.next_input = following.before_attention, following.input_norm
    if final is not None and layers and (last := layers[-1]) is not None:
        last.next_norm, last.next_input = final.norm, final.input_norm
