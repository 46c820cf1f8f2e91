"""context="keep": scores and slots of whole runs against explicit rows, masks and positions in float64."""

import pytest
import torch
import transformers
from support.helpers import TEXT, PlainMemory, attached, random_ids, relative_distance, tiny_model
from support.hosts import tiny
from support.kept import plain_keep
from support.online import memorize, papers

import locas_ext as locas

IDS = torch.cat([TEXT, random_ids(39, seed=8)])  # 103 tokens: the last chunk is not full
LEARN = dict(optimizer="sgd", learning_rate=0.2)


def olmo2():
    torch.manual_seed(0)
    config = transformers.Olmo2Config(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.25,
        pad_token_id=None,
        rope_parameters={"rope_type": "default", "rope_theta": 50.0},
    )
    return transformers.Olmo2ForCausalLM(config).eval()


def gemma3(sliding_window=6):
    """A layer that slides and one that does not, each turned by frequencies of its own."""
    rope = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10.0},
        "full_attention": {"rope_type": "linear", "rope_theta": 300.0, "factor": 8.0},
    }
    model = tiny(
        "gemma3_text",
        sliding_window=sliding_window,
        layer_types=["sliding_attention", "full_attention", "full_attention"],
        num_hidden_layers=3,
        rope_parameters=rope,
        initializer_range=0.25,
    )
    model.config.hidden_act = model.config.hidden_activation  # where PlainMemory looks
    return model


HOSTS = {
    "llama": (lambda: tiny_model("llama"), {}),
    "qwen3": (lambda: tiny_model("qwen3"), {}),
    "mistral, all layers slide": (lambda: tiny_model("mistral", sliding_window=5), dict(sliding=[5, 5])),
    "mistral, a reach of the whole window": (lambda: tiny_model("mistral", sliding_window=23), {}),
    "mistral, one less": (lambda: tiny_model("mistral", sliding_window=22), dict(sliding=[22, 22])),
    "gemma3": (gemma3, dict(sliding=[6, None, None])),
    "olmo2": (olmo2, {}),
    "smollm3, a layer without positions": (
        lambda: tiny("smollm3", no_rope_layers=[1, 0], initializer_range=0.25),
        dict(turns=[True, False]),
    ),
    "glm4, half of a key, neighbours": (lambda: tiny("glm4", initializer_range=0.25), dict(interleaved=True)),
}
RUNS = [
    {},
    dict(sinks=0),
    dict(sinks=1),
    dict(sinks=15),
    dict(stride=5, window=17, sinks=3),
    dict(stride=1, window=9, learning_rate=0.02),  # many updates: a larger rate would blow roundings up
    dict(stride=7, window=9, sinks=1),
    dict(stride=13, window=60),
    dict(epochs=3),
    dict(bos=True),
    dict(bos=True, sinks=0, stride=5),
    dict(refresh_every=1),
    dict(refresh_every=3, sinks=2),
    dict(refresh_every=2, epochs=2, bos=True, stride=6),
    dict(refresh_every=2, window=60),
]


def keep_of(run):
    return locas.Keep(**{name: run[name] for name in ("sinks", "refresh_every") if name in run})


def compare(make, host, run, ids=IDS, dtype=torch.float32):
    model = make().to(dtype)
    memory = locas.attach(model, locas.LocasConfig(rank=4, scale="host"))
    settings = {**LEARN, **{name: value for name, value in run.items() if name not in ("sinks", "refresh_every")}}
    memory.initialize(ids[:8])
    plain = PlainMemory(make(), memory.slots, memory.scale, **{name: settings[name] for name in LEARN})
    start = memory.slots.clone()
    report = memorize(memory, ids, **papers(**settings), context=keep_of(run))
    plain_settings = {"window": 24, "stride": 8, **run, "bos": 1 if run.get("bos") else None}
    plain_settings.pop("learning_rate", None)
    nlls = plain_keep(plain, ids, **plain_settings, **host)
    tight = 1e-5 if dtype == torch.float32 else 1e-6
    assert [chunk.nll for chunk in report.chunks] == pytest.approx(nlls, rel=tight)
    assert relative_distance(memory.slots - start, plain.stacked() - start.double()) < 100 * tight
    return memory, report


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_a_run_is_the_protocol_written_down_in_plain_torch(run):
    compare(*HOSTS["llama"], run)


@pytest.mark.parametrize("run", [{}, dict(refresh_every=3, sinks=2, epochs=2, stride=5)], ids=str)
@pytest.mark.parametrize("host", HOSTS)
def test_hosts(host, run):
    compare(*HOSTS[host], run)


def test_a_float64_host():
    compare(*HOSTS["qwen3"], dict(stride=5), dtype=torch.float64)


def test_positions_far_beyond_those_of_the_config():
    ids = IDS.repeat(5)
    compare(*HOSTS["llama"], dict(stride=11, sinks=2), ids=ids)


@pytest.mark.parametrize("bos", [False, True])
def test_a_window_read_anew_for_every_chunk_is_recomputing(bos):
    memory, peer = attached()[1], attached()[1]
    report = memorize(memory, IDS, **LEARN, bos=bos, context=locas.Keep(refresh_every=1))
    expected = memorize(peer, IDS, **LEARN, bos=bos)
    assert [chunk.nll for chunk in report.chunks] == pytest.approx([chunk.nll for chunk in expected.chunks], rel=1e-5)
    assert relative_distance(memory.slots, peer.slots) < 1e-4


def test_while_the_window_has_not_moved_nothing_learned_means_one_forward():
    _, memory = attached()
    kept = memorize(memory, IDS[:60], window=60, stride=7, learning_rate=0.0, context="keep")
    memory.reset()
    anew = memorize(memory, IDS[:60], window=60, stride=7, learning_rate=0.0)
    assert [chunk.nll for chunk in kept.chunks] == pytest.approx([chunk.nll for chunk in anew.chunks], rel=1e-5)


def test_sinks_keep_a_text_that_leans_on_its_beginning_readable():
    """Not a figure: only that sinks and none differ once the window has moved, and not before."""
    runs = [memorize(attached()[1], IDS, **LEARN, context=locas.Keep(sinks=sinks)) for sinks in (0, 4)]
    same = [one.nll == pytest.approx(other.nll, rel=1e-6) for one, other in zip(*(run.chunks for run in runs), strict=True)]
    assert all(same[:3]) and not any(same[3:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_close(dtype):
    report = memorize(attached("qwen3", dtype=dtype)[1], IDS, **LEARN, context="keep")
    expected = memorize(attached("qwen3")[1], IDS, **LEARN, context="keep")
    assert report.perplexity == pytest.approx(expected.perplexity, rel=0.05)


def test_a_write_reads_over_a_kept_context():
    memories = [locas.attach(tiny("phi"), locas.LocasConfig("mlp", rank=4, scale=0.5)) for _ in range(2)]
    runs = [
        memory.memorize(IDS, window=24, stride=8, update="write", progress=False, context=context)
        for memory, context in zip(memories, (locas.Keep(refresh_every=1), "recompute"), strict=True)
    ]
    assert [chunk.nll for chunk in runs[0].chunks] == pytest.approx([chunk.nll for chunk in runs[1].chunks], rel=1e-4)
