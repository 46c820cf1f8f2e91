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

from locas_ext.hosts.formula import class_name, has_hooks
from locas_ext.hosts.split import is_split, local, style_of
from locas_ext.ops import token_nll
from locas_ext.ops.backends import elementwise
from locas_ext.ops.ranks import Ranks

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
        for part in row_slices(hidden, weight):
            logits = F.linear(hidden[part], weight, head.bias)
            nll[part], d_logits = elementwise.token_nll(
                logits, targets[part], gradient, self.soft_cap, self.logit_scale, in_place=True
            )
            if d_hidden is not None and d_logits is not None:
                torch.mm(d_logits, weight, out=d_hidden[part])
        return nll, d_hidden


class SplitHeadLoss(HeadLoss):
    """The same of a head whose rows, tokens of the vocabulary, are split among processes.

          logits of a part [s, V / n] --> log-sum-exp and the targets' logits --one sum over ranks--> nll [s]
                 |  in place
          the part's own gradient --> * the part's share of the whole --> d_hidden [s, d] --one sum over ranks

    A part's kernel takes a token of the part for the target, the true one where it is there. The difference is a row of the
    head.
    """

    def __init__(self, head: nn.Module, logit_scale: float, ranks: Ranks):
        super().__init__(head, logit_scale, 0.0)
        self.ranks = ranks
        self.first = ranks.before(len(local(head.weight)))

    def slices(self, hidden: Tensor, targets: Tensor, gradient: bool) -> tuple[Tensor, Tensor | None]:
        head: Any = self.head
        weight, bias = local(head.weight), local(head.bias)
        nll = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        d_hidden = torch.empty_like(hidden) if gradient else None
        for part in row_slices(hidden, weight):
            d_part = self._slice(hidden[part], targets[part], weight, bias, nll[part], gradient)
            if d_hidden is not None and d_part is not None:
                d_hidden[part] = d_part
        return nll, None if d_hidden is None else self.ranks.total(d_hidden)

    def _slice(
        self, hidden: Tensor, targets: Tensor, weight: Tensor, bias: Tensor | None, nll: Tensor, gradient: bool
    ) -> Tensor | None:
        """Writes nll [s]. -> this process's part of the gradient by hidden [s, d]"""
        places = targets - self.first
        here = ((places >= 0) & (places < len(weight))).float()
        places = places.clamp(0, len(weight) - 1)
        logits = F.linear(hidden, weight, bias)
        taken = logits.gather(1, places[:, None])[:, 0].float() * self.logit_scale
        own, d_logits = elementwise.token_nll(logits, places, gradient, 0.0, self.logit_scale, in_place=True)
        sums = torch.zeros(self.ranks.size + 1, len(hidden), dtype=torch.float32, device=hidden.device)
        sums[self.ranks.rank], sums[-1] = own + taken, taken * here
        self.ranks.total(sums)
        whole = sums[:-1].logsumexp(0)
        nll.copy_(whole - sums[-1])
        if d_logits is None:
            return None
        share = (own + taken - whole).exp()
        rows = weight[places].float() * ((share - here) * self.logit_scale)[:, None]
        return (torch.mm(d_logits, weight).float() * share[:, None] + rows).to(hidden.dtype)


def row_slices(hidden: Tensor, weight: Tensor) -> list[slice]:
    """Rows of hidden [n, d] whose logits by weight [V, d] may exist at one time."""
    rows = max(1, _SLICE[hidden.device.type] // (weight.shape[0] * weight.element_size()))
    rows = rows if rows < 64 else rows // 64 * 64
    return [slice(first, first + rows) for first in range(0, len(hidden), rows)]


def plain_head(model: Any) -> nn.Module:
    """The model's LM head; ValueError, which says why, where it is not a plain frozen matrix, whole or split by its rows."""
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear:
        raise ValueError(f"the LM head is {'missing' if head is None else f'a {class_name(head)}, not a plain Linear'}")
    weight = head.weight
    split = is_split(weight) and type(style_of(head)).__name__ == "ColwiseParallel"
    if (why := "it has hooks" if has_hooks(head) else None if split else why_not_bound(head)) is not None:
        raise ValueError(f"the LM head cannot be replaced: {why}")
    if not (split or type(weight) is nn.Parameter):
        raise ValueError(f"the LM head holds a {type(weight).__name__}, not a plain Parameter")
    if weight.requires_grad or weight.device.type not in _SLICE:
        raise ValueError("the LM head's weight is not frozen, or not on a CPU or a GPU")
    if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"the LM head is {str(weight.dtype).removeprefix('torch.')}")
    return head


@torch.no_grad()
def head_loss(model: Any, hidden: Tensor, logits: Tensor, targets: Tensor, ranks: Ranks | None = None) -> HeadLoss:
    """What computes the loss of hidden [n, d] whose logits [n, V] the host itself gave; ValueError where that is not known.

    ranks: the processes that the host is split among
    """
    head, config = plain_head(model), model.config.get_text_config(decoder=True)
    scale = getattr(config, "logit_scale", None) or 1.0 / (getattr(config, "logits_scaling", None) or 1.0)
    own = token_nll(logits, targets)
    for logit_scale, soft_cap in ((scale, getattr(config, "final_logit_softcapping", None) or 0.0), (1.0, 0.0)):
        if ranks is None or not is_split(head.weight):
            found = HeadLoss(head, float(logit_scale), float(soft_cap))
        elif soft_cap:
            continue
        else:
            found = SplitHeadLoss(head, float(logit_scale), ranks)
        same = agree(found.nll(hidden, targets).to(logits.dtype), own.to(logits.dtype))
        if same if ranks is None else ranks.all(same):
            return found
    raise ValueError("its logits are not those of its LM head, scaled and capped as the config says")
