"""The kernels against the float64 reference, for `locas info`.

The rule: our error is at most twice that of the same formula in plain torch at the same dtype, plus two roundings.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from locas_ext import ops
from locas_ext.ops import reference


@dataclass(frozen=True, kw_only=True)
class Check:
    """One op on one device: the largest error of its results relative to the largest exact value."""

    op: str
    device: str
    dtype: str
    error: float
    plain_torch_error: float
    limit: float

    @property
    def passed(self) -> bool:
        return self.error <= self.limit  # False for NaN


def _with_gradients(y: Tensor, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    return [y, *torch.autograd.grad(y, inputs, torch.ones_like(y))]


# Each takes ops or reference, so both compute the very same thing.
def _glu_ffn(module, x, gate, up, down, slots) -> list[Tensor]:
    x, slots = x.requires_grad_(), slots.requires_grad_()
    return _with_gradients(module.glu_ffn(x, gate, up, down, slots, 0.5), (x, slots))


def _sideway_glu(module, x, gate, up, down, slots) -> list[Tensor]:
    x, slots = x.requires_grad_(), slots.requires_grad_()
    return _with_gradients(module.sideway_glu(x, slots, 0.5), (x, slots))


def _sideway_mlp(module, x, gate, up, down, slots) -> list[Tensor]:
    x, slots = x.requires_grad_(), slots[1:].requires_grad_()
    return _with_gradients(module.sideway_mlp(x, slots, 0.5), (x, slots))


def _neuron_importance(module, x, gate, up, down, slots) -> list[Tensor]:
    return [module.neuron_importance(x, gate, up)]


# Three updates from fresh states, as a memory's first chunks make them.
def _update_slots_(module, slots, *grads) -> list[Tensor]:
    exp_avg, exp_avg_sq = torch.zeros_like(slots), torch.zeros_like(slots)
    learning_rate = torch.tensor(0.05, dtype=torch.float64, device=slots.device)
    for step, grad in enumerate(grads, start=1):
        module.update_slots_(slots, grad, exp_avg, exp_avg_sq, torch.tensor(step, device=slots.device), learning_rate)
    return [slots, exp_avg, exp_avg_sq]


def _sgd_slots_(module, slots, *grads) -> list[Tensor]:
    momentum_buffer = torch.zeros_like(slots)
    learning_rate = torch.tensor(0.05, dtype=torch.float64, device=slots.device)
    for grad in grads:
        module.sgd_slots_(slots, grad, learning_rate, momentum_buffer, momentum=0.9)
    return [slots, momentum_buffer]


def _write_slots_(module, slots, inputs, gradients) -> list[Tensor]:
    norms = module.write_slots_(slots, 2, inputs, gradients, 0.05)
    return [slots, norms]


def _relative_error(results: list[Tensor], exact: list[Tensor]) -> float:
    errors = [(a.double() - b).abs().max() / b.abs().max() for a, b in zip(results, exact, strict=True)]
    return torch.stack(errors).max().item()


def _check(function, inputs: list[Tensor], dtype: torch.dtype) -> Check:
    def run(module, as_dtype):
        return function(module, *[tensor.detach().to(as_dtype, copy=True) for tensor in inputs])

    exact = run(reference, torch.float64)
    error = _relative_error(run(ops, dtype), exact)
    plain = _relative_error(run(reference, dtype), exact)
    limit = 2 * plain + 2 * torch.finfo(dtype).eps
    name = function.__name__.removeprefix("_")
    return Check(
        op=name,
        device=str(inputs[0].device),
        dtype=str(dtype).removeprefix("torch."),
        error=error,
        plain_torch_error=plain,
        limit=limit,
    )


def self_test(device: torch.device) -> list[Check]:
    """Runs every op, forward and backward, on small random tensors; odd sizes, so that no kernel has an easy time."""
    generator = torch.Generator().manual_seed(0)
    tokens, d, m, rank = 37, 72, 200, 9

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    ffn = [normal(tokens, d), normal(m, d) / 8, normal(m, d) / 8, normal(d, m) / 14, normal(3, rank, d) / 8]
    checks = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        inputs = [tensor.to(device, dtype) for tensor in ffn]
        functions = (_glu_ffn, _sideway_glu, _sideway_mlp, _neuron_importance)
        checks += [_check(function, inputs, dtype) for function in functions]
    inputs = [tensor.to(device) for tensor in (normal(4, 3, rank, d) / 8, *normal(3, 4, 3, rank, d))]
    checks += [_check(function, inputs, torch.float32) for function in (_update_slots_, _sgd_slots_)]
    inputs = [tensor.to(device) for tensor in (normal(4, 2, rank, d) / 8, *normal(2, 4, rank - 2, d))]
    checks.append(_check(_write_slots_, inputs, torch.float32))
    return checks
