"""The per-token update on the fused kernels: the gradient stays in factors until the update forms it."""

import pytest
import torch
from support.fused import DTYPES, on_gpu

import locas_ext as locas
from locas_ext import reference
from locas_ext.ops.backends import slot_updates
from locas_ext.ops.types import AdamW, SlotFactors
from locas_ext.state.scope import Scope, scope_of


def a_learning_memory(backend, dtype=torch.bfloat16, layers=None):
    from support.helpers import attached  # the small hosts of the other tests

    model, memory = attached("llama")
    memory.detach()
    model = model.to("cuda", dtype)
    return model, locas.attach(model, locas.LocasConfig.paper(rank=6, layers=layers, backend=backend))


class TestFactors:
    pytestmark = on_gpu

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
    def test_memorizing_learns_as_with_a_gradient_buffer(self, optimizer, dtype, monkeypatch):
        from support.helpers import TEXT

        used, results = [], {}
        for name in ("adamw_slots_from_factors_", "sgd_slots_from_factors_"):
            original = getattr(slot_updates, name)
            monkeypatch.setattr(slot_updates, name, lambda *a, original=original, **k: (used.append(1), original(*a, **k)))
        for factors in (True, False):
            monkeypatch.setattr(slot_updates, "MOST_FACTOR_TOKENS", 64 if factors else 0)
            used.clear()
            _, memory = a_learning_memory("fused", dtype)
            update = locas.Backprop.paper(optimizer=optimizer, learning_rate=0.02 if optimizer == "adamw" else 0.5)
            report = memory.memorize(TEXT, window=24, stride=7, update=update, progress=False)
            assert bool(used) == factors and memory.slots.norm(dim=-1).max() <= 1 + 1e-5
            results[factors] = report.perplexity, memory.slots.clone()
        assert results[True][0] == pytest.approx(results[False][0], rel=2e-2)
        moved = (results[True][1] - results[False][1]).norm() / results[False][1].norm()
        assert moved < 0.05

    def test_one_update_is_that_of_the_formed_gradient(self):
        torch.manual_seed(3)
        layers, tokens, d, rank = 3, 37, 264, 10
        make = lambda *shape: torch.randn(*shape, device="cuda").bfloat16()
        factors = []
        gradient = torch.empty(layers, 3, rank, d, device="cuda", dtype=torch.float64)
        for layer in range(layers):
            parts = (
                make(tokens, 16)[:, :rank],
                make(tokens, 16)[:, 2 : 2 + rank],
                make(tokens, rank),
                make(tokens, d),
                make(tokens, d),
            )
            factors.append(SlotFactors())
            factors[-1].keep(*parts)
            d_gate, d_key, hidden, x, dy = (t.double() for t in parts)
            gradient[layer] = torch.stack([d_gate.T @ x, d_key.T @ x, hidden.T @ dy])
        slots = torch.randn(layers, 3, rank, d, device="cuda") / d**0.5
        exact = [slots.double(), torch.zeros_like(gradient), torch.zeros_like(gradient)]
        reference.update_slots_(exact[0], gradient * 0.25, exact[1], exact[2], torch.tensor(1), torch.tensor(0.01))
        copy, states = torch.empty_like(slots, dtype=torch.bfloat16), [torch.zeros_like(slots) for _ in range(2)]
        step, rate = torch.tensor(1, device="cuda"), torch.tensor(0.01, device="cuda")
        slot_updates.adamw_slots_from_factors_(slots, factors, 0.25, *states, step, rate, AdamW(), copy)
        for ours, truth in zip((slots, *states), exact, strict=False):
            torch.testing.assert_close(ours.double(), truth, rtol=1e-4, atol=1e-6)
        assert torch.equal(copy, slots.bfloat16())
        bound = sum(layer.norm_bound() for layer in factors)
        assert bound >= gradient.norm()

    def test_a_gradient_that_is_not_finite_changes_nothing(self, monkeypatch):
        from support.helpers import TEXT

        _, memory = a_learning_memory("fused")
        memory.memorize(TEXT[:40], window=24, stride=8, update=locas.Backprop.paper(), progress=False)
        before, version = memory.slots.clone(), memory.version
        keep = SlotFactors.keep
        spoiled = lambda self, d_gate, *others: keep(self, d_gate * float("inf"), *others)
        monkeypatch.setattr(SlotFactors, "keep", spoiled)
        with pytest.raises(locas.LocasError, match="the gradient is not finite"):
            memory.memorize(TEXT[:40], window=24, stride=8, update=locas.Backprop.paper(), progress=False)
        assert torch.equal(memory.slots, before) and memory.version == version
        assert all(arena.factors is None for arena in memory.state.arenas) and scope_of(memory.state) == Scope()
