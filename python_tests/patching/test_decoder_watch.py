"""The host's FFNs are looked at once per forward of the decoder; what changes after that, or outside of one, is seen too."""

from collections import Counter

import pytest
import torch
from support.helpers import TEXT, learned, logits_of
from torch import nn

from locas_ext.hosts.ffn import HostFFN


@pytest.fixture
def looks(monkeypatch):
    """How often the projections of each FFN were looked at."""
    counted = Counter()
    original = HostFFN.projection_obstacle

    def projection_obstacle(ffn):
        counted[id(ffn)] += 1
        return original(ffn)

    monkeypatch.setattr(HostFFN, "projection_obstacle", projection_obstacle)
    return counted


def test_once_per_forward(looks):
    model, memory = learned()[:2]
    logits_of(model, TEXT)  # finds the routes
    looks.clear()
    for count in (1, 2, 3):
        logits_of(model, TEXT)
        assert set(looks.values()) == {count} and len(looks) == len(memory.layers)


def doubled(module, arguments, output):
    return 2 * output


def hooked(mlp):
    mlp.up_proj.register_forward_hook(doubled)


def swapped(mlp):
    linear = nn.Linear(mlp.up_proj.in_features, mlp.up_proj.out_features, bias=False)
    with torch.no_grad():
        linear.weight.copy_(2 * mlp.up_proj.weight)
    mlp.up_proj = nn.Sequential(linear.requires_grad_(False))


@pytest.mark.parametrize("change", [hooked, swapped])
def test_a_change_in_the_middle_of_a_forward_is_seen_by_the_layers_behind_it(change):
    """As if it had been there from the beginning: the last layer's FFN has not run when the first one changes it."""
    expected_model = learned()[0]
    change(expected_model.model.layers[-1].mlp)
    expected = logits_of(expected_model, TEXT)
    model = learned()[0]
    before = logits_of(model, TEXT)

    def change_the_last(*_):
        handle.remove()
        change(model.model.layers[-1].mlp)

    handle = model.model.layers[0].register_forward_pre_hook(change_the_last)
    got = logits_of(model, TEXT)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(got, before, atol=1e-4)
    torch.testing.assert_close(logits_of(model, TEXT), expected, rtol=1e-5, atol=1e-5)


def test_an_ffn_called_alone_is_looked_at(looks):
    model = learned()[0]
    ffn, x = model.model.layers[0].mlp, torch.randn(1, 3, model.config.hidden_size)
    with torch.no_grad():
        before = ffn(x)
        looks.clear()
        hooked(ffn)
        assert not torch.allclose(ffn(x), before) and looks


def test_a_forward_of_another_host_inside_does_not_vouch_for_this_one(looks):
    """A hook on one host's layer runs the other's: each one's FFNs are looked at in its own forward."""
    outer, inner = learned()[0], learned(seed=3)[0]
    expected = logits_of(inner, TEXT)
    seen = []
    handle = outer.model.layers[0].register_forward_hook(lambda *_: seen.append(logits_of(inner, TEXT)))
    logits_of(outer, TEXT)
    handle.remove()
    assert torch.equal(seen[0], expected)
    hooked(inner.model.layers[0].mlp)
    handle = outer.model.layers[0].register_forward_hook(lambda *_: seen.append(logits_of(inner, TEXT)))
    logits_of(outer, TEXT)
    handle.remove()
    assert torch.equal(seen[1], logits_of(inner, TEXT)) and not torch.allclose(seen[1], expected, atol=1e-4)
