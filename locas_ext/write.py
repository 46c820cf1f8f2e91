"""Closed-form writing of a Locas-MLP memory: one slot a token a layer, without training (docs/method.md, "Writing").

      tokens -> forward -> log-likelihood of the chosen ones -> backward, as far as the FFNs' outputs
                  |                                                 |
        A, the FFN's input where the token is predicted    G, the gradient there
                  |                                                 |
        key = A / ||A||                                    value = epsilon G / ||G||
"""

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .chunk import Window, chunk_logits
from .compress import compress_slots
from .errors import LocasError
from .ops import token_nll, write_slots_
from .patch import Attachment
from .slots import MemoryState
from .step import check_loss, loss_scale

if TYPE_CHECKING:
    from .online import Settings

WHEN_FULL = ("error", "drop_oldest", "compress")


@dataclass(frozen=True)
class WriteReport:
    """What a `Memory.write` call wrote.

    tokens: the positions in input_ids of the tokens that got a slot, ascending
    nll: their summed negative log-likelihood before, in nats
    gradient_norm: ||G|| of each, over all layers
    slots_used: how many slots each layer holds now
    """

    tokens: list[int]
    nll: float
    gradient_norm: list[float]
    slots_used: int


@dataclass(frozen=True)
class WriteSettings:
    """The arguments of `Memory.write` and `Memory.memorize` that decide what is written and where."""

    epsilon: float = 1e-2
    tokens: str | float | int | tuple[int, ...] = "all"
    capacity: int | None = None
    when_full: str | None = None
    compress_to: int | None = None


# ---- arguments ------------------------------------------------------------------------------------------------
def _positive_integer(name: str, value, at_most: float, why: str) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} is {value!r}; expected an integer, {why}")
    if not 1 <= value <= at_most:
        limit = ">= 1" if at_most == math.inf else f"from 1 to {at_most}"
        raise ValueError(f"{name} is {value}; expected an integer {limit}, {why}")
    return int(value)


def _resolve_tokens(tokens, text: int | None):
    """tokens as WriteSettings holds it; `text` is how many ids there are, None where positions mean nothing."""
    if tokens is None or (isinstance(tokens, str) and tokens == "all"):
        return "all"
    expected = "'all', a loss threshold (float), how many to take (int) or a sequence of positions"
    if isinstance(tokens, Tensor) and tokens.dim() == 1 and not tokens.is_floating_point() and tokens.dtype != torch.bool:
        tokens = tokens.tolist()
    if isinstance(tokens, (str, bytes, bool)) or not isinstance(tokens, (Sequence, numbers.Real)):
        raise TypeError(f"tokens is {tokens!r}; expected {expected}")
    if isinstance(tokens, numbers.Integral):
        return _positive_integer("tokens", tokens, math.inf, "the number of tokens to write")
    if isinstance(tokens, numbers.Real):
        if not math.isfinite(tokens):
            raise ValueError(f"tokens is {tokens}; expected a finite loss in nats")
        return float(tokens)
    if any(isinstance(t, bool) or not isinstance(t, numbers.Integral) for t in tokens):
        raise TypeError(f"tokens is {list(tokens)!r}; expected {expected}")
    if text is None:
        raise ValueError("tokens holds positions, which only write() takes; expected 'all', a float or an int")
    positions = sorted(int(t) for t in tokens)
    if not positions:
        raise ValueError("tokens is empty; expected at least one position")
    if positions[0] < 1 or positions[-1] >= text:
        wrong = positions[0] if positions[0] < 1 else positions[-1]
        raise ValueError(f"tokens holds {wrong}; expected positions from 1 to {text - 1}: the first token is never predicted")
    if len(set(positions)) != len(positions):
        raise ValueError(f"tokens names position {next(p for p in positions if positions.count(p) > 1)} twice")
    return tuple(positions)


def resolve(settings: WriteSettings, state: MemoryState, text: int | None) -> WriteSettings:
    """The settings with what follows from others filled in; ValueError or TypeError for one out of range."""
    epsilon = settings.epsilon
    if isinstance(epsilon, bool) or not isinstance(epsilon, numbers.Real):
        raise TypeError(f"epsilon is {epsilon!r}; expected a number > 0")
    largest = torch.finfo(torch.float32).max
    if not 0 < epsilon <= largest:
        raise ValueError(f"epsilon is {epsilon}; expected a number > 0, at most {largest:.3g}, as slots are float32")
    capacity, when_full, compress_to = settings.capacity, settings.when_full, settings.compress_to
    if when_full is None:
        when_full = "error" if compress_to is None else "compress"
    if when_full not in WHEN_FULL:
        raise ValueError(f"when_full is {when_full!r}; expected one of {', '.join(WHEN_FULL)}")
    if capacity is None and when_full != "error":
        raise ValueError(f"when_full is {when_full!r}, but capacity is None, so the memory grows and is never full")
    if capacity is not None:
        capacity = _positive_integer("capacity", capacity, math.inf, "slots a layer")
        if capacity < state.used:
            raise ValueError(f"capacity is {capacity}; expected at least {state.used}, the slots used, or compress() first")
    if when_full == "compress":
        if capacity < 2:
            raise ValueError(f"capacity is {capacity}; expected at least 2 with when_full='compress'")
        most = min(capacity - 1, state.hidden_size)
        why = "fewer than the capacity and no more than the hidden size"
        wanted = min(capacity // 2, most) if compress_to is None else compress_to
        compress_to = _positive_integer("compress_to", wanted, most, why)
    elif compress_to is not None:
        raise ValueError(f"compress_to is {compress_to}, but when_full is {when_full!r}; expected when_full='compress'")
    return WriteSettings(float(epsilon), _resolve_tokens(settings.tokens, text), capacity, when_full, compress_to)


# ---- room -----------------------------------------------------------------------------------------------------
def check_fits(count: int, settings: WriteSettings) -> None:
    """ValueError if `count` slots at once find no room even in a memory that was compressed or emptied for them."""
    kept = settings.compress_to if settings.when_full == "compress" else 0
    if kept + count > settings.capacity:
        beside = f" and compress_to {kept}" if kept else ""
        raise ValueError(
            f"up to {count} tokens are to be written at once, but capacity is {settings.capacity}{beside}; expected a "
            f"capacity of at least {kept + count}"
        )


def check_room(state: MemoryState, count: int, settings: WriteSettings) -> None:
    """ValueError if `count` more slots find no room, whatever may be done to make some."""
    if settings.capacity is None or state.used + count <= settings.capacity:
        return
    if settings.when_full == "error":
        raise ValueError(
            f"the memory is full: {state.used} of {settings.capacity} slots are used and {count} more tokens are to be "
            "written; pass a larger capacity, when_full='drop_oldest' or 'compress', or call compress() first"
        )
    check_fits(count, settings)


def _has_room(state: MemoryState, count: int, settings: WriteSettings) -> bool:
    """Whether `count` more slots fit as things are."""
    allowed = state.capacity if settings.capacity is None else min(state.capacity, settings.capacity)
    return state.used + count <= allowed


def _make_room(attachment: Attachment, count: int, settings: WriteSettings) -> None:
    state = attachment.state
    check_room(state, count, settings)
    needed = state.used + count
    if settings.capacity is not None and needed > settings.capacity:
        if settings.when_full == "compress":
            compress_slots(attachment, settings.compress_to)
        else:
            state.drop_oldest(needed - settings.capacity)
        needed = state.used + count
    if needed > state.capacity:
        doubled = 2 * state.capacity if settings.capacity is None else settings.capacity
        state.resize(max(needed, doubled))


# ---- what the text asks for -----------------------------------------------------------------------------------
class Asked(NamedTuple):
    """What one forward and backward found: for each chosen target its index [n], and per layer A and G [n, d]."""

    chosen: Tensor
    nll: Tensor  # [T], of all targets
    inputs: list[Tensor]
    gradients: list[Tensor]


class _Tap:
    """Keeps what goes into and out of one FFN in the forward that carries gradient."""

    input: Tensor
    output: Tensor

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return y
        self.input = x.detach()
        # Below the first FFN nothing needs a gradient: its output is where the graph begins.
        self.output = y if y.requires_grad else y.detach().requires_grad_()
        return self.output


def _choose(tokens, nll: Tensor) -> Tensor:
    """Indices [n] into the targets, ascending."""
    if isinstance(tokens, tuple):
        return torch.tensor(tokens, device=nll.device) - 1
    if isinstance(tokens, int):
        return nll.topk(min(tokens, len(nll))).indices.sort().values
    if isinstance(tokens, float):
        return (nll >= tokens).nonzero()[:, 0]
    return torch.arange(len(nll), device=nll.device)


def _ask(
    attachment: Attachment, window: Window, tokens, exact: bool, context_gradient: bool, ends_early: bool
) -> Asked:
    """One forward, and one backward to the FFNs' outputs (exact: one a token)."""
    taps = [_Tap() for _ in attachment.ffns]
    try:
        for ffn, tap in zip(attachment.ffns, taps):
            ffn.tap = tap
        # The tapped tensors must be nodes of the graph, which what a compiled forward returns of its inside is not.
        with torch.compiler.set_stance("force_eager"):
            logits = chunk_logits(attachment.host, window, context_gradient, ends_early)
    finally:
        for ffn in attachment.ffns:
            ffn.tap = None
    targets = window.targets.to(logits.device)
    if exact:  # token_nll gives its gradient once
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        nll = F.cross_entropy(logits, targets, reduction="none")
    else:
        nll = token_nll(logits, targets)
    chosen = _choose(tokens, nll.detach())
    outputs, scale = [tap.output for tap in taps], loss_scale(attachment.state)

    def rows(tensor: Tensor, indices: Tensor) -> Tensor:
        """Those of the targets' positions, of a tensor [..., d] over the window."""
        return tensor.reshape(-1, tensor.shape[-1])[-len(targets) :].index_select(0, indices.to(tensor.device))

    if exact:
        of_token = [
            [rows(g, index[None]) for g in torch.autograd.grad(-scale * nll[index], outputs, retain_graph=True)]
            for index in chosen
        ]
        gradients = [torch.cat(layer) for layer in zip(*of_token)]
    elif len(chosen):
        whole = torch.autograd.grad(-scale * nll[chosen].sum(), outputs)
        gradients = [rows(g, chosen) for g in whole]
    else:
        gradients = []
    return Asked(chosen, nll.detach(), [rows(tap.input, chosen) for tap in taps], gradients)


# ---- writing it -----------------------------------------------------------------------------------------------
def _stacked(layers: list[Tensor], positions: list[int], dtype: torch.dtype) -> Tensor:
    return torch.stack([layers[position] for position in positions]).to(dtype)


def _norm(layers: list[Tensor]) -> Tensor:
    """[n] float32: the length of each token's rows over all layers together, wherever they lie."""
    device = layers[0].device
    return torch.stack([rows.double().norm(dim=-1).to(device) for rows in layers]).norm(dim=0).float()


def append(attachment: Attachment, asked: Asked, settings: WriteSettings) -> Tensor:
    """Writes the slots behind those there are. Returns the gradient norms [n]. One update.

    LocasError, with nothing written, if an input or gradient is not finite.
    """
    state, count = attachment.state, len(asked.chosen)
    dtype = asked.gradients[0].dtype
    dtype = torch.float32 if dtype == torch.float64 else dtype
    norm = None
    if len(state.arenas) > 1 or not _has_room(state, count, settings):
        # Making room cannot be undone, and an arena does not see the others' layers.
        norm = _norm(asked.gradients)
        _check_finite(norm + _norm(asked.inputs), state)
    _make_room(attachment, count, settings)
    for arena in state.arenas:
        copy = arena.rounded_copy()
        copy = None if copy is None or copy.dtype == torch.float64 else copy
        # One arena's norm is always its own kernel's, so that a slot does not depend on whether there was room.
        arena_norm = norm.to(arena.slots.device) if len(state.arenas) > 1 else None
        inputs, gradients = (_stacked(layers, arena.positions, dtype) for layers in (asked.inputs, asked.gradients))
        norms = write_slots_(arena.slots, state.used, inputs, gradients, settings.epsilon, copy, arena_norm)
        if arena.compute.dtype == torch.float64:
            arena.round_slots()
        arena.record_versions()  # also where nothing was written: that is no change from outside
    _check_finite(norms, state)
    state.use(state.used + count)
    state.finish_update()
    return norms / loss_scale(state)


def _check_finite(norms: Tensor, state: MemoryState) -> None:
    if not norms.isfinite().all():
        raise LocasError(f"the gradient is not finite, so nothing was written; the memory stays at version {state.version}")


def write_tokens(attachment: Attachment, input_ids: Tensor, settings: WriteSettings, exact: bool) -> WriteReport:
    """Writes from input_ids [n] in one forward: see `Memory.write`."""
    if not isinstance(exact, bool):
        raise TypeError(f"exact is {exact!r}; expected True or False")
    state = attachment.state
    state.sync()
    settings = resolve(settings, state, len(input_ids))
    if isinstance(settings.tokens, (str, tuple)):
        check_room(state, len(input_ids) - 1 if settings.tokens == "all" else len(settings.tokens), settings)
    window = Window(input_ids[:0], input_ids[:-1], input_ids[1:])
    asked = _ask(attachment, window, settings.tokens, exact, context_gradient=False, ends_early=False)
    check_loss(asked.nll.sum().item(), state, f"tokens 1 to {len(input_ids) - 1}")
    norms = append(attachment, asked, settings).tolist() if len(asked.chosen) else []
    positions = (asked.chosen + 1).tolist()
    return WriteReport(positions, asked.nll[asked.chosen].sum().item(), norms, state.used)


class WriteStep:
    """What memorize() does to a chunk with update="write": step(window, place) -> the summed loss, before it is written."""

    def __init__(self, attachment: Attachment, settings: "Settings", ends_early: bool):
        self.attachment, self.settings, self.ends_early = attachment, settings, ends_early

    def __call__(self, window: Window, place: str) -> float:
        write, state = self.settings.write, self.attachment.state
        asked = _ask(self.attachment, window, write.tokens, False, self.settings.context_gradient, self.ends_early)
        loss = asked.nll.sum().item()
        check_loss(loss, state, place)
        if len(asked.chosen):
            append(self.attachment, asked, write)
        return loss

    def report(self) -> str:
        """For MemorizeReport.cuda_graph."""
        return "not used: slots are written in closed form"
