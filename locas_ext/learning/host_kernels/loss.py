"""Each token's loss from hidden states and the LM head, a slice of rows at a time: a chunk's logits never exist as a whole.

      hidden [n, d]  --slice of rows--> logits [s, V] --> nll [s]
                                           |  in place
                                        d_logits [s, V] --> d_hidden [s, d]

Each row of d_hidden belongs to one token's loss, so it is made in the forward and scaled in the backward.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from locas_ext.ops import token_nll
from locas_ext.ops.backends import elementwise

from .agreement import agree
from .binding import why_not_bound

# Bytes of logits that exist at one time; on a GPU enough rows for a full product, on a CPU few enough to stay in its caches.
_SLICE = {"cuda": 160 << 20, "cpu": 4 << 20}


class HeadNllFunction(torch.autograd.Function):
    """apply(hidden [n, d], head, targets [n]) -> nll [n] float32; no gradient for the head."""

    @staticmethod
    def forward(ctx, hidden, head, targets):
        nll, d_hidden = head.slices(hidden, targets, ctx.needs_input_grad[0])
        ctx.save_for_backward(d_hidden)
        return nll

    @staticmethod
    @once_differentiable
    def backward(ctx, d_nll):
        (d_hidden,) = ctx.saved_tensors
        return d_hidden * d_nll[:, None].to(d_hidden.dtype), None, None


class HeadLoss:
    """An LM head, and what comes between it and the logits: a scale, then a soft cap; 0: none."""

    def __init__(self, head: nn.Module, logit_scale: float, soft_cap: float):
        """head: as `plain_head` finds it"""
        self.head, self.logit_scale, self.soft_cap = head, logit_scale, soft_cap

    def nll(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """hidden [n, d], what goes into the head; targets [n] -> [n] float32, with a graph over hidden where one is kept."""
        if torch.is_grad_enabled() and hidden.requires_grad:
            return HeadNllFunction.apply(hidden, self, targets)
        return self.slices(hidden, targets, gradient=False)[0]

    def slices(self, hidden: Tensor, targets: Tensor, gradient: bool) -> tuple[Tensor, Tensor | None]:
        """-> nll [n], and with `gradient` each one's by its row of hidden [n, d]."""
        head: Any = self.head
        weight: Tensor = head.weight
        nll = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        d_hidden = torch.empty_like(hidden) if gradient else None
        rows = max(1, _SLICE[hidden.device.type] // (weight.shape[0] * weight.element_size()))
        rows = rows if rows < 64 else rows // 64 * 64
        for first in range(0, len(hidden), rows):
            part = slice(first, first + rows)
            logits = F.linear(hidden[part], weight, head.bias)
            nll[part], d_logits = elementwise.token_nll(
                logits, targets[part], gradient, self.soft_cap, self.logit_scale, in_place=True
            )
            if d_hidden is not None and d_logits is not None:
                torch.mm(d_logits, weight, out=d_hidden[part])
        return nll, d_hidden


def plain_head(model: Any) -> nn.Module:
    """The model's LM head; ValueError, which says why, where it is not a plain frozen matrix."""
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear:
        raise ValueError(f"the LM head is {'missing' if head is None else type(head).__name__}, no linear layer")
    if (why := why_not_bound(head)) is not None:
        raise ValueError(f"the LM head cannot be replaced: {why}")
    weight = head.weight
    if type(weight) is not nn.Parameter or weight.requires_grad or weight.device.type not in _SLICE:
        raise ValueError("the LM head's weight is not a frozen parameter on a CPU or a GPU")
    if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"the LM head is {str(weight.dtype).removeprefix('torch.')}")
    return head


@torch.no_grad()
def head_loss(model: Any, hidden: Tensor, logits: Tensor, targets: Tensor) -> HeadLoss:
    """What computes the loss of hidden [n, d] whose logits [n, V] the host itself gave; ValueError where that is not known."""
    head, config = plain_head(model), model.config.get_text_config(decoder=True)
    scale = getattr(config, "logit_scale", None) or 1.0 / (getattr(config, "logits_scaling", None) or 1.0)
    own = token_nll(logits, targets)
    for logit_scale, soft_cap in ((scale, getattr(config, "final_logit_softcapping", None) or 0.0), (1.0, 0.0)):
        found = HeadLoss(head, float(logit_scale), float(soft_cap))
        if agree(found.nll(hidden, targets).to(logits.dtype), own.to(logits.dtype)):
            return found
    raise ValueError("its logits are not those of its LM head, scaled and capped as the config says")
