"""What of a host runs through kernels of ours: each piece is built, and compared with what the host itself computed.

One recorded forward over the text's first tokens gives every piece what it takes in and what it has to give.
"""

from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from locas_ext.hosts.context_cache import holds_keys_and_values_only
from locas_ext.hosts.probe.recording import Call, Recording, record
from locas_ext.hosts.registry import Host
from locas_ext.hosts.split import is_split, style_of
from locas_ext.ops.ranks import Ranks

from .agreement import agree, distance
from .attend import obstacle
from .attention import FastAttention, fast_attention
from .binding import Piece, why_not_bound
from .layers import FastLayer, FinalNorm, attention_of, chain
from .loss import HeadLoss, head_loss
from .norms import FastNorm, fast_norm
from .split import SplitModule, split_head, split_modules
from .window_cache import WindowBuffers, WindowCache

TOKENS = 16  # of the text's, for the recorded forward


@dataclass
class Found:
    """The pieces of a host.

    ranks: the processes that the host is split among
    split: of such a host the modules that are split, but for those of its FFNs
    own: by piece why the host's own code runs it
    settled: how much of a window's reading is ours: kernels.Settled by kernels.Kind
    """

    ranks: Ranks | None = None
    split: list[SplitModule] = field(default_factory=list)
    norms: dict[nn.Module, FastNorm] = field(default_factory=dict)
    layers: list[FastLayer | None] = field(default_factory=list)
    final: FinalNorm | None = None
    attentions: list[FastAttention] = field(default_factory=list)  # of all layers, or none
    head: HeadLoss | None = None
    own: dict[str, str] = field(default_factory=dict)
    settled: dict[Any, Any] = field(default_factory=dict)

    def holds(self) -> bool:
        """Whether every piece may still stand in for the host's own."""
        heads = [] if self.head is None else [self.head.head]
        split = [part.module for part in self.split]
        modules = [layer.layer for layer in self.layers if layer is not None] + [part.module for part in self.attentions]
        modules += [*self.norms, *(head for head in heads if style_of(head) is None)]
        weights = (parameter for module in (*self.norms, *heads, *split) for parameter in module.parameters())
        return (
            all(why_not_bound(module) is None for module in modules)
            and all(style_of(module) is not None for module in split)
            and not any(weight.requires_grad for weight in weights)
        )

    def pieces(self) -> list[Piece]:
        """Norms, and the layers that add their residuals to them; what is split."""
        pieces = [Piece(part.module, part.forward) for part in self.split]
        pieces += [Piece(module, norm.forward) for module, norm in self.norms.items()]
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


def _compare(ours: Tensor, own: Tensor, ranks: Ranks | None) -> None:
    """ValueError where they differ, on this process or on another one that the host is split among."""
    same = agree(ours, own)
    if ranks is not None and not ranks.all(same) and same:
        raise ValueError("on another process the kernels' result is not the host's own")
    if not same:
        raise ValueError(f"the kernels' result is {distance(ours, own):.2g} of its length away from the host's own")


def _attention(module: Any, recording: Recording, cache: DynamicCache, ranks: Ranks | None) -> FastAttention:
    """ValueError, which says why, for an attention that the kernels do not compute."""
    call, problem = _one_call(recording, module), None
    turns = call.kwargs.get("position_embeddings")
    for interleaved in (False,) if turns is None else (False, True):
        fast = fast_attention(module, interleaved)
        try:
            _check_attention(fast, call, turns, cache, ranks)
            return fast
        except ValueError as why:
            problem = problem or why
    assert problem is not None
    raise problem


def _check_attention(
    fast: FastAttention, call: Call, turns: tuple[Tensor, Tensor] | None, cache: DynamicCache, ranks: Ranks | None
) -> None:
    """ValueError where it cannot run, or does not give what the host's own gave.

    Keys and values are compared too: the attention of a host whose scores are nearly equal hardly shows how it turns them.
    """
    own: Any = cache.layers[fast.layer]
    if (why := obstacle(fast.heads, own.keys)) is not None:  # not by the weights, which may be packed
        raise ValueError(why)
    buffers = WindowBuffers(call.input.shape[1])
    out = fast.over(call.input, turns, WindowCache(buffers, None))
    for ours, theirs in zip(buffers.layers[fast.layer], (own.keys, own.values), strict=True):
        _compare(ours, theirs[0].transpose(0, 1), ranks)
    _compare(out, call.result, ranks)


def _layer(layer: Any, found: Found, recording: Recording) -> FastLayer:
    """ValueError, which says why, for a layer that is not built as it would have to be."""
    call, fast = _one_call(recording, layer), FastLayer(layer, found.norms)
    if not isinstance(call.output, Tensor):
        raise ValueError("it gives more than hidden states")
    attention = _one_call(recording, attention_of(layer))

    def recorded(x: Tensor) -> Tensor:
        _compare(x, attention.input, found.ranks)
        return attention.result

    _compare(fast.over(call.input, recorded), call.result, found.ranks)
    return fast


def _find_layers(found: Found, layers: list[Any], recording: Recording) -> None:
    for index, layer in enumerate(layers):
        try:
            found.layers.append(_layer(layer, found, recording))
        except ValueError as why:
            found.layers.append(None)
            found.own.setdefault("residuals", f"layer {index}: {why}")


def _attentions(layers: list[nn.Module]) -> list[nn.Module]:
    """Those of the layers that have one by a known name."""
    found = []
    for layer in layers:
        with suppress(ValueError):
            found.append(attention_of(layer))
    return found


def _find_attentions(found: Found, layers: list[Any], recording: Recording, cache: DynamicCache) -> None:
    for index, layer in enumerate(layers):
        try:
            found.attentions.append(_attention(attention_of(layer), recording, cache, found.ranks))
        except ValueError as why:
            found.own["attention"] = f"layer {index}: {why}"
            found.attentions.clear()
            return


def _final_norm(decoder: nn.Module) -> nn.Module | None:
    """The norm behind the last layer."""
    modules = (decoder._modules.get(name) for name in ("norm", "final_layer_norm", "final_layernorm", "ln_f"))
    return next((module for module in modules if module is not None), None)


def _find_final(found: Found, model: Any, recording: Recording, ids: Tensor) -> None:
    decoder = model.get_decoder()
    norm = _final_norm(decoder)
    if norm in found.norms:
        found.final = FinalNorm(found.norms[norm])
    try:
        hidden = _one_call(recording, decoder).output.last_hidden_state
        found.head = head_loss(model, hidden[0, :-1], recording.logits[0, :-1], ids[1:], found.ranks)
    except (ValueError, AttributeError) as why:
        found.own["loss"] = str(why)


def _split(host: Host) -> list[SplitModule]:
    """What stands in for the split modules of a host; those of its FFNs are the memory's affair."""
    if host.ranks is None:
        return []
    decoder = host.model.get_decoder()
    inside = {projection for ffn in host.ffns.values() for projection in ffn.projections()}
    found = [part for part in split_modules(decoder.modules(), host.ranks) if part.module not in inside]
    return found + split_head(host.model.get_output_embeddings(), host.ranks)


def _find_split(found: Found, host: Host, recording: Recording) -> None:
    """Leaves out those that do not give what the host's own gave."""
    parts, found.split = found.split, []
    for part in parts:
        try:
            call = _one_call(recording, part.module)
            _compare(part.forward(call.input), call.result, found.ranks)
            found.split.append(part)
        except ValueError as why:
            found.own.setdefault("split modules", f"{type(part).__name__}: {why}")
    known = {part.module for part in found.split}.union(*(ffn.projections() for ffn in host.ffns.values()))
    for name, module in host.model.named_modules() if host.ranks is not None else ():
        if module not in known and any(map(is_split, module._parameters.values())):
            found.own.setdefault("split modules", f"{name} is split in a way that is not known")


@torch.no_grad()
def find(host: Host, ids: Tensor) -> Found:
    """ids: [n], the text's first tokens, at least 2, on the device of the model's embedding."""
    found, model = Found(ranks=host.ranks, split=_split(host)), host.model
    layers = host.layers()
    found.norms = {module: fast for module in model.get_decoder().modules() if (fast := fast_norm(module)) is not None}
    if not found.norms:
        found.own["norms"] = "it has no plain norm"
    cache = DynamicCache() if holds_keys_and_values_only(model) else DynamicCache(config=model.config)
    split = [part.module for part in found.split]
    recording = record(model, ids[None], [model.get_decoder(), *layers, *_attentions(layers), *split], cache)
    _find_split(found, host, recording)
    _find_layers(found, layers, recording)
    _find_attentions(found, layers, recording, cache)
    _find_final(found, model, recording, ids)
    chain(found.layers, found.final)
    return found
