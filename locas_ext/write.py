"""Closed-form writing of a Locas-MLP memory: one slot a token a layer, without training (docs/method.md, "Writing").

      tokens -> forward -> log-likelihood of the chosen ones -> backward, as far as the FFNs' outputs
                  |                                                 |
        A, the FFN's input where the token is predicted    G, the gradient there
                  |                                                 |
        key = A / ||A||                                    value = epsilon G / ||G||
"""

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
from .write_settings import WriteSettings, check_room, resolve

if TYPE_CHECKING:
    from .online import Settings

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


# ---- room -----------------------------------------------------------------------------------------------------
def _has_room(state: MemoryState, count: int, settings: WriteSettings) -> bool:
    """Whether `count` more slots fit as things are."""
    allowed = state.capacity if settings.capacity is None else min(state.capacity, settings.capacity)
    return state.used + count <= allowed


def _make_room(attachment: Attachment, count: int, settings: WriteSettings) -> None:
    state = attachment.state
    check_room(state.used, count, settings)
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
        raise LocasError(
            f"the gradient is not finite, so nothing was written; the memory stays at version {state.version}"
        )


def write_tokens(attachment: Attachment, input_ids: Tensor, settings: WriteSettings, exact: bool) -> WriteReport:
    """Writes from input_ids [n] in one forward: see `Memory.write`."""
    if not isinstance(exact, bool):
        raise TypeError(f"exact is {exact!r}; expected True or False")
    state = attachment.state
    state.sync()
    settings = resolve(settings, state.hidden_size, state.used, len(input_ids))
    if isinstance(settings.tokens, (str, tuple)):
        check_room(state.used, len(input_ids) - 1 if settings.tokens == "all" else len(settings.tokens), settings)
    window = Window(input_ids[:0], input_ids[:-1], input_ids[1:])
    asked = _ask(attachment, window, settings.tokens, exact, context_gradient=False, ends_early=False)
    check_loss(asked.nll.sum().item(), state, f"tokens 1 to {len(input_ids) - 1}")
    norms = append(attachment, asked, settings).tolist() if len(asked.chosen) else []
    positions = (asked.chosen + 1).tolist()
    return WriteReport(positions, asked.nll[asked.chosen].sum().item(), norms, state.used)


class WriteStep:
    """A chunk's turn in memorize(update="write"): step(window, place) -> the summed loss, before it is written."""

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
