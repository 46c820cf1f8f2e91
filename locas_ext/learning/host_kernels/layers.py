"""A decoder layer whose residuals are added by the kernel that norms their sum, across layers too.

one after the other:  x --norm--> attention --[norm]--+ x --norm--> FFN --[norm]--+ --norm of the next layer-->
                                                      one kernel                  one kernel, whose norm the next layer uses
side by side:         x --norm--> attention --+
                      x --norm--> FFN --------+-- + x --norm of the next layer-->
"""

import inspect
from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

from torch import Tensor, nn

from .binding import why_not_bound
from .norms import FastNorm


class LayerParts(NamedTuple):
    """Where a layer has its attention and its norms; None: nowhere."""

    attention: str
    before_attention: str | None
    after_attention: str | None
    before_ffn: str | None
    after_ffn: str | None

    @property
    def norms(self) -> tuple[str | None, ...]:
        return self[1:]


# By what tells them apart; the first that a layer has all of, and no other norm, is taken.
ARRANGEMENTS = (
    LayerParts("self_attn", "input_layernorm", None, "post_attention_layernorm", None),  # Llama
    LayerParts(
        "self_attn", "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"
    ),  # Gemma 2
    LayerParts(
        "self_attn", "input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm"
    ),  # GLM 4
    LayerParts("self_attn", None, "post_attention_layernorm", None, "post_feedforward_layernorm"),  # OLMo 2
    LayerParts("self_attn", "self_attn_layer_norm", None, "final_layer_norm", None),  # OPT
    LayerParts("attn", "ln_1", None, "ln_2", None),  # GPT-2
    LayerParts("attention", "input_layernorm", None, "post_attention_layernorm", None),  # GPT-NeoX
    LayerParts("self_attn", "input_layernorm", None, None, None),  # Phi: one norm for attention and FFN, side by side
)


def attention_of(layer: Any) -> Any:
    """A layer's attention module. ValueError where it has none by a known name."""
    for name in dict.fromkeys(parts.attention for parts in ARRANGEMENTS):
        if isinstance(attention := getattr(layer, name, None), nn.Module):
            return attention
    raise ValueError("it has no attention by a known name")


def _parts(layer: nn.Module) -> LayerParts:
    """ValueError, which says why, for a layer that has others."""
    children = {name for name, _ in layer.named_children()}
    norms = {name for name in children if "norm" in name.lower() or name.startswith("ln_")}
    for parts in ARRANGEMENTS:
        if parts.attention in children and {name for name in parts.norms if name} == norms:
            return parts
    raise ValueError(f"its norms are {', '.join(sorted(norms)) or 'none'}")


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
        if not getattr(layer, "do_layer_norm_before", True):
            raise ValueError("it norms behind its residuals")
        parts = _parts(layer)
        if not (
            isinstance(getattr(layer, "mlp", None), nn.Module)
            or all(hasattr(layer, name) for name in ("fc1", "activation_fn", "fc2"))
        ):
            raise ValueError("it has no FFN by a known name")
        fast = [None if name is None else norms.get(getattr(layer, name)) for name in parts.norms]
        for name, norm in zip(parts.norms, fast, strict=True):
            if name is not None and norm is None:
                raise ValueError(f"its {name} is not a plain norm")
        self.before_attention, self.after_attention, self.before_ffn, self.after_ffn = fast
        self.attention_name = parts.attention
        # GPT-NeoX has both ways, told apart by a setting.
        self.side_by_side: bool = getattr(layer, "use_parallel_residual", parts.before_ffn is None and parts.after_ffn is None)
        self.residual_multiplier: float = getattr(layer, "residual_multiplier", 1.0)  # Granite's
        self.argument_names = tuple(inspect.signature(layer.forward).parameters)[1:]
        self.input_norm = GivenNorm()
        self.next_norm: FastNorm | None = None  # what reads this layer's output
        self.next_input: GivenNorm | None = None

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        kwargs |= zip(self.argument_names, args, strict=False)
        attention = getattr(self.layer, self.attention_name)
        return self.over(hidden_states, lambda x: attention(hidden_states=x, **kwargs)[0])

    def over(self, x: Tensor, attention: Callable[[Tensor], Tensor]) -> Tensor:
        normed = self.input_norm.take(x)
        if normed is None:
            normed = x if self.before_attention is None else self.before_attention.forward(x)
        attended = attention(normed)
        if self.side_by_side:
            added = self._ffn(normed if self.before_ffn is None else self.before_ffn.forward(x)) + attended
        else:
            if self.after_attention is not None:
                attended = self.after_attention.forward(attended)
            normed, x = self._added(attended, x, self.before_ffn)
            added = self._ffn(normed)
            if self.after_ffn is not None:
                added = self.after_ffn.forward(added)
        normed, x = self._added(added, x, self.next_norm)
        if self.next_input is not None:
            self.next_input.given = (x, normed)
        return x

    def _added(self, x: Tensor, residual: Tensor, norm: FastNorm | None) -> tuple[Tensor, Tensor]:
        """-> (the norm of x + residual, x + residual); without a norm the sum twice."""
        if self.residual_multiplier != 1:
            x = x * self.residual_multiplier
        if norm is None:
            total = residual + x
            return total, total
        return norm.add(x, residual)

    def _ffn(self, x: Tensor) -> Tensor:
        layer = self.layer
        if hasattr(layer, "mlp"):
            return layer.mlp(x)
        return layer.fc2(layer.activation_fn(layer.fc1(x.reshape(-1, x.shape[-1])))).view(x.shape)  # OPT's, rows of tokens


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
