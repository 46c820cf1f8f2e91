"""The five initializations and the output scale against what forward hooks see on the plain host."""

import copy

import pytest
import torch
from support.helpers import FAMILIES, SETTINGS, TEXT, act_formula, attached, tiny_model

import locas_ext as locas

CHUNK = TEXT[:30]
INITS = ("topk", "bottomk", "random", "gaussian", "activation")


def unit(rows):
    return rows / rows.norm(dim=-1, keepdim=True)


def observed(model, ids):
    """Per layer, in float64: the FFN's inputs [T, d], W_gate, W_up, W_down, and the importance [m]."""
    plain, inputs = copy.deepcopy(model).double(), []
    for layer in plain.model.layers:
        layer.mlp.register_forward_hook(lambda module, args, y: inputs.append(args[0][0]))
    with torch.no_grad():
        plain(input_ids=ids[None])
    for x, layer in zip(inputs, plain.model.layers, strict=False):
        gate, up, down = (getattr(layer.mlp, name).weight.detach() for name in ("gate_proj", "up_proj", "down_proj"))
        hidden = act_formula(x @ gate.T, plain.config.hidden_act) * (x @ up.T)
        yield x, gate, up, down, hidden.abs().mean(0)


def neurons_of(slots, gate, up):
    """Which host neurons these slots are clones of, by their directions; fails if they are of none."""
    similarity = unit(slots[0].double()) @ unit(gate).T + unit(slots[1].double()) @ unit(up).T
    best = similarity.max(-1)
    assert (best.values > 2 - 1e-5).all(), "a slot is no clone of a neuron"
    return best.indices


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("init", ["topk", "bottomk"])
def test_topk_and_bottomk_clone_the_most_and_least_used_neurons(family, init):
    model, memory = attached(family, rank=6, init=init)
    memory.initialize(CHUNK)
    for slots, (_, gate, up, _, importance) in zip(memory.slots, observed(model, CHUNK), strict=False):
        order = importance.argsort(descending=init == "topk")
        assert set(neurons_of(slots, gate, up).tolist()) == set(order[:6].tolist())


def test_random_clones_different_neurons_by_seed():
    chosen = []
    for seed in (0, 0, 1):
        model, memory = attached(rank=6, init="random")
        memory.detach()
        memory = locas.attach(model, locas.LocasConfig(rank=6, init="random", seed=seed))
        memory.initialize(CHUNK)
        layers = [
            neurons_of(s, gate, up).tolist()
            for s, (_, gate, up, _, _) in zip(memory.slots, observed(model, CHUNK), strict=False)
        ]
        assert all(len(set(layer)) == 6 for layer in layers) and layers[0] != layers[1]
        chosen.append(layers)
    assert chosen[0] == chosen[1] != chosen[2]


def test_gaussian_rows_are_random_directions():
    _, memory = attached(rank=400, init="gaussian")
    memory.initialize(CHUNK)
    rows = memory.slots[:, :2].flatten(0, 2)
    assert len(rows.unique(dim=0)) == len(rows)
    # directions in d = 32 dimensions: coordinates of mean 0 and variance 1/d
    assert rows.mean().abs() < 0.01 and (rows.var() * 32 - 1).abs() < 0.05
    again = attached(rank=400, init="gaussian")[1]
    again.initialize(CHUNK)
    assert torch.equal(again.slots, memory.slots)


def test_activation_takes_ffn_inputs_of_different_tokens():
    model, memory = attached(rank=6, init="activation")
    memory.initialize(CHUNK)
    for slots, (x, *_) in zip(memory.slots, observed(model, CHUNK), strict=False):
        assert torch.equal(slots[0], slots[1])
        best = (slots[0].double() @ unit(x).T).max(-1)
        assert (best.values > 1 - 1e-5).all() and len(set(best.indices.tolist())) == 6


@pytest.mark.parametrize("init", INITS)
def test_every_init_has_unit_rows_and_no_values_and_is_no_update(init):
    _, memory = attached(rank=6, init=init)
    memory.initialize(CHUNK)
    torch.testing.assert_close(memory.slots[:, :2].norm(dim=-1), torch.ones(2, 2, 6))
    assert not memory.slots[:, 2].any() and memory.version == 0


@pytest.mark.parametrize("init", INITS)
def test_every_init_can_learn(init):
    _, memory = attached(rank=6, init=init, scale=1.0)
    report = memory.memorize(TEXT.repeat(2), window=24, stride=8, learning_rate=1e-2, progress=False)
    silent = attached(rank=6, init=init, scale=1.0)[1].memorize(
        TEXT.repeat(2), window=24, stride=8, learning_rate=0.0, progress=False
    )
    assert report.nll < silent.nll


def test_memorize_initializes_from_its_first_chunk():
    _, memory = attached(rank=6)
    memory.initialize(TEXT[:8])
    rows = memory.slots.clone()
    _, other = attached(rank=6)
    other.memorize(TEXT, **{**SETTINGS, "learning_rate": 0.0})
    torch.testing.assert_close(other.slots, rows, rtol=1e-6, atol=0)  # every update clips


def test_initialize_again_forgets_what_was_learned():
    model, memory = attached(rank=6)
    memory.memorize(TEXT, **SETTINGS)
    memory.initialize(CHUNK)
    fresh = attached(rank=6)[1]
    fresh.initialize(CHUNK)
    assert torch.equal(memory.slots, fresh.slots) and memory.version == 0 and memory.state.whole("exp_avg") is None


def test_initialization_does_not_depend_on_the_training_mode():
    model, memory = attached("llama", rank=6, model_settings=dict(attention_dropout=0.5))
    memory.initialize(CHUNK)
    rows = memory.slots.clone()
    model.train()
    memory.initialize(CHUNK)
    assert torch.equal(memory.slots, rows) and model.training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", ["paper", "host", 0.125, -2, 3])
def test_scale(scale, dtype):
    model = tiny_model(num_hidden_layers=3, dtype=dtype)
    memory = locas.attach(model, locas.LocasConfig(rank=6, scale=scale, layers=[2, 0]))
    for layer, tau in zip((0, 2), memory.scale.tolist(), strict=False):
        down = model.model.layers[layer].mlp.down_proj.weight.double()
        mean = sum(down[:, j].square().sum().sqrt() for j in range(down.shape[1])) / down.shape[1]
        expected = {"paper": mean / 6, "host": mean}.get(scale, scale)
        assert tau == pytest.approx(float(expected), rel=1e-5)


def test_the_scale_does_not_change_while_learning():
    _, memory = attached()
    before = memory.scale.clone()
    memory.memorize(TEXT, **SETTINGS)
    assert torch.equal(memory.scale, before)


@pytest.mark.parametrize("clip", [True, False])
def test_clip_setting(clip):
    _, memory = attached(clip=clip)
    memory.memorize(TEXT.repeat(2), window=24, stride=8, learning_rate=0.5, progress=False)
    longest = memory.slots.norm(dim=-1).max()
    assert longest <= 1 + 1e-6 if clip else longest > 1.5


# ---- where the paper is silent --------------------------------------------------------------------------------
@pytest.mark.parametrize("init", INITS)
def test_rows_as_long_as_the_hosts(init):
    model, memory = attached(rank=6, init=init, row_length="host")
    memory.initialize(CHUNK)
    for slots, (_, gate, up, _, _) in zip(memory.slots.double(), observed(model, CHUNK), strict=True):
        for rows, host in ((slots[0], gate), (slots[1], up)):
            if init in ("gaussian", "activation"):
                torch.testing.assert_close(rows.norm(dim=-1), host.norm(dim=-1).mean().expand(6), rtol=1e-5, atol=0)
            else:
                assert (rows[:, None] - host).norm(dim=-1).min(-1).values.max() < 1e-5


@pytest.mark.parametrize("scale", ["host", "paper", 0.3])
def test_rows_are_clipped_at_lengths_relative_to_the_hosts(scale):
    clip = 0.4
    model, memory = attached(rank=6, scale=scale, clip=clip, row_length="host")
    memory.memorize(TEXT, **{**SETTINGS, "learning_rate": 0.5}, on_divergence="ignore")
    for slots, tau, (_, gate, up, down, _) in zip(memory.slots, memory.scale.tolist(), observed(model, CHUNK), strict=True):
        host = [gate.norm(dim=-1).mean(), up.norm(dim=-1).mean(), down.norm(dim=0).mean() / tau]
        for rows, length in zip(slots, host, strict=True):
            longest = rows.norm(dim=-1).max().item()
            assert longest == pytest.approx(clip * float(length), rel=1e-4)


# ---- init="activation" with scale="host" ---------------------------------------------------------------------
def test_rates_at_which_activation_rows_diverge_are_refused():
    _, memory = attached(init="activation")
    for rate in (dict(update=locas.Backprop()), dict(learning_rate=2e-3)):
        with pytest.raises(ValueError, match=r"learning_rate is 0.00[26].*init='activation' with scale='host'.*scale='paper'"):
            memory.memorize(TEXT, window=24, stride=8, progress=False, **rate)
    assert memory.version == 0 and not memory.state.initialized
    memory.memorize(TEXT, window=24, stride=8, progress=False, learning_rate=1e-4)
    assert memory.version == 8
    _, other = attached(init="activation")
    other.memorize(TEXT, window=24, stride=8, progress=False)  # a default that it bears
    assert torch.equal(other.slots, memory.slots)


@pytest.mark.parametrize(
    "changes, settings",
    [
        (dict(scale="paper"), {}),
        (dict(scale=0.3), {}),
        (dict(init="topk"), {}),
        ({}, dict(on_divergence="ignore")),
    ],
    ids=str,
)
def test_others_are_not(changes, settings):
    _, memory = attached(**{"init": "activation", **changes})
    memory.memorize(TEXT, window=24, stride=8, progress=False, **settings)
    assert memory.version == 8


# ---- a host that is not finite --------------------------------------------------------------------------------
@pytest.mark.parametrize("init", ["topk", "random", "gaussian", "activation"])
@pytest.mark.parametrize("part", ["embed_tokens", "lm_head"])
def test_a_host_that_is_not_finite_begins_no_memory(init, part):
    model, memory = attached(init=init, scale=0.5)
    next(p for name, p in model.named_parameters() if part in name).data.fill_(float("nan"))
    if part == "embed_tokens":  # what the FFNs see
        with pytest.raises(locas.LocasError, match="not finite; the memory was not initialized"):
            memory.initialize(TEXT[:20])
    with pytest.raises(locas.LocasError, match="the loss is nan at chunk 0|not finite; the memory was not initialized"):
        memory.memorize(TEXT, **SETTINGS)
    assert not memory.state.initialized and not memory.slots.any() and memory.texts == ()
