"""Windows of hosts with states, latents, indexers or shared keys: as one forward reads them, with the chunk's own gradient."""

import types

import pytest
import torch
import torch.nn.functional as F
from support.context_hosts import HOSTS, context_model, probed
from support.helpers import random_ids, tiny_model

import locas_ext as locas
from locas_ext.hosts.context_cache import ContextCache, EndingCache, logits_on
from locas_ext.hosts.text_config import NO_END, bos_token_id, max_positions
from locas_ext.hosts.window_reading import ONE, SHORT
from locas_ext.learning.chunk import Window, WindowReader

WINDOW, STRIDE = 40, 16


def windows(seed, stop=96):
    ids = random_ids(stop, seed)
    return [Window.of(ids, start, min(start + STRIDE, stop), WINDOW, None) for start in range(0, stop, STRIDE)]


def plain_loss(model, window):
    """From one forward over the window, by transformers alone."""
    with torch.no_grad():
        logits = model(input_ids=torch.cat([window.context, window.inputs])[None], use_cache=False).logits[0]
    return F.cross_entropy(logits[-len(window.targets) :].float(), window.targets, reduction="sum").item()


@pytest.mark.parametrize("model_type", HOSTS)
def test_windows_are_read_as_one_forward_reads_them(model_type):
    model = context_model(model_type, seed=1)
    host = probed(model)
    reader, expected_way = WindowReader(host), HOSTS[model_type][1]
    with torch.enable_grad():
        for window in windows(seed=1):
            why = reader.settle(window, WINDOW)
            # keys that an indexer likes equally well may be chosen otherwise
            expected = pytest.approx(plain_loss(model, window), rel=1e-2 if model_type == "deepseek_v32" else 1e-4)
            assert reader.loss(window).item() == expected, (why, host.reading)
            assert WindowReader(host, context_gradient=True).loss(window).item() == expected
    way = reader._way(window)
    assert way == expected_way or (model_type == "deepseek_v32" and way == ONE)
    assert (why is None) == way.in_two


def moved_behind_the_context(model, eps, directions, base):
    """An EndingCache.fill after which the weights have moved by eps: finite differences of what the chunk alone computes."""
    fill = EndingCache.fill

    def put(by):
        for weight, value, direction in zip(model, base, directions, strict=True):
            weight.data.copy_(value + by * direction)

    def filled(self, *args, **kwargs):
        put(0.0)
        fill(self, *args, **kwargs)
        put(eps)

    return put, filled


@pytest.mark.parametrize("model_type", [name for name, (_, way) in HOSTS.items() if way.in_two and name != "deepseek_v32"])
def test_the_gradient_is_the_chunks_own(model_type, monkeypatch):
    model = context_model(model_type).double()
    for module in model.modules():
        if hasattr(getattr(module, "config", None), "_experts_implementation_internal"):
            module.config._experts_implementation_internal = "eager"  # the others take no float64
    host = probed(model)
    reader, window = WindowReader(host), windows(seed=2)[-1]
    # not what makes keys of the context's latents, whose gradient nobody asks for and the chunk's attention leaves out
    weights = [p for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name and "kv_b" not in name]
    base = [weight.detach().clone() for weight in weights]
    directions = [weight.std() * torch.randn_like(weight) for weight in base]
    for weight in weights:
        weight.requires_grad_()
    with torch.enable_grad():
        reader.settle(window, WINDOW)
        gradients = torch.autograd.grad(reader.loss(window), weights, allow_unused=True)
    slope = sum((g * v).sum().item() for g, v in zip(gradients, directions, strict=True) if g is not None)
    assert reader._way(window).in_two
    found = []
    for eps in (1e-3, 1e-4, 1e-5):
        losses = []
        for by in (eps, -eps):
            put, filled = moved_behind_the_context(weights, by, directions, base)
            with monkeypatch.context() as patch, torch.no_grad():
                patch.setattr(EndingCache, "fill", filled)
                losses.append(reader.loss(window).item())
                put(0.0)
        found.append((losses[0] - losses[1]) / (2 * eps))
    assert min(abs(slope - other) for other in found) < 2e-2 * max(abs(slope), 0.1), (slope, found)


@pytest.mark.parametrize("model_type", ["qwen3_5_text", "bamba", "lfm2", "deepseek_v32", "zamba2", "falcon_h1"])
def test_a_contexts_forward_ends_at_its_last_write_and_a_chunk_leaves_the_states(model_type):
    model = context_model(model_type)
    host = probed(model)
    window, whole = windows(seed=4)[-1], ContextCache(model, torch.device("cpu"), None)
    ran = []
    model.lm_head.register_forward_hook(lambda *_: ran.append(1))
    whole.fill(model, window.context[None])
    assert whole.written == host.reading.writes and len(ran) == 1
    short = ContextCache(model, torch.device("cpu"), host.reading.writes)
    short.fill(model, window.context[None])
    assert len(ran) == 1, "the forward ended early"
    before = [state.clone() for state in states(short)]
    assert all(torch.equal(*pair) for pair in zip(states(whole), before, strict=True))
    assert before or model_type == "deepseek_v32"
    begin = len(window.context) if host.reading.verdicts[0].way.positions else None
    logits_on(model, window.inputs, short, begin)
    assert all(torch.equal(*pair) for pair in zip(states(short), before, strict=True)), "nothing is written over"


def states(cache):
    found = []
    for layer in cache.layers:
        for kind in ("conv_states", "recurrent_states"):
            found += [state for state in getattr(layer, kind, {}).values() if state is not None]
    return found


# ---- what a host refuses or needs -----------------------------------------------------------------------------
def test_a_host_that_asks_for_the_name_of_its_attention_takes_its_own_branch():
    model, seen = context_model("falcon"), []
    host = probed(model)
    for layer in model.transformer.h:
        own = layer.self_attention.forward

        def forward(*args, own=own, attention=layer.self_attention, **kwargs):
            seen.append(attention.config._attn_implementation == "sdpa" and attention.config._attn_implementation != "eager")
            return own(*args, **kwargs)

        layer.self_attention.forward = forward
    reader, window = WindowReader(host), windows(seed=5)[-1]
    with torch.enable_grad():
        reader._read(window, SHORT)
    assert seen and all(seen)


class NoBackward(torch.autograd.Function):
    """x, through which no gradient comes back."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise RuntimeError("no kernel for this backward")


@pytest.mark.parametrize("behind_a_cache", [True, False])
def test_a_host_without_a_backward(behind_a_cache):
    model = context_model("qwen3_5_text")
    own = model.model.layers[1].self_attn.o_proj

    def forward(x, plain=own.forward):
        return plain(x) if behind_a_cache and not calls["cached"] else NoBackward.apply(plain(x))

    calls = {"cached": False}
    model.register_forward_pre_hook(
        lambda module, args, kwargs: calls.update(cached=kwargs.get("past_key_values") is not None), with_kwargs=True
    )
    own.forward = forward
    if not behind_a_cache:
        with pytest.raises(ValueError, match="no gradient comes back through the forward of Qwen3_5ForCausalLM.*no kernel for"):
            locas.attach(model, locas.LocasConfig(rank=4))
        return
    memory = locas.attach(model, locas.LocasConfig(rank=4))
    report = memory.memorize(random_ids(48), window=24, stride=8, progress=False)
    assert memory.version > 0 and "raises RuntimeError: no kernel for this backward" in report.one_forward[0]


def test_a_host_whose_tokens_see_later_ones_in_long_windows_only_is_warned_of():
    model = tiny_model()
    norm = model.model.norm
    norm.register_forward_hook(lambda module, args, y: y + 0.5 * y.mean(1, keepdim=True) if y.shape[1] > 20 else y)
    memory = locas.attach(model, locas.LocasConfig(rank=4))
    with pytest.warns(UserWarning, match="LlamaForCausalLM is not causal in a text of 2[0-9] tokens: .*shorter window"):
        report = memory.memorize(random_ids(64), window=28, stride=8, progress=False)
    assert len(report.one_forward) == 1
    memory.memorize(random_ids(64), window=20, stride=8, progress=False)


@pytest.mark.parametrize("settings", [{}, dict(rope_parameters=dict(rope_type="dynamic", factor=2.0, rope_theta=1e4))])
def test_a_causal_host_that_is_read_in_one_forward_is_not_warned_of(settings):
    model = tiny_model(**settings)
    rotary = model.model.rotary_emb
    own = rotary.forward
    rotary.forward = lambda x, position_ids: own(x, position_ids * (1 + x.shape[1] // 5))  # each length turns otherwise
    memory = locas.attach(model, locas.LocasConfig(rank=4))
    assert memory.memorize(random_ids(64), window=28, stride=8, progress=False).one_forward


def test_layers_for_which_transformers_has_no_cache():
    model = tiny_model()
    model.config.__dict__["layer_types"] = ["of another library"] * 2
    memory = locas.attach(model, locas.LocasConfig(rank=4))
    report = memory.memorize(random_ids(40), window=24, stride=8, progress=False)
    assert memory.version > 0 and "behind a cache of the context the host raises" in report.one_forward[0]
    with pytest.raises(ValueError, match="context is 'keep', but behind a cache of the context the host raises"):
        memory.memorize(random_ids(40), window=24, stride=8, context="keep", progress=False)


class Config:
    def __init__(self, **values):
        self.__dict__.update(values)

    def get_text_config(self, decoder):
        return self

    @property
    def context_length(self):
        raise RuntimeError("it differs from layer to layer")


@pytest.mark.parametrize(
    "values, positions",
    [
        (dict(max_position_embeddings=77), 77),
        (dict(max_target_positions=48), 48),
        (dict(max_position_embeddings=-1, max_seq_len=9), 9),
        (dict(max_position_embeddings=None), NO_END),
        ({}, NO_END),
    ],
)
def test_the_positions_of_a_config(values, positions):
    model = types.SimpleNamespace(config=Config(**values))
    assert max_positions(model) == positions and bos_token_id(model) is None
