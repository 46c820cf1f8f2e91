"""What traces, intercepts or transforms the operations gets right numbers too."""

import contextlib

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from support.helpers import learned, tiny_opt
from support.seen import Seen, SeenFunctions
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import locas_ext as locas
from locas_ext import ops, reference

pytestmark = pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.trace:DeprecationWarning")
T, D, M, R, V = 6, 16, 24, 4, 11


class Subclass(torch.Tensor):
    pass


# ---- the operations ---------------------------------------------------------------------------------------------
def operands():
    torch.manual_seed(3)
    gate, up, down = torch.randn(M, D) / 4, torch.randn(M, D) / 4, torch.randn(D, M) / 5
    bias, slots, targets = torch.randn(M), torch.randn(3, R, D) / 4, torch.randint(V, (T,))
    head = torch.randn(V, D)
    return gate, up, down, bias, slots, targets, head


def operation(name, module=ops):
    """x [T, D] -> the operation's result; the reference has no token_nll."""
    gate, up, down, bias, slots, targets, head = operands()
    if name == "token_nll":
        plain = lambda logits: torch.nn.functional.cross_entropy(logits, targets[: len(logits)], reduction="none")
        ours = lambda logits: ops.token_nll(logits, targets[: len(logits)])
        return lambda x: (ours if module is ops else plain)(x @ head.T)
    return {
        "glu_ffn": lambda x: module.glu_ffn(x, gate, up, down, slots, 0.5, "gelu", bias, None, down[:, 0].contiguous()),
        "sideway_glu": lambda x: module.sideway_glu(x, slots, 0.5),
        "sideway_mlp": lambda x: module.sideway_mlp(x, slots[1:].contiguous(), 0.5, "silu"),
        "neuron_importance": lambda x: module.neuron_importance(x, gate, up, "silu", bias),
    }[name]


OPERATIONS = ["glu_ffn", "sideway_glu", "sideway_mlp", "neuron_importance", "token_nll"]
DIFFERENTIABLE = [name for name in OPERATIONS if name != "neuron_importance"]
REGISTERED = OPERATIONS[:4]  # token_nll is plain torch in a trace


def close(ours, expected):
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("name", OPERATIONS)
def test_a_recorded_graph_computes_the_operation(name, gradients):
    ours, expected = operation(name), operation(name, reference)
    x, other = torch.randn(T, D), torch.randn(T, D)
    with torch.set_grad_enabled(gradients):
        traced, graph = torch.jit.trace(ours, x, check_trace=False), make_fx(ours)(x)
        for retraced in (traced, graph):
            close(retraced(other), expected(other))
    if name in REGISTERED:
        assert f"locas::{name}" in str(traced.graph) and f"locas.{name}" in graph.code


@pytest.mark.parametrize("name", REGISTERED[:3])
def test_a_traced_graph_takes_other_numbers_of_tokens(name):
    with torch.no_grad():
        traced = torch.jit.trace(operation(name), torch.randn(T, D), check_trace=False)
        for tokens in (1, 2, 3 * T):
            x = torch.randn(tokens, D)
            close(traced(x), operation(name, reference)(x))


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_a_graph_recorded_with_gradients_is_differentiable(name):
    x = torch.randn(T, D, requires_grad=True)
    (expected,) = torch.autograd.grad(operation(name, reference)(x).sum(), x)
    graph = make_fx(operation(name))(x)
    traced = torch.jit.trace(operation(name), x, check_trace=False)
    for retraced in (graph, traced):
        (gradient,) = torch.autograd.grad(retraced(x).sum(), x)
        close(gradient, expected)


def test_a_graph_recorded_without_refuses_a_gradient():
    with torch.no_grad():
        graph = make_fx(operation("glu_ffn"))(torch.randn(T, D))
    y = graph(torch.randn(T, D, requires_grad=True))
    with pytest.raises(RuntimeError, match="locas::glu_ffn_inference has no gradient"):
        y.sum().backward()


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_mode_sees_the_operator(name):
    x = torch.randn(T, D)
    with torch.no_grad():
        for mode in (Seen(), SeenFunctions()):
            with mode:
                y = operation(name)(x)
            close(y, operation(name, reference)(x))
            if name in REGISTERED:
                assert any(f"locas.{name}" in seen for seen in mode.names)


@pytest.mark.parametrize("name", OPERATIONS)
def test_wrapped_and_special_tensors(name):
    x = torch.randn(T, D)
    ours, expected = operation(name), operation(name, reference)
    with torch.no_grad():
        assert type(ours(x.as_subclass(Subclass))) is Subclass
        close(ours(x.as_subclass(Subclass)).as_subclass(torch.Tensor), expected(x))
        close(ours(torch._neg_view(x)), expected(-x))
        close(ours(torch._efficientzerotensor(T, D)), expected(torch.zeros(T, D)))


@pytest.mark.parametrize("kind", ["fake", "meta"])
def test_tensors_without_data_give_shapes(kind):
    gate, up, down, _, slots, targets, _ = operands()
    mode = FakeTensorMode() if kind == "fake" else contextlib.nullcontext()
    to = mode.from_tensor if kind == "fake" else lambda t: t.to("meta")
    with mode, torch.no_grad():
        x, gate, up, down, slots, targets = (to(t) for t in (torch.randn(T, D), gate, up, down, slots, targets))
        results = {
            "glu_ffn": ops.glu_ffn(x, gate, up, down, slots, 0.5),
            "sideway_glu": ops.sideway_glu(x, slots, 0.5),
            "sideway_mlp": ops.sideway_mlp(x, slots[1:], 0.5),
            "importance": ops.neuron_importance(x, gate, up),
            "nll": ops.token_nll(x, targets),
        }
    shapes = {"importance": (M,), "nll": (T,)}
    for name, result in results.items():
        assert result.shape == shapes.get(name, (T, D)) and (kind == "fake" or result.is_meta)


@pytest.mark.parametrize("name", OPERATIONS)
def test_vmap(name):
    batch = torch.randn(3, T, D)
    close(torch.vmap(operation(name))(batch), torch.stack([operation(name, reference)(x) for x in batch]))


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_derivatives_of_all_kinds(name):
    ours, expected = operation(name), operation(name, reference)
    x, tangent = torch.randn(2, T, D)
    close(torch.func.grad(lambda x: ours(x).sum())(x), torch.func.grad(lambda x: expected(x).sum())(x))
    close(torch.func.jvp(ours, (x,), (tangent,)), torch.func.jvp(expected, (x,), (tangent,)))
    with forward_ad.dual_level():
        for mine, other in zip(
            *(forward_ad.unpack_dual(f(forward_ad.make_dual(x, tangent))) for f in (ours, expected)), strict=True
        ):
            close(mine, other)


def test_transforms_inside_a_compiled_function():
    ours, expected = operation("glu_ffn"), operation("glu_ffn", reference)
    x, tangent = torch.randn(2, T, D)
    for transform in (
        lambda f: lambda x: torch.func.grad(lambda x: f(x).square().sum())(x),
        lambda f: lambda x: torch.func.jvp(f, (x,), (tangent,))[1],
    ):
        torch._dynamo.reset()
        close(torch.compile(transform(ours), backend="aot_eager", fullgraph=True)(x), transform(expected)(x))


# ---- updates --------------------------------------------------------------------------------------------------------
def update(name, tensors):
    slots, grad, *states = tensors
    if name == "update_slots_":
        ops.update_slots_(slots, grad, *states, 3, 0.1, weight_decay=0.1)
    elif name == "sgd_slots_":
        ops.sgd_slots_(slots, grad, 0.1, states[0], 0.9)
    else:
        ops.write_slots_(slots, 1, grad[:, 0, :2], grad[:, 1, :2], 0.1)


@pytest.mark.parametrize("name", ["update_slots_", "sgd_slots_", "write_slots_"])
def test_updates_are_seen_by_a_mode_and_refused_in_a_transform(name):
    tensors = [torch.randn(2, 2, 5, D) / 4 for _ in range(3)] + [torch.rand(2, 2, 5, D)]
    plain, seen = [t.clone() for t in tensors], [t.clone() for t in tensors]
    update(name, plain)
    with Seen() as mode:
        update(name, seen)
    assert any("locas." in each for each in mode.names)
    assert all(torch.equal(a, b) for a, b in zip(plain, seen, strict=True)) and not torch.equal(seen[0], tensors[0])
    assert seen[0]._version == plain[0]._version > 0
    batched = [t[None].clone() for t in tensors]
    with pytest.raises(RuntimeError, match=f"{name}: works in place and cannot run in a transform"):
        torch.vmap(lambda *tensors: update(name, tensors))(*batched)
    assert torch.equal(batched[0][0], tensors[0])


# ---- a patched model ------------------------------------------------------------------------------------------------
def learned_opt():
    model = tiny_opt()
    memory = locas.attach(model, locas.LocasConfig(variant="mlp", rank=4, scale="host"))
    memory.memorize(torch.arange(3, 35), window=16, stride=8, learning_rate=0.05, progress=False)
    return model, memory


@pytest.mark.parametrize("host", [lambda: learned()[:2], learned_opt], ids=["glu", "mlp"])
def test_a_patched_model(host):
    model, memory = host()
    ids, other = torch.arange(3, 19)[None], torch.arange(19, 35)[None]
    mask = torch.full((1, 1, 16, 16), -torch.inf).triu(1)  # whole, so that the host makes none: that reads values
    given = dict(attention_mask=mask, position_ids=torch.arange(16)[None], use_cache=False, return_dict=False)
    logits = lambda ids: model(input_ids=ids, **given)[0]
    with torch.no_grad():
        expected = logits(other)
        with memory.disabled():
            assert not torch.allclose(logits(other), expected, atol=1e-3)
        traced = torch.jit.trace(logits, ids, check_trace=False)
        assert "locas::" in str(traced.inlined_graph)
        close(traced(other), expected)
        close(make_fx(logits)(ids)(other), expected)
        with Seen() as mode:
            close(logits(other), expected)
    assert any("locas." in name for name in mode.names)


def test_a_patched_ffn_in_a_transform():
    model = learned()[0]
    ffn, x = model.model.layers[0].mlp, torch.randn(5, 32, requires_grad=True)
    (expected,) = torch.autograd.grad(ffn(x).square().sum(), x)
    close(torch.func.grad(lambda x: ffn(x).square().sum())(x.detach()), expected)
    with torch.no_grad():
        close(torch.vmap(ffn)(x[:, None]), ffn(x)[:, None])


@pytest.mark.parametrize("variant", ["glu", "mlp"])
def test_memorizing_in_a_mode_learns_the_same(variant):
    learn = (lambda: learned()[:2]) if variant == "glu" else learned_opt
    expected = learn()[1]
    with Seen() as mode:
        memory = learn()[1]
    assert any("locas." in name for name in mode.names) and memory.version == expected.version
    torch.testing.assert_close(memory.slots, expected.slots, rtol=1e-3, atol=1e-4)
