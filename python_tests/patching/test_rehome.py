"""Re-homed weights give the same results; which hosts and settings are refused."""

import pytest
import torch
import transformers
from support.devices import DEVICES
from support.helpers import (
    SETTINGS,
    TEXT,
    act_formula,
    act_torch,
    assert_as_exact_as_torch,
    assert_same_host,
    attached,
    logits_of,
    plain_ffn,
    snapshot,
    tiny_model,
)
from support.rehome import HOME, IDS, learned, reasons, rehomed

import locas_ext as locas


# ---- the numbers ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("needs_dx", [True, False])
@pytest.mark.parametrize("biases", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_one_ffn_and_its_gradients_are_as_exact_as_torch(device, dtype, biases, needs_dx):
    rank, m, d = 3, 37, 32
    model, memory = rehomed(rank=rank, dtype=dtype, model_settings={"intermediate_size": m, "mlp_bias": biases})
    model.to(device)
    ffn, state = memory._attachment.ffns[0], memory.state
    arena = ffn.arena
    for parameter in ffn.ffn.module.parameters():  # biases start at 0
        parameter.data.copy_(torch.randn(parameter.shape) * parameter.shape[-1] ** -0.5)
    state.set_slots(torch.randn(state.shape) * d**-0.5, version=1)
    x, dy = torch.randn(11, d).to(device, dtype), torch.randn(11, d).to(device, dtype)
    ffn.forward(x)  # takes memory and buffers to the device
    slots = arena.compute[0]

    def run(function, cast, parameter):
        xs = cast(x).clone().requires_grad_(needs_dx)
        y = function(xs)
        inputs = (xs, parameter) if needs_dx else (parameter,)
        return [y.detach(), *torch.autograd.grad(y, inputs, cast(dy))]

    def peer(cast, act):
        host = [None if w is None else cast(w.detach()) for w in ffn.ffn.weights()]
        parameter = cast(slots).clone().requires_grad_()
        return run(lambda xs: plain_ffn(xs, host, parameter, arena.scales[0], "silu", act), cast, parameter)

    ours = run(ffn.forward, lambda t: t, arena.parameters[0])
    assert ffn.rehomed.reason is None
    for name, a, b, c in zip(
        ["y", "dx", "d_slots"] if needs_dx else ["y", "d_slots"],
        ours,
        peer(lambda t: t, act_torch),
        peer(torch.Tensor.double, act_formula),
        strict=False,
    ):
        assert_as_exact_as_torch(name, a.to(dtype), b, c)
    with torch.no_grad():
        assert torch.equal(ffn.forward(x), ours[0])


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_memorizing_learns_what_the_plain_path_learns(family):
    model, memory = learned(family=family)
    plain_model, plain = attached(family, rank=5)
    plain.memorize(TEXT, **SETTINGS)
    torch.testing.assert_close(memory.slots, plain.slots, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(logits_of(model, IDS), logits_of(plain_model, IDS), rtol=1e-3, atol=1e-4)
    assert reasons(memory) == {HOME} and {s.backend for s in memory.status()} == {"matmul, whole"}


def test_every_change_of_the_slots_reaches_the_buffers(tmp_path):
    model, memory = learned()
    taught = logits_of(model, IDS)
    first = memory.snapshot()
    memory.save_pretrained(tmp_path)
    with torch.no_grad():
        memory.slots.mul_(0.5)  # from outside
    halved = logits_of(model, IDS)
    assert not torch.equal(halved, taught)
    plain_model, plain = attached(rank=5)
    plain.restore(memory.snapshot())
    torch.testing.assert_close(halved, logits_of(plain_model, IDS), rtol=1e-4, atol=1e-5)
    memory.restore(first)
    assert torch.equal(logits_of(model, IDS), taught)
    memory.reset()
    memory.load(tmp_path)
    assert torch.equal(logits_of(model, IDS), taught)
    other = tiny_model()
    assert reasons(locas.load(other, tmp_path, rehome=True)) == {HOME}
    assert torch.equal(logits_of(other, IDS), taught)
    torch.optim.SGD(memory.parameters(), lr=0.1).step()  # gradients are 0: the same slots, another version
    assert torch.equal(logits_of(model, IDS), taught)


def test_a_loaded_scale_reaches_the_buffers():
    model, memory = learned()
    plain_model, plain = attached(rank=5)
    with torch.no_grad():
        state = memory.snapshot()
        state.tensors["scale"].mul_(-2.0)
    memory.restore(state)
    plain.restore(state)
    torch.testing.assert_close(logits_of(model, IDS), logits_of(plain_model, IDS), rtol=1e-4, atol=1e-5)


# ---- refused --------------------------------------------------------------------------------------------------------
def phi3():
    config = transformers.Phi3Config(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=None,
    )
    return transformers.Phi3ForCausalLM(config).eval()


def tied():
    model = tiny_model()
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    return model


def hooked():
    model = tiny_model()
    model.model.layers[0].mlp.gate_proj.register_forward_hook(lambda *_: None)
    return model


@pytest.mark.parametrize(
    "make, backend, message",
    [
        (phi3, "auto", "layer 0: its gate and up rows are one parameter"),
        (tied, "auto", "layer 0: up is tied to another parameter"),
        (hooked, "auto", "layer 0: gate_proj has hooks"),
        (tiny_model, "reference", "backend is 'reference'"),
        (lambda: tiny_model(dtype=torch.float64), "auto", "float64"),
    ],
    ids=["fused projections", "tied", "hooks", "reference", "float64"],
)
def test_hosts_that_cannot_be_rehomed_are_refused_and_left_alone(make, backend, message):
    model = make()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        locas.attach(model, locas.LocasConfig(rank=4, backend=backend), rehome=True)
    assert_same_host(model, before)
    locas.attach(model, locas.LocasConfig(rank=4, backend=backend)).detach()


def test_weights_in_another_memorys_buffers_are_refused():
    _, memory = rehomed()
    fork = memory.fork()
    fork.detach()
    with pytest.raises(ValueError, match="shares its storage"):
        locas.attach(fork.model, locas.LocasConfig(rank=4), rehome=True)


def test_a_failure_while_moving_leaves_the_model_as_it_was(monkeypatch):
    from locas_ext.patching import rehome

    model = tiny_model()
    before, moved, adopt = snapshot(model), [], rehome.RehomedFFN.adopt

    def fails_at_the_second(self, users):
        if moved:
            raise torch.OutOfMemoryError("out of memory")
        moved.append(self)
        adopt(self, users)

    monkeypatch.setattr(rehome.RehomedFFN, "adopt", fails_at_the_second)
    with pytest.raises(torch.OutOfMemoryError):
        locas.attach(model, locas.LocasConfig(rank=4), rehome=True)
    assert_same_host(model, before)
    assert all(parameter.is_contiguous() for parameter in model.parameters())
