"""How a host's cached keys turn with the position: found from its own rotary modules, and compared before it is relied on.

A rotary host turns pairs of a key's numbers by angles that grow with the position. A key that was cached for one position is
made into that of another one by turning it further by the difference.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from .cache_names import cache_argument
from .context_cache import one_forward
from .kept_cache import KeptCache
from .probe.agreement import rounding, rounds_whole_texts
from .probe.undisturbed import undisturbed
from .window_reading import misfit, tolerance

_TOKENS, _SHIFT = 6, 5  # what is compared: so many tokens at two places
_KEPT = 4  # of these, whose rows are kept in another comparison


class Rotary:
    """A host's rotary module: the angles of positions."""

    def __init__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]):
        """args, kwargs: those of a call, of which the integer tensor holds positions"""
        self.module, self.args, self.kwargs = module, args, kwargs

    @torch.no_grad()
    def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [n, pairs] of positions [n], float32 or more whatever the host's dtype."""

        def replaced(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            if value.is_floating_point():
                return torch.empty(0, dtype=torch.promote_types(value.dtype, torch.float32), device=value.device)
            return positions[None].to(value.device)

        kwargs = {name: replaced(value) for name, value in self.kwargs.items()}
        cos, sin = self.module(*map(replaced, self.args), **kwargs)
        pairs = cos.shape[-1] // 2  # both halves hold the same
        return cos[0, :, :pairs], sin[0, :, :pairs]


class LayerTurning(NamedTuple):
    """How one layer's keys turn. rotary: its number; interleaved: whether pairs are neighbours, not a half apart."""

    rotary: int
    interleaved: bool


def turned(keys: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """keys [..., n, D] turned by the angles of cos and sin [n, pairs], computed as these, in the keys' dtype."""
    pairs = cos.shape[-1]
    part, rest = keys.to(cos.dtype)[..., : 2 * pairs], keys[..., 2 * pairs :]
    one, two = (part[..., ::2], part[..., 1::2]) if interleaved else (part[..., :pairs], part[..., pairs:])
    halves = one * cos - two * sin, two * cos + one * sin
    part = torch.stack(halves, -1).flatten(-2) if interleaved else torch.cat(halves, -1)
    return torch.cat([part.to(keys.dtype), rest], -1)


@dataclass(frozen=True)
class KeyTurning:
    """How the keys of each layer of a host turn.

    rotaries: its rotary modules, as they are called
    layers: one per layer of the KV cache; None: its keys are the same at every position
    like: per layer a few of its keys and of its values [H, n, D], for their shapes, dtypes and devices
    """

    rotaries: list[Rotary]
    layers: list[LayerTurning | None]
    like: list[Tensor]

    def angles(self, rotary: int, old: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [n, pairs] of the turn that brings keys from positions old [n] to positions new [n]."""
        (cos_old, sin_old), (cos_new, sin_new) = (self.rotaries[rotary](positions) for positions in (old, new))
        scale = cos_old.square() + sin_old.square()  # some hosts lengthen keys too, wherever they stand
        return (cos_new * cos_old + sin_new * sin_old) / scale, (sin_new * cos_old - cos_new * sin_old) / scale


# ---- finding it ------------------------------------------------------------------------------------------------
class _Recorder:
    """What rotary modules returned, and what each layer's attention was given, while the block runs."""

    def __init__(self, model: Any):
        self.model = model
        self.calls: list[tuple[Rotary, Any]] = []
        self.given: dict[int, Any] = {}

    def _called(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        if isinstance(output, tuple) and len(output) == 2 and all(isinstance(part, Tensor) for part in output):
            self.calls.append((Rotary(module, args, kwargs), output))

    def _entered(self, module: Any, args: tuple, kwargs: dict) -> None:
        if isinstance(index := getattr(module, "layer_idx", None), int) and "position_embeddings" in kwargs:
            self.given.setdefault(index, kwargs["position_embeddings"])

    def __enter__(self) -> "_Recorder":
        self.handles = []
        for module in self.model.modules():
            self.handles.append(module.register_forward_pre_hook(self._entered, with_kwargs=True))
            if not any(module.children()) and not any(True for _ in module.parameters()):
                self.handles.append(module.register_forward_hook(self._called, with_kwargs=True))
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self.handles:
            handle.remove()

    def rotary_of(self, layer: int) -> int | None:
        """The number of the call whose angles a layer got."""
        given = self.given.get(layer)
        for number, (_, output) in enumerate(self.calls):
            if isinstance(given, tuple) and given[0] is output[0]:
                return number
        return None


def _read(model: Any, ids: Tensor, begin: int) -> tuple[Tensor, list[Tensor]]:
    """Logits [n, V] of tokens at positions from `begin` on, and each layer's keys and values [H, n, D]."""
    cache = KeptCache(model, ids.device, 0, [])
    positions = torch.arange(begin, begin + len(ids), device=ids.device)[None]
    logits = model(input_ids=ids[None], position_ids=positions, **cache_argument(model, cache), use_cache=True).logits[0]
    return logits, cache.left


def _read_behind(model: Any, ids: Tensor, rows: Sequence[Tensor], kept: int) -> Tensor:
    """Logits [n - kept, V] of the tokens ids [n] from the kept first ones on, over rows [H, n, D] of all of them."""
    cache = KeptCache(model, ids.device, kept, [part[:, :kept] for part in rows])
    positions = torch.arange(kept, len(ids), device=ids.device)[None]
    behind = cache_argument(model, cache)
    return model(input_ids=ids[None, kept:], position_ids=positions, **behind, use_cache=True).logits[0]


def _check_kept_rows(model: Any, ids: Tensor, logits: Tensor, rows: Sequence[Tensor]) -> None:
    """ValueError for a host that reads a text otherwise once its rows [H, n, D] are kept. logits: [n, V], read with them."""
    plain = one_forward(model, ids[:0], ids)
    for read, how in ((logits, "at given positions"), (_read_behind(model, ids, rows, _KEPT), "over kept keys and values")):
        error = misfit(read, plain[-len(read) :], ids[-len(read) :])
        if not error <= tolerance(plain, rounds_whole_texts(model)):
            raise ValueError(f"the logits of {type(model).__name__} {how} differ from its own by {error:.2g} of their spread")


def _layer_turning(rotary: int, cos: Tensor, sin: Tensor, keys: Tensor, elsewhere: Tensor) -> LayerTurning | None:
    """Which of the ways to turn by these angles brings keys elsewhere; LookupError if none does."""
    ways = [None, LayerTurning(rotary, False), LayerTurning(rotary, True)]
    found = [keys if way is None else turned(keys, cos, sin, way.interleaved) for way in ways]
    errors = [(found_there - elsewhere).float().norm().item() for found_there in found]
    eps = max(rounding(keys), torch.finfo(torch.float32).eps)  # angles are float32 in a float64 host too
    if not min(errors) <= 16 * eps * elsewhere.float().norm().item():
        raise LookupError
    return ways[errors.index(min(errors))]


def find_turning(model: Any, device: torch.device) -> KeyTurning:
    """How a host's keys turn, by a few tokens read at two places. ValueError, which says why, if not as a rotary host's.

    device: where token ids go. The host is left as it was.
    """
    name = type(model).__name__
    vocabulary = min(model.config.get_text_config(decoder=True).vocab_size, model.get_input_embeddings().weight.shape[0])
    ids = torch.tensor([(7 * i + 3) % vocabulary for i in range(_TOKENS)], device=device)
    with undisturbed(model), torch.no_grad():
        with _Recorder(model) as recorder:
            logits, rows = _read(model, ids, 0)
        if missing := [layer for layer in range(len(rows) // 2) if recorder.rotary_of(layer) is None]:
            raise ValueError(
                f"{name} does not turn the keys of layer {missing[0]} by rotary positions; learned ones end with their table"
            )
        _check_kept_rows(model, ids, logits, rows)
        logits_elsewhere, elsewhere = _read(model, ids, _SHIFT)
        error = misfit(logits_elsewhere, logits, ids)
        if not error <= tolerance(logits, rounds_whole_texts(model)):
            raise ValueError(f"the logits of {name} change with the place where a text begins, by {error:.2g} of their spread")
        turning = KeyTurning([rotary for rotary, _ in recorder.calls], [], rows)
        old = torch.arange(_TOKENS, device=device)
        for layer, (here, there) in enumerate(zip(rows[::2], elsewhere[::2], strict=True)):
            rotary = recorder.rotary_of(layer)
            assert rotary is not None, "missing ones are refused above"
            cos, sin = (part.to(here.device) for part in turning.angles(rotary, old, old + _SHIFT))
            try:
                found = _layer_turning(rotary, cos, sin, here, there)
            except LookupError:
                raise ValueError(f"the cached keys of layer {layer} of {name} do not turn with their positions") from None
            turning.layers.append(found)
    return turning


def reaches(model: Any) -> Sequence[int | None]:
    """Per layer of the KV cache how many tokens its attention sees, None: all. ValueError for caches of other kinds."""
    cache = DynamicCache(config=model.config)
    config = model.config.get_text_config(decoder=True)
    kinds = [type(layer).__name__ for layer in cache.layers]
    if unknown := set(kinds) - {"DynamicLayer", "DynamicSlidingWindowLayer"} or vars(config).get("attention_chunk_size"):
        raise ValueError(
            f"{type(model).__name__} keeps more than the keys and values of attention over the latest tokens ({unknown})"
        )
    return [getattr(layer, "sliding_window", None) for layer in cache.layers]
