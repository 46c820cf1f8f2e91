"""The host's FFNs are looked at again where something changed, between forwards of the decoder or inside one."""

from collections import Counter

import pytest
import torch
from support.helpers import TEXT, learned, logits_of
from torch import nn

from locas_ext.hosts.ffn import HostFFN


@pytest.fixture
def looks(monkeypatch):
    """How often each FFN was looked at."""
    counted = Counter()
    original = HostFFN.obstacle

    def obstacle(ffn):
        counted[id(ffn)] += 1
        return original(ffn)

    monkeypatch.setattr(HostFFN, "obstacle", obstacle)
    return counted


def test_nobody_looks_while_nothing_changes(looks):
    model = learned()[0]
    logits_of(model, TEXT)  # finds the routes
    looks.clear()
    for _ in range(3):
        logits_of(model, TEXT)
    assert not looks
    model.lm_head.register_forward_hook(lambda *_: None).remove()  # as any hook, wherever it is
    logits_of(model, TEXT)
    assert set(looks.values()) == {1} and len(looks) == len(model.model.layers)


def own_forward(module):
    forward = module.forward
    module.forward = lambda *arguments: forward(*arguments)


def other_class(module):
    module.__class__ = type("Linear", (nn.Linear,), {})


def frozen_no_more(mlp):
    mlp.down_proj.weight.requires_grad_(True)


def another_parameter(mlp):
    mlp.down_proj.weight = nn.Parameter(mlp.down_proj.weight.detach().clone())


def another_activation(mlp):
    mlp.act_fn = nn.Sequential(mlp.act_fn)


CHANGES = {
    "forward of a projection": (lambda mlp: own_forward(mlp.gate_proj), "gate_proj has a forward of its own"),
    "forward of the activation": (lambda mlp: own_forward(mlp.act_fn), "act_fn has a forward of its own"),
    "class of a projection": (lambda mlp: other_class(mlp.up_proj), "up_proj is a"),
    "requires_grad": (frozen_no_more, "down_proj requires a gradient"),
    "parameter": (another_parameter, "down_proj requires a gradient"),
    "activation": (another_activation, "act_fn is a"),
    "hook": (lambda mlp: mlp.up_proj.register_forward_pre_hook(lambda *_: None), "up_proj has hooks"),
    "projection": (lambda mlp: setattr(mlp, "up_proj", nn.Sequential(mlp.up_proj)), "up_proj is a"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_between_two_forwards_is_seen_by_the_next(name, looks):
    change, reason = CHANGES[name]
    model, memory = learned()[:2]
    expected = logits_of(model, TEXT)
    logits_of(model, TEXT)
    looks.clear()
    change(model.model.layers[0].mlp)
    ffn = memory._attachment.ffns[0]
    torch.testing.assert_close(logits_of(model, TEXT), expected, rtol=1e-5, atol=1e-5)  # none changes what comes out
    assert looks and reason in ffn.ffn.seen_obstacle()
    looks.clear()
    logits_of(model, TEXT)
    assert not looks and reason in ffn.ffn.seen_obstacle()


def test_a_class_whose_forward_is_replaced_is_seen(monkeypatch, looks):
    model, memory = learned()[:2]
    logits_of(model, TEXT)
    mlp = type(model.model.layers[0].mlp)
    forward = mlp.forward
    monkeypatch.setattr(mlp, "forward", lambda self, x: forward(self, x))
    logits_of(model, TEXT)
    assert "whose forward was replaced" in memory._attachment.ffns[0].ffn._seen.obstacle


def test_an_ffn_is_followed_however_often_it_is_swapped():
    model, memory = learned()[:2]
    expected = logits_of(model, TEXT)
    for _ in range(3):
        old = model.model.layers[1].mlp
        new = type(old)(model.config).eval().requires_grad_(False)
        new.load_state_dict(old.state_dict())
        model.model.layers[1].mlp = new
        torch.testing.assert_close(logits_of(model, TEXT), expected, rtol=1e-5, atol=1e-5)
        assert memory._attachment.ffns[1].ffn.module is new and "forward" not in old.__dict__
    hooked(new)
    assert not torch.allclose(logits_of(model, TEXT), expected, atol=1e-4)


def test_layers_that_change_places_take_their_memory_along():
    model = learned()[0]
    expected = learned()[0]
    for each in (model, expected):
        logits_of(each, TEXT)
    layers = model.model.layers
    layers[0], layers[1] = layers[1], layers[0]
    forwards = [layer.mlp.forward for layer in layers]
    logits_of(model, TEXT)
    assert [layer.mlp.forward for layer in layers] == forwards  # bound as they were, each with its own slots


def test_a_copied_host_is_looked_at_itself(looks):
    model, memory = learned()[:2]
    expected = logits_of(model, TEXT)
    fork = memory.fork()
    assert torch.equal(logits_of(fork.model, TEXT), expected)
    looks.clear()
    frozen_no_more(fork.model.model.layers[0].mlp)  # of the weight that both share
    logits_of(fork.model, TEXT)
    assert set(looks) == {id(fork._attachment.ffns[0].ffn)}
    looks.clear()
    own_forward(fork.model.model.layers[0].mlp.up_proj)  # of the copy alone
    logits_of(fork.model, TEXT)
    assert looks and "up_proj has a forward" in fork._attachment.ffns[0].ffn._seen.obstacle


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
