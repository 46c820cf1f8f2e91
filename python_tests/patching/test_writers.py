"""Slots written by somebody else are in use at the next forward, whoever wrote them and however."""

import ctypes

import pytest
import torch
from support.helpers import SETTINGS, TEXT, attached, learned, logits_of
from support.hosts import tiny
from support.rehome import rehomed

import locas_ext as locas


def by_fused_adamw(memory):
    optimizer = torch.optim.AdamW(memory.parameters(), lr=0.05, fused=True)
    for parameter in memory.parameters():
        parameter.grad.normal_(generator=torch.Generator().manual_seed(3))
    optimizer.step()


def by_numpy(memory):
    memory.slots.numpy()[...] += 0.1


def by_pointer(memory):
    slots = memory.slots
    ctypes.memset(slots.data_ptr() + slots.numel() * 4 - 4, 0x3E, 4)  # the last number alone


def by_data_in_place(memory):
    memory.parameters()[-1].data.add_(0.1)


def by_new_data(memory):
    parameter = memory.parameters()[0]
    parameter.data = parameter.data.detach().clone() + 0.1


def by_new_data_of_another_dtype(memory):
    parameter = memory.parameters()[0]
    parameter.data = (parameter.data.detach() + 0.25).to(torch.bfloat16)


def in_inference_mode(memory):
    with torch.inference_mode():
        memory.slots.add_(0.1)


WRITERS = [
    by_fused_adamw,
    by_numpy,
    by_pointer,
    by_data_in_place,
    by_new_data,
    by_new_data_of_another_dtype,
    in_inference_mode,
]
writers = pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)


def host_and_memory(kind):
    if kind == "rehomed":
        model, memory = rehomed()
    elif kind == "mlp":
        model = tiny("opt")
        memory = locas.attach(model, locas.LocasConfig(rank=4, scale=0.5, variant="mlp"))
    else:
        model, memory = attached(dtype=getattr(torch, kind))
    return model, memory


def expected(kind, memory):
    """The logits of a fresh host with a copy of the slots, as anybody has to see them."""
    model, fresh = host_and_memory(kind)
    fresh.state.set_slots(memory.slots.clone(), version=1)
    return logits_of(model, TEXT)


@writers
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "mlp", "rehomed"])
@pytest.mark.parametrize("taught", [False, True], ids=["initialized", "taught"])
def test_what_was_written_is_in_use(kind, write, taught, tmp_path):
    model, memory = host_and_memory(kind)
    memory.initialize(TEXT[:30])
    if taught:
        memory.memorize(TEXT, **SETTINGS)
    before, version = logits_of(model, TEXT), memory.version
    write(memory)
    after = logits_of(model, TEXT)
    assert torch.equal(after, expected(kind, memory)) and not torch.equal(after, before)
    assert memory.version == version + 1 and memory.version == version + 1
    assert torch.equal(logits_of(model, TEXT), after)
    assert all(torch.equal(p, layer) for p, layer in zip(memory.parameters(), memory.slots, strict=True))
    memory.save_pretrained(tmp_path)
    again, other = host_and_memory(kind)
    other.detach()
    locas.load(again, tmp_path, rehome=kind == "rehomed")
    assert torch.equal(logits_of(again, TEXT), after)


def test_one_ffn_called_alone_sees_it_too():
    model, memory = attached()
    memory.initialize(TEXT[:30])
    x, ffn = torch.randn(3, 32), model.model.layers[1].mlp
    host = ffn(x).detach()
    by_pointer(memory)
    gate, key, value = memory.slots[1]
    torch.testing.assert_close(ffn(x), host + memory.scale[1] * (torch.nn.functional.silu(x @ gate.T) * (x @ key.T)) @ value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_stock_fused_optimizer_learns_as_an_unfused_one(dtype):
    losses = []
    for fused in (False, True):
        model, memory = attached(dtype=dtype)
        memory.initialize(TEXT[:30])
        optimizer = torch.optim.AdamW(memory.parameters(), lr=0.02, weight_decay=0.0, fused=fused, foreach=False)
        for _ in range(10):
            loss = model(input_ids=TEXT[None], labels=TEXT[None], use_cache=False).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert memory.version == 10
        with torch.no_grad():
            losses.append(model(input_ids=TEXT[None], labels=TEXT[None], use_cache=False).loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-3) and losses[1] < 0.9 * loss_of_the_host(dtype)


def loss_of_the_host(dtype):
    model, _ = attached(dtype=dtype)
    return model(input_ids=TEXT[None], labels=TEXT[None], use_cache=False).loss.item()


def test_a_replaced_tensor_of_another_shape_is_refused_by_name():
    model, memory = learned()
    memory.parameters()[1].data = torch.zeros(3, 2, 32)
    with pytest.raises(ValueError, match=r"parameter 1 was replaced .* \[3, 2, 32\]; expected \[3, 4, 32\]"):
        logits_of(model, TEXT)


def test_a_memory_that_was_handed_to_nobody_is_compared_with_nothing(monkeypatch):
    model, memory = attached()
    memory.memorize(TEXT, **SETTINGS)
    calls = []
    equal = torch.equal
    monkeypatch.setattr(torch, "equal", lambda a, b: calls.append(1) or equal(a, b))
    model.generate(TEXT[None, :8], max_new_tokens=4, do_sample=False)
    assert not calls and memory.state.arenas[0].seen is None
    memory.parameters()
    model.generate(TEXT[None, :8], max_new_tokens=4, do_sample=False)
    assert len(calls) == 1  # once a call, not once a token
    logits_of(model, TEXT)
    assert len(calls) == 2


def test_memorize_goes_on_from_what_others_wrote():
    slots = []
    for by_pointer_too in (False, True):
        model, memory = learned()
        if by_pointer_too:
            by_numpy(memory)
        else:
            memory.state.set_slots(memory.slots + 0.1, memory.version + 1)
        memory.state.arenas[0].forget_optimizer()
        memory.memorize(TEXT, **SETTINGS)
        slots.append(memory.slots.clone())
    assert torch.equal(*slots)


def test_a_compiled_host_sees_what_others_wrote():
    torch._dynamo.reset()
    model, memory = attached()
    memory.initialize(TEXT[:30])
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    memory.parameters()
    with torch.no_grad():
        untaught = compiled(input_ids=TEXT[None], use_cache=False).logits[0]
        by_fused_adamw(memory)
        taught = compiled(input_ids=TEXT[None], use_cache=False).logits[0]
    torch.testing.assert_close(untaught, logits_of(attached()[0], TEXT), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(taught, expected("float32", memory), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(taught, untaught)
