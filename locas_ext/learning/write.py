"""Closed-form writing of a Locas-MLP memory: one slot a token a layer, without training (docs/method.md, "Writing").

tokens -> forward -> log-likelihood of the chosen ones -> backward, as far as the FFNs' outputs
            |                                                 |
  A, the FFN's input where the token is predicted    G, the gradient there
            |                                                 |
  key = A / ||A||                                    value = epsilon G / ||G||
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from locas_ext.errors import LocasError
from locas_ext.ops import token_nll, write_slots_
from locas_ext.patching.attachment import Attachment
from locas_ext.patching.mlp import PatchedMlpFFN
from locas_ext.state.memory_state import MemoryState
from locas_ext.state.scope import scoped
from locas_ext.transforms.compress import compress_slots

from .chunk import Window, chunk_logits
from .inputs import TokenIds, token_ids
from .run_guards import eager_host, interrupt_between_chunks, quiet_host
from .settings import ResolvedSettings
from .step import check_loss, loss_scale
from .write_settings import WriteSettings, check_room, resolve


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
def _make_room(attachment: Attachment, count: int, settings: WriteSettings) -> None:
    state = attachment.state
    check_room(state.used, count, settings)
    needed = state.used + count
    if settings.capacity is not None and needed > settings.capacity:
        if settings.when_full == "compress":
            assert settings.compress_to is not None, "resolve() fills it in for when_full='compress'"
            compress_slots(state, attachment.ffns[0].activation, settings.compress_to)
        else:
            state.drop_oldest(needed - settings.capacity)
        needed = state.used + count
    if needed > state.capacity:
        doubled = 2 * state.capacity if settings.capacity is None else settings.capacity
        state.resize(max(needed, doubled))


# ---- what the text asks for -----------------------------------------------------------------------------------
class Asked(NamedTuple):
    """What one forward and backward found: for each chosen target its index [n], and per arena A and G [l, n, d]."""

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


def _of_arenas(state: MemoryState, layers: Sequence[Tensor], targets: int, indices: Tensor) -> list[Tensor]:
    """Per arena [l, n, d]: of its layers' tensors [..., d] over the window those of some of the targets' positions."""
    result = []
    for arena in state.arenas:
        rows = torch.stack([layers[position] for position in arena.positions])
        rows = rows.reshape(len(rows), -1, rows.shape[-1])[:, -targets:]
        result.append(rows if len(indices) == targets else rows.index_select(1, indices.to(rows.device)))
    return result


def _ask(attachment: Attachment, window: Window, tokens, exact: bool, context_gradient: bool, ends_early: bool) -> Asked:
    """One forward, and one backward to the FFNs' outputs (exact: one a token). Waits for the device only to choose."""
    state = attachment.state
    ffns = [ffn for ffn in attachment.ffns if isinstance(ffn, PatchedMlpFFN)]  # all: Locas-GLU is not written
    taps = {ffn: _Tap() for ffn in ffns}
    window = window.to(attachment.host.input_device())
    # The tapped tensors must be nodes of the graph, which what a compiled forward returns of its inside is not.
    with scoped(state, tap=lambda ffn, x, y: taps[ffn](x, y)), eager_host(attachment.host.model):
        logits = chunk_logits(attachment.host, window, context_gradient, ends_early)
    targets = window.targets.to(logits.device)
    if exact:  # token_nll gives its gradient once
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        nll = F.cross_entropy(logits, targets, reduction="none")
    else:
        nll = token_nll(logits, targets)
    chosen = _choose(tokens, nll.detach())
    outputs = [tap.output for tap in taps.values()]

    def gradients(indices: Tensor) -> list[Tensor]:
        """At the positions of these targets, of their log-likelihoods' sum."""
        weights = torch.zeros_like(nll).index_fill_(0, indices, -loss_scale(state))
        whole = torch.autograd.grad(nll, outputs, weights, retain_graph=exact)
        return _of_arenas(state, whole, len(targets), indices)

    asked = [gradients(indices) for indices in (chosen.split(1) if exact else [chosen]) if len(indices)]
    return Asked(
        chosen,
        nll.detach(),
        _of_arenas(state, [tap.input for tap in taps.values()], len(targets), chosen),
        [torch.cat(of_arena, dim=1) if exact else of_arena[0] for of_arena in zip(*asked, strict=False)],
    )


# ---- writing it -----------------------------------------------------------------------------------------------
def _new_slots(asked: Asked, epsilon: float) -> tuple[list[Tensor], list[Tensor]]:
    """Per arena the slots [l, 2, n, d] and their gradient norms [n], NaN where something is not finite."""
    joint = None
    if len(asked.gradients) > 1:  # an arena does not see the others' layers
        device = asked.gradients[0].device
        squares = [gradients.double().square().sum((0, 2)).to(device) for gradients in asked.gradients]
        joint = torch.stack(squares).sum(0).sqrt().float()
    slots, norms = [], []
    for inputs, gradients in zip(asked.inputs, asked.gradients, strict=False):
        dtype = torch.float32 if gradients.dtype == torch.float64 else gradients.dtype
        layers, n, d = gradients.shape
        slots.append(torch.empty(layers, 2, n, d, dtype=torch.float32, device=gradients.device))
        norm = None if joint is None else joint.to(gradients.device)
        norms.append(write_slots_(slots[-1], 0, inputs.to(dtype), gradients.to(dtype), epsilon, None, norm))
    return slots, norms


def _write(
    attachment: Attachment,
    window: Window,
    settings: WriteSettings,
    place: str,
    exact: bool = False,
    context_gradient: bool = False,
    ends_early: bool = False,
) -> tuple[WriteReport, float]:
    """Writes a slot for each chosen target behind the slots there are: one update if any is chosen.

    Returns what was written, and the summed loss of all targets before. LocasError, with nothing written, if the loss,
    an input or a gradient is not finite.
    """
    state = attachment.state
    asked = _ask(attachment, window, settings.tokens, exact, context_gradient, ends_early)
    slots, norms_of_arenas = _new_slots(asked, settings.epsilon)
    # One read of all the numbers, as each read waits for the device; float64 holds indices too.
    numbers = [asked.chosen, asked.nll, *(norms.to(asked.nll.device) for norms in norms_of_arenas)]
    values = torch.cat([tensor.double() for tensor in numbers]).tolist()
    count, targets = len(asked.chosen), len(asked.nll)
    chosen = [int(index) for index in values[:count]]
    nll, norms = values[count:][:targets], values[count + targets :]
    loss = math.fsum(nll)
    check_loss(loss, state, place)
    if not all(map(math.isfinite, norms)):
        raise LocasError(
            f"the gradient is not finite at {place}, so nothing was written; the memory stays at version {state.version}"
        )
    if count:
        _make_room(attachment, count, settings)
        state.append(slots)
    scale = loss_scale(state)
    return WriteReport(
        tokens=[index + 1 for index in chosen],
        nll=math.fsum(nll[index] for index in chosen),
        gradient_norm=[norm / scale for norm in norms[:count]],
        slots_used=state.used,
    ), loss


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
    return _write(attachment, window, settings, f"tokens 1 to {len(input_ids) - 1}", exact)[0]


class WriteStep:
    """A chunk's turn in memorize(update="write"): step(window, place) -> the summed loss, before it is written."""

    def __init__(self, attachment: Attachment, settings: ResolvedSettings, ends_early: bool):
        assert settings.write is not None, "resolve_settings() fills it in for update='write'"
        self.attachment, self.settings, self.write, self.ends_early = attachment, settings, settings.write, ends_early

    def __call__(self, window: Window, place: str) -> float:
        return _write(
            self.attachment,
            window,
            self.write,
            place,
            context_gradient=self.settings.context_gradient,
            ends_early=self.ends_early,
        )[1]

    def report(self) -> str:
        """For MemorizeReport.cuda_graph."""
        return "not used: slots are written in closed form"


def write(attachment: Attachment, input_ids: TokenIds, settings: WriteSettings, exact: bool) -> WriteReport:
    """See `Memory.write`."""
    host = attachment.host
    ids = token_ids(input_ids, host.vocab_size, at_least=2)
    if len(ids) > host.max_positions:
        raise ValueError(
            f"input_ids holds {len(ids)} tokens; expected at most {host.max_positions}, the host's positions: a longer text is "
            "for memorize(update='write')"
        )
    with (
        attachment.exclusive("write"),
        interrupt_between_chunks() as check_interrupt,
        quiet_host(host.model),
        torch.inference_mode(False),
        torch.enable_grad(),
    ):
        report = write_tokens(attachment, ids, settings, exact)
        check_interrupt()
        return report
