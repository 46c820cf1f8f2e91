"""What of a host runs through kernels of ours: each piece is built, and compared with what the host itself computed.

One recorded forward over the text's first tokens gives every piece what it takes in and what it has to give.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from locas_ext.hosts.context_cache import holds_keys_and_values_only
from locas_ext.hosts.probe.recording import Recording, record

from .agreement import agree, distance
from .attention import FastAttention, fast_attention
from .binding import Piece, why_not_bound
from .layers import FastLayer, FinalNorm, chain
from .loss import HeadLoss, head_loss
from .norms import FastNorm, fast_norm
from .window_cache import WindowBuffers, WindowCache

TOKENS = 16  # of the text's, for the recorded forward


@dataclass
class Found:
    """The pieces of a host.

    own: by piece, or by kind of window, why the host's own code runs it
    levels: how much of a window's reading is ours: kernels.Level by kernels.Kind
    """

    norms: dict[nn.Module, FastNorm] = field(default_factory=dict)
    layers: list[FastLayer | None] = field(default_factory=list)
    final: FinalNorm | None = None
    attentions: list[FastAttention] = field(default_factory=list)  # of all layers, or none
    head: HeadLoss | None = None
    own: dict[str, str] = field(default_factory=dict)
    levels: dict[Any, int] = field(default_factory=dict)

    def holds(self) -> bool:
        """Whether every piece may still stand in for the host's own."""
        heads = () if self.head is None else (self.head.head,)
        modules = [layer.layer for layer in self.layers if layer is not None] + [part.module for part in self.attentions]
        weights = (parameter for module in (*self.norms, *heads) for parameter in module.parameters())
        return all(why_not_bound(module) is None for module in (*self.norms, *heads, *modules)) and not any(
            weight.requires_grad for weight in weights
        )

    def pieces(self) -> list[Piece]:
        """Norms, and the layers that add their residuals to them."""
        pieces = [Piece(module, norm.forward) for module, norm in self.norms.items()]
        if self.final is not None:
            final = self.final
            pieces = [piece for piece in pieces if piece.module is not final.norm.module]
            pieces.append(Piece(final.norm.module, final.forward))
        return pieces + [Piece(layer.layer, layer.forward) for layer in self.layers if layer is not None]

    def attention_pieces(self) -> list[Piece]:
        return [Piece(attention.module, attention.forward) for attention in self.attentions]


def _one_call(recording: Recording, module: nn.Module) -> Any:
    calls = recording.of(module)
    if len(calls) != 1:
        raise ValueError(f"it runs {len(calls)} times per forward")
    return calls[0]


def _compare(ours: Tensor, own: Tensor) -> None:
    if not agree(ours, own):
        raise ValueError(f"the kernels' result is {distance(ours, own):.2g} of its length away from the host's own")


def _attention(module: Any, recording: Recording, cache: DynamicCache) -> FastAttention:
    """ValueError, which says why, for an attention that the kernels do not compute.

    Keys and values are compared too: the attention of a host whose scores are nearly equal hardly shows how it turns them.
    """
    call, fast = _one_call(recording, module), fast_attention(module)
    n = call.input.shape[1]
    buffers = WindowBuffers(n)
    out = fast.over(call.input, call.kwargs.get("position_embeddings"), WindowCache(buffers, None))
    own = cache.layers[fast.layer]
    for ours, theirs in zip(buffers.layers[fast.layer], (own.keys, own.values), strict=True):
        _compare(ours, theirs[0].transpose(0, 1))
    _compare(out, call.result)
    return fast


def _layer(layer: Any, norms: dict[nn.Module, FastNorm], recording: Recording) -> FastLayer:
    """ValueError, which says why, for a layer that is not built as it would have to be."""
    call, fast = _one_call(recording, layer), FastLayer(layer, norms)
    attention = _one_call(recording, layer.self_attn)

    def recorded(x: Tensor) -> Tensor:
        _compare(x, attention.input)
        return attention.result

    _compare(fast.over(call.input, recorded), call.result)
    return fast


def _find_layers(found: Found, layers: list[Any], recording: Recording) -> None:
    for index, layer in enumerate(layers):
        try:
            found.layers.append(_layer(layer, found.norms, recording))
        except ValueError as why:
            found.layers.append(None)
            found.own.setdefault("residuals", f"layer {index}: {why}")


def _find_attentions(found: Found, layers: list[Any], recording: Recording, cache: DynamicCache) -> None:
    for index, layer in enumerate(layers):
        try:
            if not isinstance(getattr(layer, "self_attn", None), nn.Module):
                raise ValueError("it has no self_attn")
            found.attentions.append(_attention(layer.self_attn, recording, cache))
        except ValueError as why:
            found.own["attention"] = f"layer {index}: {why}"
            found.attentions.clear()
            return


def _find_final(found: Found, model: Any, decoder: Any, recording: Recording, ids: Tensor) -> None:
    norm = getattr(decoder, "norm", None)
    if isinstance(norm, nn.Module) and norm in found.norms:
        found.final = FinalNorm(found.norms[norm])
    try:
        if norm is None:
            raise ValueError("its decoder has no norm behind the last layer")
        hidden = _one_call(recording, norm).result
        found.head = head_loss(model, hidden[0, :-1], recording.logits[0, :-1], ids[1:])
    except ValueError as why:
        found.own["loss"] = str(why)


@torch.no_grad()
def find(model: Any, ids: Tensor) -> Found:
    """ids: [n], the text's first tokens, at least 2, on the device of the model's embedding."""
    found, decoder = Found(), model.get_decoder()
    layers = list(getattr(decoder, "layers", ()))
    found.norms = {module: fast for module in decoder.modules() if (fast := fast_norm(module)) is not None}
    if not found.norms:
        found.own["norms"] = "it has no plain RMS norm"
    watched = [module for layer in layers for module in (layer, getattr(layer, "self_attn", None)) if module is not None]
    watched += [decoder.norm] if isinstance(getattr(decoder, "norm", None), nn.Module) else []
    cache = DynamicCache() if holds_keys_and_values_only(model) else DynamicCache(config=model.config)
    recording = record(model, ids[None], watched, cache)
    _find_layers(found, layers, recording)
    _find_attentions(found, layers, recording, cache)
    _find_final(found, model, decoder, recording, ids)
    chain(found.layers, found.final)
    return found
