"""A memory on hosts that somebody else has touched, and in generate, autocast and batches."""

import pytest
import torch
from support.helpers import (
    SETTINGS,
    TEXT,
    attached,
    learned,
    logits_of,
    random_ids,
    tiny_model,
)
from support.lifecycle import IDS, families

import locas_ext as locas


# ---- hosts that somebody else has touched ---------------------------------------------------------------------
def test_a_hooked_projection_is_honoured():
    model, memory = learned()
    plain = logits_of(model, IDS)
    calls = []
    hook = model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(logits_of(model, IDS), plain)
    assert calls
    hook.remove()
    double = model.model.layers[0].mlp.up_proj.register_forward_hook(lambda module, args, y: 2 * y)
    assert not torch.allclose(logits_of(model, IDS), plain)
    double.remove()
    assert torch.equal(logits_of(model, IDS), plain)


@pytest.mark.parametrize("rehome", [False, True], ids=["plain", "rehomed"])
def test_a_hook_of_all_modules_is_honoured(rehome):
    model, memory = learned()
    if rehome:
        snapshot = memory.snapshot()
        memory.detach()
        memory = locas.attach(model, memory.config, rehome=True)
        memory.restore(snapshot)
    plain = logits_of(model, IDS)
    double = lambda module, args, y: 2 * y if isinstance(module, torch.nn.Linear) and module.out_features == 40 else None
    hooks = [module.register_forward_hook(double) for module in model.modules()]
    want = logits_of(model, IDS)
    for hook in hooks:
        hook.remove()
    hook = torch.nn.modules.module.register_module_forward_hook(double)
    try:
        assert torch.equal(logits_of(model, IDS), want) and not torch.allclose(want, plain)
    finally:
        hook.remove()
    assert torch.equal(logits_of(model, IDS), plain)


def test_a_linear_subclass_is_honoured():
    class Doubling(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = tiny_model()
    for layer in model.model.layers:
        layer.mlp.up_proj.__class__ = Doubling
    host = logits_of(model, IDS)
    memory = locas.attach(model, locas.LocasConfig(rank=4, init="gaussian"))
    assert "Doubling" in memory.status()[0].reason
    memory.memorize(TEXT, window=24, stride=8, learning_rate=0.0, progress=False)
    torch.testing.assert_close(logits_of(model, IDS), host)


def test_an_outer_wrapper_that_survives_detach_gets_the_host():
    """Somebody wraps the bound forward after attach and still holds it after detach."""
    model = tiny_model()
    host = logits_of(model, IDS)
    memory = locas.attach(model, locas.LocasConfig(rank=4))
    ffn = model.model.layers[0].mlp
    inner = ffn.forward
    ffn.forward = lambda x: inner(x)
    memory.memorize(TEXT, **SETTINGS)
    memory.detach()
    assert torch.equal(logits_of(model, IDS), host)


def test_weights_loaded_after_attach_are_used():
    model, memory = learned(scale=0.5)
    other = tiny_model(seed=9)
    model.load_state_dict(other.state_dict())
    with memory.disabled():
        assert torch.equal(logits_of(model, IDS), logits_of(other, IDS))
    twin = locas.attach(other, locas.LocasConfig(rank=4, scale=0.5))
    with torch.no_grad():
        twin.slots.copy_(memory.slots)
    assert torch.equal(logits_of(model, IDS), logits_of(other, IDS))


# ---- using a patched model ------------------------------------------------------------------------------------
@families
def test_generate_is_greedy_decoding_with_the_memory(family):
    model, memory = learned(family)
    prompt = TEXT[:6]
    generated = model.generate(prompt[None], max_new_tokens=6, do_sample=False, eos_token_id=None)[0]
    ids = prompt
    for _ in range(6):
        ids = torch.cat([ids, logits_of(model, ids)[-1].argmax()[None]])
    assert torch.equal(generated, ids)


@pytest.mark.parametrize("backend", ["matmul", "reference"])
def test_backends_learn_the_same(backend):
    memory = learned(backend=backend)[1]
    auto = learned()[1]
    assert (memory.slots - auto.slots).norm() < 0.02 * auto.slots.norm()
    assert backend in memory.status()[0].backend


def test_a_float64_host_runs_on_the_reference_and_learns():
    model, memory = learned(dtype=torch.float64)
    assert "reference" in memory.status()[0].backend
    assert (memory.slots - learned()[1].slots).norm() < 0.02 * memory.slots.norm()
    with pytest.raises(ValueError, match="float64"):
        attached(dtype=torch.float64, backend="matmul")


def test_autocast_around_a_patched_model():
    model, memory = learned()
    exact = logits_of(model, IDS)
    with memory.disabled():
        host = logits_of(model, IDS)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = logits_of(model, IDS).float()
    assert (rounded - exact).norm() < 0.1 * exact.norm() and (rounded - exact).norm() < (rounded - host).norm()


def test_a_batch_of_texts():
    model, _ = learned()
    batch = torch.stack([random_ids(10, seed) for seed in range(3)])
    with torch.no_grad():
        together = model(input_ids=batch).logits
    for row, ids in zip(together, batch, strict=False):
        torch.testing.assert_close(row, logits_of(model, ids), rtol=1e-4, atol=1e-5)
