"""The operations of `locas_ext.ops` in plain torch: any device, any float dtype, gradients by autograd.

Arguments and results are those of the operation that each docstring names; errors are torch's own.
This is the oracle the kernels are tested against and the `reference` backend. docs/method.md has the mathematics.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .activations import activate


def sideway_glu(x: Tensor, slots: Tensor, scale: float, activation: str = "silu") -> Tensor:
    """scale * [act(x G^T) * (x K^T)] V for x [..., d] and slots [3, r, d] = (G, K, V): `locas_ext.ops.sideway_glu`.

    >>> sideway_glu(torch.ones(1, 2), torch.ones(3, 4, 2), scale=0.5, activation="relu").tolist()  # 0.5 * 4 * 2 * 2
    [[8.0, 8.0]]
    """
    gate, key, value = slots.to(x.dtype)
    return scale * (activate(x @ gate.T, activation) * (x @ key.T)) @ value


def sideway_mlp(x: Tensor, slots: Tensor, scale: float, activation: str = "relu") -> Tensor:
    """scale * act(x K^T) V for x [..., d] and slots [2, r, d] = (K, V): `locas_ext.ops.sideway_mlp`.

    >>> sideway_mlp(torch.ones(1, 2), torch.ones(2, 4, 2), scale=0.5).tolist()  # 0.5 * 4 * 2
    [[4.0, 4.0]]
    """
    key, value = slots.to(x.dtype)
    return scale * activate(x @ key.T, activation) @ value


def glu_ffn(
    x: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    down_weight: Tensor,
    slots: Tensor,
    scale: float,
    activation: str = "silu",
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
) -> Tensor:
    """The host FFN plus its memory: `locas_ext.ops.glu_ffn`.

    >>> x, weight = torch.ones(1, 2), torch.eye(2)
    >>> glu_ffn(x, weight, weight, weight, torch.ones(3, 4, 2), scale=0.5, activation="relu").tolist()  # 1 + 8
    [[9.0, 9.0]]
    """
    gate = F.linear(x, gate_weight, gate_bias)
    up = F.linear(x, up_weight, up_bias)
    host = F.linear(activate(gate, activation) * up, down_weight, down_bias)
    return host + sideway_glu(x, slots, scale, activation)


def neuron_importance(
    x: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    activation: str = "silu",
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
) -> Tensor:
    """Mean over the tokens of |act(x W_gate^T) * (x W_up^T)|, [m] float32 or float64: `locas_ext.ops.neuron_importance`.

    >>> neuron_importance(torch.tensor([[1.0, -3.0]]), torch.eye(2), torch.eye(2), activation="relu").tolist()
    [1.0, 0.0]
    """
    x = x.reshape(-1, x.shape[-1])
    hidden = activate(F.linear(x, gate_weight, gate_bias), activation) * F.linear(x, up_weight, up_bias)
    accumulate = torch.float64 if x.dtype == torch.float64 else torch.float32
    return hidden.abs().to(accumulate).mean(0)


def _clip_rows_(slots: Tensor) -> None:
    norm = slots.norm(dim=-1, keepdim=True)
    slots.div_(norm.clamp_min(1.0))


@torch.no_grad()
def update_slots_(
    slots: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    learning_rate: Tensor,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    clip: bool = True,
    compute: Tensor | None = None,
    finite: Tensor | None = None,
) -> None:
    """One AdamW step and the row clip, in place: `locas_ext.ops.update_slots_`.

    >>> slots, exp_avg, exp_avg_sq = torch.zeros(3, 2, 4), torch.zeros(3, 2, 4), torch.zeros(3, 2, 4)
    >>> update_slots_(slots, torch.ones(3, 2, 4), exp_avg, exp_avg_sq, step=1, learning_rate=0.25)
    >>> bool(torch.allclose(slots, torch.tensor(-0.25)))
    True
    """
    if finite is not None and not finite:
        return
    t, lr = float(step), float(learning_rate)
    exp_avg.mul_(beta1).add_(grad, alpha=1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    direction = (exp_avg / (1 - beta1**t)) / ((exp_avg_sq / (1 - beta2**t)).sqrt() + eps)
    slots.mul_(1 - lr * weight_decay).sub_(lr * direction)
    if clip:
        _clip_rows_(slots)
    if compute is not None:
        compute.copy_(slots)


adamw_slots_ = update_slots_


@torch.no_grad()
def sgd_slots_(
    slots: Tensor,
    grad: Tensor,
    learning_rate: Tensor,
    momentum_buffer: Tensor | None = None,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    clip: bool = True,
    compute: Tensor | None = None,
    finite: Tensor | None = None,
) -> None:
    """One SGD step and the row clip, in place: `locas_ext.ops.sgd_slots_`.

    >>> slots = torch.zeros(3, 2, 4)
    >>> sgd_slots_(slots, torch.ones(3, 2, 4), learning_rate=0.25)
    >>> bool((slots == -0.25).all())
    True
    """
    if finite is not None and not finite:
        return
    lr = float(learning_rate)
    direction = grad
    if momentum_buffer is not None:
        direction = momentum_buffer.mul_(momentum).add_(grad)
    slots.mul_(1 - lr * weight_decay).sub_(lr * direction)
    if clip:
        _clip_rows_(slots)
    if compute is not None:
        compute.copy_(slots)


@torch.no_grad()
def write_slots_(
    slots: Tensor,
    start: int,
    inputs: Tensor,
    gradients: Tensor,
    epsilon: float,
    compute: Tensor | None = None,
    gradient_norm: Tensor | None = None,
) -> Tensor:
    """Closed-form slots, one per token and layer, in place: `locas_ext.ops.write_slots_`.

    >>> write_slots_(torch.zeros(1, 2, 8, 4), 0, torch.ones(1, 3, 4), torch.ones(1, 3, 4), epsilon=0.5).tolist()
    [2.0, 2.0, 2.0]
    """
    inputs, gradients = inputs.double(), gradients.double()
    norm = gradients.square().sum((0, 2)).sqrt() if gradient_norm is None else gradient_norm
    norm = norm.to(slots.dtype)
    finite = (inputs.isfinite() & gradients.isfinite()).all(-1).all(0) & norm.isfinite()
    if not finite.all():
        return norm.masked_fill(~finite, torch.nan)
    input_norm = inputs.norm(dim=-1, keepdim=True)
    written = slots[:, :, start : start + inputs.shape[1]]
    written[:, 0] = inputs / input_norm.masked_fill(input_norm == 0, torch.inf)
    written[:, 1] = gradients * (epsilon / norm.double().masked_fill(norm == 0, torch.inf))[:, None]
    if compute is not None:
        compute[:, :, start : start + inputs.shape[1]] = written
    return norm
