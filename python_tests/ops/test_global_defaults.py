"""What torch's global defaults are makes no difference to an operation."""

import pytest
import torch
from support.torch_settings import DEFAULTS

from locas_ext import ops
from locas_ext.ops.backends import elementwise

T, D, M, R = 18, 16, 24, 4


def operands(dtype):
    torch.manual_seed(4)
    x, dy, slots = torch.randn(T, D), torch.randn(T, D), torch.randn(3, R, D) / 4
    gate, up, down = torch.randn(M, D) / 4, torch.randn(M, D) / 4, torch.randn(D, M) / 5
    return [t.to(dtype) for t in (x, dy, gate, up, down)], slots


def everything(backend, dtype, tensors, slots):
    """The results and gradients of all operations."""
    x, dy, gate, up, down = tensors
    x, slots = x.clone().requires_grad_(), slots.clone().requires_grad_()
    results = [
        ops.glu_ffn(x, gate, up, down, slots, 0.5, backend=backend),
        ops.sideway_glu(x, slots, 0.5, backend=backend),
        ops.sideway_mlp(x, slots[1:], 0.5, backend=backend),
    ]
    sum(results).backward(dy)
    results += [x.grad, slots.grad, ops.neuron_importance(x, gate, up, backend=backend)]
    logits = dy.clone().requires_grad_()
    nll = ops.token_nll(logits, (dy.argmax(-1) + 1) % D)
    nll.sum().backward()
    return [t.detach() for t in (*results, nll, logits.grad)]


@pytest.mark.parametrize("defaults", DEFAULTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["auto", "matmul", "reference"])
def test_operations(backend, dtype, defaults):
    tensors, slots = operands(dtype)
    expected = everything(backend, dtype, tensors, slots)
    with DEFAULTS[defaults]():
        results = everything(backend, dtype, tensors, slots)
    for mine, other in zip(results, expected, strict=True):
        assert mine.dtype == other.dtype and mine.device == other.device and torch.equal(mine, other)


@pytest.mark.parametrize("defaults", DEFAULTS)
def test_updates_and_norms(defaults):
    def run(slots, grad, first, second, x):
        ops.update_slots_(slots, grad, first, second, 1, 0.1)
        ops.sgd_slots_(slots, grad, 0.1, first, 0.9)
        norms = ops.write_slots_(slots, 1, grad[:, 0, :2], grad[:, 1, :2], 0.1)
        out, _, inverse_rms = elementwise.rms_norm(x, x[0], 1e-6, save=True)
        return [slots, first, second, norms, out, elementwise.rms_norm_backward(x, x, x[0], inverse_rms)]

    tensors = [*torch.randn(3, 2, 2, 5, D), torch.rand(2, 2, 5, D), torch.randn(3, D)]
    expected = run(*[t.clone() for t in tensors])
    copies = [t.clone() for t in tensors]
    with DEFAULTS[defaults]():
        results = run(*copies)
    assert all(torch.equal(mine, other) for mine, other in zip(results, expected, strict=True))
