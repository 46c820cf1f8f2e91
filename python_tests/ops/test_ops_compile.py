"""The operations as torch.library operators: opcheck, and torch.compile without graph breaks equal to eager."""

import pytest
import torch
from support.helpers import logits_of, random_ids, repeated_text, tiny_model

import locas_ext as locas
from locas_ext import ops
from locas_ext.patching.compiled import in_use  # noqa: F401  registers the operator

TOKENS, D, M, R = 9, 20, 31, 5


def operands(biases=True, dtype=torch.float32):
    x, slots = torch.randn(TOKENS, D, dtype=dtype), torch.randn(3, R, D).to(dtype) / 4
    host = [torch.randn(M, D) / 4, torch.randn(M, D) / 4, torch.randn(D, M) / 5]
    host += [torch.randn(M), torch.randn(M), torch.randn(D)] if biases else [None] * 3
    return x, [t if t is None else t.to(dtype) for t in host], slots


def registered_operators():
    names = torch._C._dispatch_get_all_op_names()
    return sorted(name.removeprefix("locas::") for name in names if name.startswith("locas::"))


def samples():
    """Arguments for every registered operator; x and slots require a gradient where it has an autograd formula."""
    # One table: the arguments of all operators are read side by side, from the same few tensors.
    x, host, slots = operands()
    for t in (x, slots):
        t.requires_grad_()
    plain_x, plain_slots = x.detach(), slots.detach()
    glu = (x, *host[:3], slots, 0.5, "silu", "matmul", *host[3:])
    inference = (plain_x, *host[:3], plain_slots, 0.5, "silu", "matmul", *host[3:])
    y, gate, up, memory = torch.ops.locas.glu_ffn(*glu)
    dy, saved = torch.randn_like(y), (plain_x, gate.detach(), up.detach(), memory.detach())
    mlp_slots = torch.randn(2, R, D)
    pre = torch.ops.locas.sideway_mlp(plain_x, mlp_slots, 0.5, "gelu")[1]
    states = [torch.randn(2, 3, R, D) for _ in range(2)] + [torch.rand(2, 3, R, D) for _ in range(2)]
    copy, step, rate = torch.zeros(2, 3, R, D, dtype=torch.bfloat16), torch.tensor(3), torch.tensor(0.01)
    return {
        "glu_ffn": [glu, (x, *host[:3], slots, 0.5, "gelu", "matmul", None, None, None)],
        "glu_ffn_inference": [inference],
        "glu_ffn_backward": [
            (dy, *saved, *host[:3], plain_slots, 0.5, "silu", "matmul", needs_dx) for needs_dx in (True, False)
        ],
        "sideway_glu": [(x, slots, 0.5, "relu")],
        "sideway_glu_backward": [(dy, plain_x, saved[3], plain_slots, 0.5, "silu")],
        "sideway_mlp": [
            (x, mlp_slots.clone().requires_grad_(), 0.5, "relu"),
            (x, mlp_slots, 0.5, "gelu"),
            (plain_x, mlp_slots, 0.5, "relu"),
        ],
        "sideway_mlp_backward": [(dy, plain_x, pre, mlp_slots, 0.5, "gelu", needs_slots) for needs_slots in (True, False)],
        "write_slots_": [
            (torch.randn(2, 2, 7, D), 1, *torch.randn(2, 2, 5, D), 0.1, compute, norm)
            for compute, norm in ((torch.zeros(2, 2, 7, D).half(), torch.ones(5)), (None, None))
        ],
        "in_use": [(plain_x, 10**9)],  # the number of no memory
        "neuron_importance": [(plain_x, host[0], host[1], "silu", host[3], host[4])],
        "adamw_slots_": [(*states, step, rate, 0.9, 0.999, 1e-8, 0.0, True, compute) for compute in (copy, None)],
        "sgd_slots_": [
            (states[0], states[1], buffer, rate, momentum, 0.1, True, copy)
            for buffer, momentum in ((states[2], 0.9), (None, 0.0))
        ],
    }


def test_every_registered_operator_has_samples_here():
    assert registered_operators() == sorted(samples())


@pytest.mark.parametrize("name", registered_operators())
def test_opcheck(name):
    for arguments in samples()[name]:
        torch.library.opcheck(getattr(torch.ops.locas, name).default, arguments)


def run(function, x, host, slots):
    x, slots = x.clone().requires_grad_(), slots.clone().requires_grad_()
    y = function(x, host, slots)
    (y * torch.linspace(-1, 1, D)).sum().backward()
    return y.detach(), x.grad, slots.grad


def assert_compiles_like_eager(function, backend, *arguments, exactly=True):
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    for mine, eager in zip(run(compiled, *arguments), run(function, *arguments), strict=False):
        if exactly:
            assert torch.equal(mine, eager)
        else:
            torch.testing.assert_close(mine, eager)


@pytest.mark.parametrize("biases", [False, True])
def test_compiled_glu_ffn(biases):
    function = lambda x, host, slots: ops.glu_ffn(x, *host[:3], slots, 0.5, "silu", *host[3:])
    assert_compiles_like_eager(function, "aot_eager", *operands(biases))


def test_compiled_glu_ffn_with_leading_dimensions_and_half_x():
    x, host, slots = operands(dtype=torch.bfloat16)
    function = lambda x, host, slots: ops.glu_ffn(x.view(3, 3, D), *host[:3], slots, 0.5, "gelu", *host[3:])
    assert_compiles_like_eager(function, "aot_eager", x, host, slots.float())


def test_compiled_sideway_glu():
    function = lambda x, host, slots: ops.sideway_glu(x, slots, 0.5, "gelu_new")
    assert_compiles_like_eager(function, "aot_eager", *operands())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_sideway_mlp(dtype):
    x, host, slots = operands(dtype=dtype)
    function = lambda x, host, slots: ops.sideway_mlp(x.view(3, 3, D), slots, 0.5, "relu").view(-1, D)
    assert_compiles_like_eager(function, "aot_eager", x, host, slots[1:].float())


def test_compiled_inference_and_importance():
    x, host, slots = operands()
    function = lambda x: (ops.glu_ffn(x, *host[:3], slots, 0.5), ops.neuron_importance(x, *host[:2]))
    with torch.no_grad():
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        for mine, eager in zip(compiled(x), function(x), strict=False):
            assert torch.equal(mine, eager)


@pytest.mark.slow
def test_compiled_with_inductor():
    def function(x, host, slots):
        return (
            ops.glu_ffn(x, *host[:3], slots, 0.5, "silu", *host[3:])
            + ops.sideway_glu(x, slots, 0.25)
            + (ops.sideway_mlp(x, slots[1:], 0.25))
        )

    assert_compiles_like_eager(function, "inductor", *operands(), exactly=False)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_compiled_updates(optimizer):
    start = [torch.randn(2, 3, R, D) / 4, torch.randn(2, 3, R, D), torch.zeros(2, 3, R, D), torch.zeros(2, 3, R, D)]
    start.append(torch.zeros(2, 3, R, D, dtype=torch.bfloat16))

    def adamw(slots, grad, exp_avg, exp_avg_sq, copy):
        ops.update_slots_(slots, grad, exp_avg, exp_avg_sq, torch.tensor(1), torch.tensor(0.1), compute=copy)
        return slots * 2

    def sgd(slots, grad, buffer, unused, copy):
        ops.sgd_slots_(slots, grad, torch.tensor(0.1), buffer, 0.9, compute=copy)
        return slots * 2

    function = adamw if optimizer == "adamw" else sgd
    torch._dynamo.reset()
    compiled, eager = ([t.clone() for t in start] for _ in range(2))
    doubled = torch.compile(function, fullgraph=True, backend="aot_eager")(*compiled)
    assert torch.equal(doubled, function(*eager))
    assert all(torch.equal(a, b) for a, b in zip(compiled, eager, strict=False))
    assert not torch.equal(compiled[0], start[0]) and torch.equal(compiled[4], compiled[0].bfloat16())


def test_compiled_writing():
    slots, inputs, gradients = torch.randn(2, 2, 7, D), torch.randn(2, 5, D), torch.randn(2, 5, D)

    def function(slots, compute):
        norms = ops.write_slots_(slots, 1, inputs, gradients, 0.1, compute)
        return slots * norms.sum()

    torch._dynamo.reset()
    compiled, eager = ([slots.clone(), torch.zeros(2, 2, 7, D, dtype=torch.bfloat16)] for _ in range(2))
    product = torch.compile(function, fullgraph=True, backend="aot_eager")(*compiled)
    assert torch.equal(product, function(*eager))
    assert all(torch.equal(a, b) for a, b in zip(compiled, eager, strict=False)) and not torch.equal(eager[0], slots)


def test_a_compiled_model_computes_with_what_its_memory_has_learned():
    torch._dynamo.reset()
    model = tiny_model()
    memory = locas.attach(model, locas.LocasConfig(rank=4, scale="host"))
    compiled = torch.compile(model, backend="aot_eager")
    ids = random_ids(12)
    with torch.no_grad():
        before = compiled(input_ids=ids[None], use_cache=False).logits[0]
        torch.testing.assert_close(before, logits_of(model, ids))
        memory.memorize(repeated_text(16, 4), window=32, stride=16, progress=False)
        after = compiled(input_ids=ids[None], use_cache=False).logits[0]
    torch.testing.assert_close(after, logits_of(model, ids))
    assert not torch.allclose(before, after)
