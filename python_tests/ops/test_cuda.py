"""The CUDA kernels on a GPU, against float64 on the CPU."""

import pytest
import torch
from support.fused import on_gpu
from torch.nn import functional as F

from locas_ext import _C, ops, reference

pytestmark = on_gpu
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ACTIVATIONS = ["silu", "gelu_pytorch_tanh", "gelu", "relu", "relu2", "quick_gelu"]
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def assert_as_good_as_torch(ours, torch_same_dtype, exact, dtype):
    """Our error is at most twice torch's at the same dtype, plus one rounding of the largest value."""
    exact = exact.double().cpu()
    ours_error = (ours.double().cpu() - exact).abs()
    torch_error = (torch_same_dtype.double().cpu() - exact).abs().max()
    allowed = 2 * torch_error + ROUNDING[dtype] * exact.abs().max()
    worst = ours_error.flatten().argmax().item()
    assert not ours_error.isnan().any() and ours_error.max() <= allowed, (
        f"worst at flat index {worst}: {ours.flatten()[worst]} instead of {exact.flatten()[worst]}, allowed error {allowed}"
    )


def ffn_inputs(seed, dtype, shape=(3, 17), d=72, m=200, rank=5):
    generator = torch.Generator().manual_seed(seed)

    def draw(*size, scale=1.0):
        return (torch.randn(*size, generator=generator) * scale).to("cuda", dtype)

    x = draw(*shape, d)
    weights = [draw(m, d, scale=d**-0.5), draw(m, d, scale=d**-0.5), draw(d, m, scale=m**-0.5)]
    return x, weights, draw(3, rank, d), draw(*shape, d)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d, m, rank, tokens", [(72, 200, 5, 51), (40, 33, 1, 1), (256, 768, 64, 300)])
def test_glu_ffn_forward_and_backward(dtype, activation, d, m, rank, tokens):
    x, weights, slots, dy = ffn_inputs(d + tokens, dtype, (tokens,), d, m, rank)

    def run(function, cast):
        xs = cast(x).detach().requires_grad_()
        s = cast(slots).detach().requires_grad_()
        y = function(xs, *map(cast, weights), s, 0.3, activation)
        return y, *torch.autograd.grad(y, (xs, s), cast(dy))

    ours = run(ops.glu_ffn, lambda t: t)
    plain = run(reference.glu_ffn, lambda t: t)
    exact = run(reference.glu_ffn, lambda t: t.double().cpu())
    for a, b, c in zip(ours, plain, exact, strict=False):
        assert_as_good_as_torch(a, b, c, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_elementwise_kernels_take_strided_and_unaligned_rows(dtype):
    big = torch.randn(37, 301, device="cuda").to(dtype)
    gate, up = big[:, 1:100], big[:, 150:249]
    out = torch.full((37, 120), float("nan"), device="cuda", dtype=dtype)
    _C.glu_activation_forward(gate, up, out[:, 5:104], 0, 1.0, torch.cuda.current_stream().cuda_stream)
    exact = F.silu(gate.double()) * up.double()
    assert_as_good_as_torch(out[:, 5:104], F.silu(gate) * up, exact, dtype)
    assert out[:, :5].isnan().all() and out[:, 104:].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_neuron_importance(dtype):
    x, (gate, up, _), _, _ = ffn_inputs(3, dtype, (129,), 64, 70)
    ours = ops.neuron_importance(x, gate, up)
    again = ops.neuron_importance(x, gate, up)
    exact = reference.neuron_importance(x.double(), gate.double(), up.double())
    assert torch.equal(ours, again)
    torch.testing.assert_close(ours.double(), exact, rtol=20 * ROUNDING[dtype], atol=0)


@pytest.mark.parametrize("copy_dtype", [None, *DTYPES])
@pytest.mark.parametrize(
    "shape",
    [(4, 3, 5, 72), (1, 3, 1, 33), (28, 3, 16, 2048), (2, 3, 4, 1000), (2, 3, 4, 640), (1, 3, 2, 4096), (1, 3, 2, 5124)],
)
def test_updates_match_the_reference(shape, copy_dtype):
    torch.manual_seed(sum(shape))
    slots = torch.randn(shape) * torch.rand(shape[:-1])[..., None] / shape[-1] ** 0.5
    exact = [t.double() for t in (slots, torch.zeros(shape), torch.zeros(shape))]
    ours = [t.cuda() for t in (slots, torch.zeros(shape), torch.zeros(shape))]
    copy = None if copy_dtype is None else torch.full(shape, float("nan"), device="cuda", dtype=copy_dtype)
    for step in range(1, 6):
        grad = torch.randn(shape) * 1e-3
        reference.update_slots_(exact[0], grad.double(), exact[1], exact[2], torch.tensor(step), torch.tensor(0.02))
        ops.update_slots_(
            ours[0],
            grad.cuda(),
            ours[1],
            ours[2],
            torch.tensor(step, device="cuda"),
            torch.tensor(0.02, device="cuda"),
            compute=copy,
        )
    for a, b in zip(ours, exact, strict=False):
        torch.testing.assert_close(a.cpu().double(), b, rtol=2e-5, atol=1e-7)
    assert ours[0].norm(dim=-1).max() <= 1 + 1e-6
    if copy is not None:
        assert torch.equal(copy, ours[0].to(copy_dtype))


def test_sgd_with_momentum_matches_the_reference():
    shape = (2, 3, 7, 40)
    torch.manual_seed(0)
    slots, grad = torch.randn(shape) * 0.1, torch.randn(shape)
    exact, exact_buffer = slots.double(), torch.zeros(shape).double()
    ours, buffer = slots.cuda(), torch.zeros(shape).cuda()
    for _ in range(4):
        reference.sgd_slots_(exact, grad.double(), torch.tensor(0.1), exact_buffer, 0.9)
        ops.sgd_slots_(ours, grad.cuda(), torch.tensor(0.1, device="cuda"), buffer, 0.9)
    torch.testing.assert_close(ours.cpu().double(), exact, rtol=2e-5, atol=1e-7)


def test_kernels_run_on_the_current_stream_and_in_a_graph():
    slots = torch.zeros(1, 3, 4, 64, device="cuda")
    states = [torch.zeros_like(slots) for _ in range(2)]
    grad = torch.randn_like(slots)
    step = torch.zeros((), dtype=torch.int64, device="cuda")
    rate = torch.tensor(0.01, device="cuda")
    expected = torch.zeros(1, 3, 4, 64)
    expected_states = [torch.zeros_like(expected) for _ in range(2)]

    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        step += 1
        ops.update_slots_(slots, grad, *states, step, rate)
    for replay in range(1, 4):
        graph.replay()
        reference.update_slots_(expected, grad.cpu(), *expected_states, torch.tensor(replay), torch.tensor(0.01))
    torch.testing.assert_close(slots.cpu(), expected, rtol=1e-5, atol=1e-6)


def test_another_device_is_an_error_that_names_the_tensor():
    x, weights, slots, _ = ffn_inputs(0, torch.float32)
    with pytest.raises(ValueError, match="slots is on cpu"):
        ops.glu_ffn(x, *weights, slots.cpu(), 1.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens, vocab", [(1, 1), (5, 257), (64, 4099)])
def test_token_nll(tokens, vocab, dtype):
    logits = (5 * torch.randn(tokens, vocab, device="cuda")).to(dtype).requires_grad_()
    targets = torch.randint(0, vocab, (tokens,), device="cuda")
    loss = ops.token_nll(logits, targets).sum()
    (gradient,) = torch.autograd.grad(loss, logits)
    exact_logits = logits.detach().double().requires_grad_()
    exact = F.cross_entropy(exact_logits, targets, reduction="sum")
    (exact_gradient,) = torch.autograd.grad(exact, exact_logits)
    peer = logits.detach().requires_grad_()
    (torchs,) = torch.autograd.grad(F.cross_entropy(peer.float(), targets, reduction="sum"), peer)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=1e-6)
    assert_as_good_as_torch(gradient, torchs, exact_gradient, dtype)
    logits.data[0, 0] = float("nan")
    assert ops.token_nll(logits, targets).sum().isnan()
