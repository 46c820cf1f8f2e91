"""What a text asks of each FFN: its input where a token is predicted, and the gradient of the token's log-likelihood there.

tokens -> forward -> log-likelihood of the chosen ones -> backward, as far as the FFNs' outputs
            |                                                 |
  A, the FFN's input where the token is predicted    G, the gradient there
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from locas_ext.ops import token_nll
from locas_ext.patching.attachment import Attachment
from locas_ext.patching.mlp import PatchedMlpFFN
from locas_ext.state.memory_state import MemoryState
from locas_ext.state.scope import scoped

from .backprop import loss_scale
from .chunk import Reader, Window
from .run_guards import eager_host
from .selectors import Positions, Selector, select


class TokenGradients(NamedTuple):
    """What one forward and backward found.

    Attributes:
        chosen: [n] int64, ascending: the chosen targets' indices into the window's targets
        nll: [T] float, the loss of every target
        inputs: per arena A [l, n, d], the FFN inputs at the chosen targets' positions
        gradients: per arena G [l, n, d], times loss_scale()
    """

    chosen: Tensor
    nll: Tensor
    inputs: list[Tensor]
    gradients: list[Tensor]


class _Recorder:
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


def _recorded_logits(attachment: Attachment, window: Window, reader: Reader) -> tuple[Tensor, list[_Recorder]]:
    """The logits [T, V] of a window's targets, and what each FFN took in and gave out."""
    ffns = [ffn for ffn in attachment.ffns if isinstance(ffn, PatchedMlpFFN)]  # all: Locas-GLU is not written
    recorders = {ffn: _Recorder() for ffn in ffns}
    # What is recorded must be nodes of the graph, which what a compiled forward returns of its inside is not.
    with scoped(attachment.state, tap=lambda ffn, x, y: recorders[ffn](x, y)), eager_host(attachment.host.model):
        return reader.logits(window), list(recorders.values())


def _per_arena(state: MemoryState, layers: Sequence[Tensor], targets: int, indices: Tensor) -> list[Tensor]:
    """Per arena [l, n, d]: its layers' tensors [..., d] over the window, at some of the targets' positions."""
    result = []
    for arena in state.arenas:
        rows = torch.stack([layers[position] for position in arena.positions])
        rows = rows.reshape(len(rows), -1, rows.shape[-1])[:, -targets:]
        result.append(rows if len(indices) == targets else rows.index_select(1, indices.to(rows.device)))
    return result


def token_gradients(
    attachment: Attachment,
    window: Window,
    tokens: Selector | Positions,
    exact: bool,
    reader: Reader,
) -> TokenGradients:
    """One forward, and one backward to the FFNs' outputs (exact: one per token). Waits for the device only to choose."""
    state = attachment.state
    window = window.to(attachment.host.input_device())
    logits, recorders = _recorded_logits(attachment, window, reader)
    targets = window.targets.to(logits.device)
    if exact:  # token_nll gives its gradient once
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        nll = F.cross_entropy(logits, targets, reduction="none")
    else:
        nll = token_nll(logits, targets)
    chosen = select(tokens, nll.detach())
    outputs = [recorder.output for recorder in recorders]

    def gradients(indices: Tensor) -> list[Tensor]:
        """At the positions of these targets, of their log-likelihoods' sum."""
        weights = torch.zeros_like(nll).index_fill_(0, indices, -loss_scale(state))
        whole = torch.autograd.grad(nll, outputs, weights, retain_graph=exact)
        return _per_arena(state, whole, len(targets), indices)

    parts = [gradients(indices) for indices in (chosen.split(1) if exact else [chosen]) if len(indices)]
    return TokenGradients(
        chosen,
        nll.detach(),
        _per_arena(state, [recorder.input for recorder in recorders], len(targets), chosen),
        [torch.cat(of_arena, dim=1) if exact else of_arena[0] for of_arena in zip(*parts, strict=True)],
    )
