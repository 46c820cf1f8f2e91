"""The loss kernel against float64."""

import pytest
import torch
import torch.nn.functional as F
from support.helpers import assert_as_exact_as_torch

from locas_ext import ops


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens, vocab", [(1, 1), (1, 7), (5, 256), (7, 1031), (64, 4099)])
def test_value_and_gradient(tokens, vocab, dtype):
    logits = (5 * torch.randn(tokens, vocab)).to(dtype)
    targets = torch.randint(0, vocab, (tokens,))
    weight = torch.rand(()) + 0.5

    def run(function, x):
        x = x.detach().requires_grad_()
        loss = function(x)
        (gradient,) = torch.autograd.grad(loss * weight, x)
        return loss.detach(), gradient

    ours = run(lambda x: ops.token_nll(x[None], targets[None]).sum(), logits)
    peer = run(lambda x: F.cross_entropy(x.float(), targets, reduction="sum"), logits)
    exact = run(lambda x: F.cross_entropy(x, targets, reduction="sum"), logits.double())
    assert ours[0].dtype == torch.float32 and ours[1].dtype == dtype
    assert_as_exact_as_torch("loss", ours[0], peer[0], exact[0], rounding=torch.finfo(torch.float32).eps)
    assert_as_exact_as_torch("gradient", ours[1], peer[1], exact[1])


def test_extreme_logits():
    logits = torch.tensor([[3e38, -3e38, 0.0], [-float("inf"), 1.0, 1.0], [1e4, 1e4, -1e4]])
    targets = torch.tensor([0, 1, 1])
    expected = F.cross_entropy(logits, targets, reduction="sum")
    torch.testing.assert_close(ops.token_nll(logits, targets).sum(), expected)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_shows(bad):
    logits = torch.zeros(2, 300)
    logits[1, 200] = bad
    assert not torch.isfinite(ops.token_nll(logits, torch.tensor([0, 1]))).all()


def test_the_gradient_is_given_once():
    logits = torch.randn(3, 5, requires_grad=True)
    loss = ops.token_nll(logits, torch.tensor([0, 1, 2])).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="already taken"):
        loss.backward()


def test_bad_targets():
    logits = torch.randn(2, 5)
    with pytest.raises(ValueError, match=r"id outside \[0, 5\)"):
        ops.token_nll(logits, torch.tensor([0, 5]))
    with pytest.raises(ValueError, match=r"targets has shape \[3\]; expected \[2\]"):
        ops.token_nll(logits, torch.tensor([0, 1, 2]))
