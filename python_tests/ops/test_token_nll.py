"""The loss kernel against float64."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from support.devices import DEVICES, DTYPES
from support.helpers import assert_as_exact_as_torch

from locas_ext import ops
from locas_ext.ops.backends import elementwise


def on_all(test):
    return pytest.mark.parametrize("device", DEVICES)(pytest.mark.parametrize("dtype", DTYPES, ids=str)(test))


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


@on_all
@pytest.mark.parametrize("soft_cap, logit_scale", [(0.0, 1.0), (30.0, 1.0), (0.0, 0.0625), (3.0, 2.0)])
@pytest.mark.parametrize("tokens, vocab", [(1, 1), (5, 256), (7, 1031), (64, 4099), (2, 40000)])
def test_the_loss_of_scaled_and_capped_logits(tokens, vocab, soft_cap, logit_scale, dtype, device):
    logits = (5 * torch.randn(tokens, vocab)).to(device, dtype)
    targets = torch.randint(0, vocab, (tokens,), device=device)

    def run(cast):
        x = cast(logits).detach().requires_grad_()
        z = x.float() * logit_scale if x.dtype != torch.float64 else x * logit_scale
        z = soft_cap * torch.tanh(z / soft_cap) if soft_cap else z
        nll = F.cross_entropy(z, targets, reduction="none")
        return nll.detach(), torch.autograd.grad(nll.sum(), x)[0], z.abs().max().item()

    peer, exact = run(lambda t: t), run(lambda t: t.double())
    nll, d_logits = elementwise.token_nll(logits, targets, True, soft_cap, logit_scale)
    alone, none = elementwise.token_nll(logits, targets, False, soft_cap, logit_scale)
    assert nll.dtype == torch.float32 and d_logits.dtype == dtype and none is None and torch.equal(nll, alone)
    # A difference of two numbers that are each as large as a logit.
    torch.testing.assert_close(nll.double(), exact[0], rtol=1e-6, atol=3 * torch.finfo(torch.float32).eps * (1 + exact[2]))
    if vocab > 1:
        assert_as_exact_as_torch("d_logits", d_logits.cpu(), peer[1].cpu(), exact[1].cpu())
    else:  # 0, but for the rounding of exp(z - nll)
        assert d_logits.abs().max() <= 1e-6
    again, written = elementwise.token_nll(logits, targets, True, soft_cap, logit_scale, in_place=True)
    assert written is logits and torch.equal(again, nll) and torch.equal(logits, d_logits)


@on_all
def test_logits_in_the_rows_of_something_larger(dtype, device):
    for gap, vocab in itertools.product((0, 1, 8), (17, 264)):
        logits = torch.randn(5, vocab + gap).to(device, dtype)[:, :vocab]
        targets = torch.randint(0, vocab, (5,), device=device)
        nll, d_logits = elementwise.token_nll(logits, targets, True)
        expected, expected_gradient = elementwise.token_nll(logits.contiguous(), targets, True)
        # where a row's pieces of 16 bytes begin decides the order of its sum
        torch.testing.assert_close(nll, expected, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(d_logits, expected_gradient)


@on_all
def test_what_the_loss_refuses(dtype, device):
    logits, targets = torch.randn(2, 5).to(device, dtype), torch.zeros(2, dtype=torch.int64, device=device)
    with pytest.raises(ValueError, match=r"^token_nll: soft_cap is -1\.0+; expected a number of at least 0, 0 for no cap"):
        elementwise.token_nll(logits, targets, False, soft_cap=-1.0)
    for scale in (0.0, -2.0, float("nan")):
        with pytest.raises(ValueError, match=r"^token_nll: logit_scale is .*; expected a number above 0"):
            elementwise.token_nll(logits, targets, False, logit_scale=scale)
