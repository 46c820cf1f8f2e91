"""What a run scores is what one plain forward per window gives, whatever the host does with a cache of the context."""

import pytest
import torch
from support.helpers import chunk_bounds, random_ids, truncated_nll
from support.hosts import HOST_SETTINGS, TWO_LAYER, config_for, tiny

import locas_ext as locas
from locas_ext.evaluation.methods.temp_lora import lora, temp_lora

WINDOW, STRIDE = 40, 8
RUN = dict(window=WINDOW, stride=STRIDE, progress=False)
IDS = random_ids(100)


def expected_scores(model, window=WINDOW, stride=STRIDE):
    """By one plain forward per window."""
    return [truncated_nll(model, IDS, *bounds, window).item() for bounds in chunk_bounds(len(IDS), stride)]


def with_mlp(family):
    return locas.LocasConfig(rank=4, scale=0.5, variant="mlp")


def scores(report):
    return [chunk.nll for chunk in report.chunks]


def memorized(model, config, **settings):
    return locas.attach(model, config).memorize(IDS, **{**RUN, **settings})


METHODS = {
    "memorize": lambda model, family: memorized(model, config_for(family), learning_rate=0.0),
    "context_gradient": lambda model, family: memorized(model, config_for(family), learning_rate=0.0, context_gradient=True),
    "write": lambda model, family: memorized(model, with_mlp(family), update=locas.Write(tokens=locas.LossAbove(1e9))),
}


def by_temp_lora(model, _):
    with lora(model, rank=2) as parameters:
        return temp_lora(model, parameters, IDS, learning_rate=0.0, epochs=1, **RUN)


# ---- hosts that are as they should be -------------------------------------------------------------------------
@pytest.mark.parametrize("family", sorted(HOST_SETTINGS))
def test_every_family_scores_as_one_plain_forward_in_every_method(family):
    expected = expected_scores(tiny(family))
    for name, run in METHODS.items():
        if name == "write" and family not in TWO_LAYER:
            continue  # as "mlp" beside a gated FFN it warns; the same windows
        report = run(tiny(family), family)
        assert scores(report) == pytest.approx(expected, rel=1e-4), name
        assert report.one_forward == [], "a host that reads a cache right is read in two forwards"


@pytest.mark.parametrize("family", ["llama", "gemma2", "opt", "phi3"])
def test_temp_lora_scores_as_one_plain_forward(family):
    pytest.importorskip("peft")
    assert scores(by_temp_lora(tiny(family), family)) == pytest.approx(expected_scores(tiny(family)), rel=1e-4)


# ---- hosts that compute something else behind a cache ---------------------------------------------------------
def longrope(original):
    def host():
        rope = dict(type="longrope", short_factor=[1.0] * 4, long_factor=[40.0] * 4)
        model = tiny("phi3", original_max_position_embeddings=original, rope_scaling=rope, num_hidden_layers=3)
        for layer in model.model.layers:  # attention that looks at positions sharply, so that they show
            layer.self_attn.qkv_proj.weight.data *= 12
        return model

    return host


def turned_by(scale):
    """A Llama whose positions turn by what `scale` makes of the number of tokens in the call."""

    def host():
        model = tiny("llama", num_hidden_layers=3)
        for layer in model.model.layers:
            for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
                projection.weight.data *= 12
        rotary = model.model.rotary_emb
        own = rotary.forward
        rotary.forward = lambda x, position_ids: own(x, position_ids * scale(x.shape[1]))
        return model

    return host


def forgetful():
    """An OPT whose attention sees its own call's keys only."""
    model = tiny("opt")
    for layer in model.model.decoder.layers:
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs: (args, {**kwargs, "past_key_values": None, "attention_mask": None}), with_kwargs=True
        )
    return model


OTHERWISE = {
    "longrope, beyond the probe": (longrope(20), "phi3"),
    "longrope, inside the probe": (longrope(4), "phi3"),
    "longrope, at the full window": (longrope(WINDOW - 2), "phi3"),
    "each length its own": (turned_by(lambda n: 1 + n // 3), "llama"),
    "full windows only": (turned_by(lambda n: 1 if n < WINDOW - 1 else 5), "llama"),
    "forgetful": (forgetful, "opt"),
}


@pytest.mark.parametrize("name", OTHERWISE)
def test_a_host_that_reads_a_cache_otherwise_is_read_in_one_forward(name):
    make, family = OTHERWISE[name]
    expected = expected_scores(make())
    for method, run in METHODS.items():
        if method == "write" and family not in TWO_LAYER:
            continue
        report = run(make(), family)
        assert scores(report) == pytest.approx(expected, rel=1e-4), method
        # beyond 4 tokens the positions turn one way only, and a context is never that short
        in_one = method != "context_gradient" and name != "longrope, inside the probe"
        assert bool(report.one_forward) == in_one, method


@pytest.mark.parametrize("name", ["longrope, beyond the probe", "each length its own"])
def test_temp_lora_reads_such_a_host_in_one_forward_too(name):
    pytest.importorskip("peft")
    make, family = OTHERWISE[name]
    assert scores(by_temp_lora(make(), family)) == pytest.approx(expected_scores(make()), rel=1e-4)


def test_what_is_read_in_one_forward_is_learned_as_with_context_gradient():
    make, family = OTHERWISE["each length its own"]
    slots = []
    for context_gradient in (False, True):
        memory = locas.attach(make(), config_for(family))
        memory.memorize(IDS, learning_rate=1e-2, context_gradient=context_gradient, **RUN)
        slots.append(memory.gather_slots())
    assert torch.allclose(*slots, rtol=1e-4, atol=1e-5)
    assert memory.status()[0].windows.startswith("one forward per window")


def test_a_resumed_run_reads_its_windows_as_an_uninterrupted_one(tmp_path):
    for name in ("longrope, beyond the probe", "each length its own"):
        make, family = OTHERWISE[name]
        settings = dict(RUN, learning_rate=1e-2)
        whole = locas.attach(make(), config_for(family))
        whole.memorize(IDS, **settings)

        class Stop(Exception):
            pass

        def stop(chunk):
            if chunk.end == 32:
                raise Stop

        first = locas.attach(make(), config_for(family))
        with pytest.raises(Stop):
            first.memorize(IDS, callback=stop, **settings)
        first.save_pretrained(tmp_path / name, optimizer=True)
        second = locas.load(make(), tmp_path / name)
        second.memorize(IDS, resume=tmp_path / name, **settings)
        assert torch.equal(second.slots, whole.slots), name


# ---- what the context's forward and the chunk's attention leave alone -----------------------------------------
def test_a_shared_config_never_says_that_a_chunk_is_read():
    """Another model made from the same config object, read from within the run, keeps its own attention."""
    model = tiny("llama")
    memory = locas.attach(model, config_for("llama"))
    said = set()
    model.model.layers[0].self_attn.o_proj.register_forward_hook(lambda *_: said.add(model.config._attn_implementation))
    memory.memorize(IDS, **RUN)
    assert said == {"sdpa"}
    assert all(layer.self_attn.config is model.config for layer in model.model.layers)
