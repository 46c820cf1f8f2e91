"""Bad input: a clear error that names what was wrong, and nothing changed."""

import math

import pytest
import torch
import transformers
from support.helpers import TEXT, assert_same_host, attached, logits_of, random_ids, snapshot, tiny_model, tiny_opt
from transformers import BatchEncoding

import locas_ext as locas

IDS = random_ids(12)


# ---- hosts ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "thing",
    [
        None,
        "a/checkpoint",
        3,
        torch.nn.Linear(4, 4),
        torch.nn.Sequential(),
        locas.LocasConfig(),
        {},
    ],
    ids=lambda thing: type(thing).__name__,
)
def test_not_a_language_model(thing):
    with pytest.raises(TypeError, match=f"model is {type(thing).__name__}; expected a transformers causal language"):
        locas.attach(thing)


@pytest.mark.parametrize(
    "make",
    [
        lambda: transformers.LlamaModel(tiny_model().config),
        lambda: transformers.LlamaForSequenceClassification(tiny_model().config),
    ],
    ids=["base model", "classifier"],
)
def test_a_model_without_a_language_model_head(make):
    model = make()
    before = snapshot(model)
    with pytest.raises(ValueError, match="has no language-model head.*AutoModelForCausalLM"):
        locas.attach(model)
    assert_same_host(model, before)


def test_an_activation_without_a_kernel():
    model = tiny_model(hidden_act="mish")
    with pytest.raises(ValueError, match="activation 'mish' has no kernel; supported: silu"):
        locas.attach(model)


def test_a_host_on_the_meta_device():
    with torch.device("meta"):
        model = tiny_model()
    with pytest.raises(ValueError, match="meta device"):
        locas.attach(model, locas.LocasConfig(rank=4))
    assert "forward" not in model.model.layers[0].mlp.__dict__


# ---- configs --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "setting, error",
    [
        (dict(rank=0), ValueError),
        (dict(rank=-3), ValueError),
        (dict(rank=1.5), TypeError),
        (dict(rank="64"), TypeError),
        (dict(rank=None), TypeError),
        (dict(rank=True), TypeError),
        (dict(variant="lora"), ValueError),
        (dict(init="best"), ValueError),
        (dict(init=None), ValueError),
        (dict(scale="big"), ValueError),
        (dict(scale=math.nan), ValueError),
        (dict(scale=math.inf), ValueError),
        (dict(scale=None), TypeError),
        (dict(scale=True), TypeError),
        (dict(clip="yes"), TypeError),
        (dict(clip=None), TypeError),
        (dict(backend="cuda"), ValueError),
        (dict(seed="1"), TypeError),
        (dict(seed=0.5), TypeError),
        (dict(layers=3), TypeError),
        (dict(layers="all"), TypeError),
        (dict(layers=[0.5]), TypeError),
        (dict(layers=[True]), TypeError),
        (dict(layers=[]), ValueError),
        (dict(layers=[None]), TypeError),
    ],
    ids=str,
)
def test_bad_settings(setting, error):
    (name,) = setting
    with pytest.raises(error, match=name):
        locas.LocasConfig(**setting)


@pytest.mark.parametrize("config", [3, "topk", {"rank": 4}])
def test_a_config_that_is_none(config):
    model = tiny_model()
    with pytest.raises(TypeError, match="expected a LocasConfig or None"):
        locas.attach(model, config)


@pytest.mark.parametrize(
    "config, error, message",
    [
        (dict(layers=[2]), IndexError, "layers holds 2, but the host has 2 layers"),
        (dict(layers=[0, -3]), IndexError, "layers holds -3"),
        (dict(layers=[0, 0]), ValueError, "layer 0 twice"),
        (dict(layers=[1, -1]), ValueError, "layer 1 twice"),
        (dict(rank=41), ValueError, "rank is 41, but the host's FFN has only 40 neurons"),
        (dict(rank=41, init="bottomk"), ValueError, "rank is 41"),
        (dict(rank=41, init="random"), ValueError, "rank is 41"),
    ],
    ids=str,
)
def test_a_config_that_does_not_fit_the_host_changes_nothing(config, error, message):
    model = tiny_model()
    before = snapshot(model)
    with pytest.raises(error, match=message):
        locas.attach(model, locas.LocasConfig(**config))
    assert_same_host(model, before)
    locas.attach(model, locas.LocasConfig(rank=4))


@pytest.mark.filterwarnings("ignore:.*could not be probed")
@pytest.mark.parametrize("scale, clip", [("paper", True), ("16x", True), ("host", 2.0)])
@pytest.mark.parametrize("value", [0.0, math.nan, math.inf, 1e30])
def test_value_rows_that_give_no_scale(value, scale, clip):
    model = tiny_model()
    model.model.layers[1].mlp.down_proj.weight.data.fill_(value)
    before = snapshot(model)
    with pytest.raises(ValueError, match=f"scale is '{scale}', which is .* where the value rows .* use a number"):
        locas.attach(model, locas.LocasConfig(rank=4, scale=scale, clip=clip))
    if math.isfinite(value):
        assert_same_host(model, before)


def test_a_snapshot_of_another_rank():
    few, many = (locas.attach(tiny_opt(), locas.LocasConfig("mlp", rank=rank, scale=0.5)) for rank in (4, 8))
    many.write(IDS)
    with pytest.raises(ValueError, match="of rank 4 .*attached are .* of rank 8"):
        many.restore(few.snapshot())


@pytest.mark.parametrize(
    "make, name",
    [
        (lambda: locas.LocasConfig(rank=2**31), "rank"),
        (lambda: locas.LocasConfig(scale=1e-300), "scale"),
        (lambda: locas.LocasConfig(scale="9" * 400 + "x"), "scale"),
        (lambda: locas.LocasConfig(scale="1000001x"), "scale"),
        (lambda: locas.LocasConfig(scale="0." + "0" * 39 + "1x"), "scale"),
        (lambda: locas.Backprop(learning_rate=1.1e6), "learning_rate"),
        (lambda: locas.Backprop(gate_learning_rate=1e300), "gate_learning_rate"),
        (lambda: locas.Backprop(epochs=2**54), "epochs"),
        (lambda: locas.Backprop(decay_after=2**54), "decay_after"),
        (lambda: locas.Write(epsilon=1.1e6), "epsilon"),
        (lambda: locas.Write(capacity=2**31), "capacity"),
        (lambda: locas.TopLoss(2**31), "n"),
        (lambda: locas.Keep(sinks=2**54), "sinks"),
        (lambda: locas.Keep(refresh_every=2**54), "refresh_every"),
    ],
)
def test_settings_beyond_what_slots_and_files_hold(make, name):
    with pytest.raises(ValueError, match=f"{name} is .*; expected"):
        make()


MOST = dict(learning_rate=1e6, gate_learning_rate=1e6, value_learning_rate=1e6, decay_after=2**53)


@pytest.mark.parametrize("update", [locas.Backprop(**MOST), locas.Backprop(learning_rate=1e6, optimizer="sgd")], ids=str)
def test_the_largest_settings_make_a_memory_that_can_be_kept(update, tmp_path):
    model, memory = attached()
    memory.memorize(TEXT[:24], window=16, stride=8, update=update, progress=False, on_divergence="ignore")
    memory.save_pretrained(tmp_path, optimizer=True)
    assert torch.equal(locas.load(tiny_model(), tmp_path).slots, memory.slots) and memory.slots.any()


@pytest.mark.parametrize("init", ["gaussian", "activation"])
def test_a_rank_beyond_the_host_is_fine_where_nothing_is_cloned(init):
    memory = locas.attach(tiny_model(), locas.LocasConfig(rank=50, init=init))
    memory.initialize(random_ids(60))
    assert memory.slots.shape[2] == 50


def test_attaching_twice():
    model, memory = attached()
    memory.memorize(TEXT, window=24, stride=8, progress=False)
    logits, before = logits_of(model, IDS), snapshot(model)
    with pytest.raises(ValueError, match=r"already has a memory attached.*detach\(\)"):
        locas.attach(model)
    assert_same_host(model, before)
    assert torch.equal(logits_of(model, IDS), logits) and locas.memory_of(model) is memory


def test_no_memory_attached():
    for thing in (tiny_model(), None, 3):
        with pytest.raises(ValueError, match="no memory attached"):
            locas.memory_of(thing)


# ---- memorize and initialize ----------------------------------------------------------------------------------
BAD_IDS = {
    "empty list": ([], ValueError, "holds 0 tokens; expected at least"),
    "empty tensor": (torch.zeros(0, dtype=torch.long), ValueError, "holds 0 tokens"),
    "two texts": (torch.zeros(2, 8, dtype=torch.long), ValueError, r"shape \[2, 8\]; expected \[n\] or \[1, n\]"),
    "0-d": (torch.tensor(3), ValueError, r"shape \[\]"),
    "floats": (torch.ones(8), TypeError, "input_ids is torch.float32; expected integers"),
    "list of floats": ([1.5, 2.0], TypeError, "input_ids is torch.float32"),
    "booleans": (torch.ones(8, dtype=torch.bool), TypeError, "torch.bool"),
    "text": ("It was the best of times", TypeError, "input_ids is a str; expected token ids, a tensor or list of integers"),
    "encoding": (BatchEncoding({"input_ids": [5, 9]}), TypeError, r"input_ids is a BatchEncoding.*such as its \['input_ids'\]"),
    "sparse": (torch.ones(9, dtype=torch.long).to_sparse(), TypeError, "is a torch.sparse_coo tensor; expected a dense one"),
    "None": (None, TypeError, "input_ids"),
    "ragged": ([[1, 2], [3]], TypeError, "input_ids"),
    "negative": ([3, -1, 5], ValueError, "holds token -1; expected ids from 0 to 60"),
    "beyond the vocabulary": ([3, 61, 5], ValueError, "holds token 61; expected ids from 0 to 60"),
    "strings": (["a", "b"], TypeError, "input_ids"),
    "dict": ({"input_ids": [1, 2]}, TypeError, "input_ids"),
}


@pytest.mark.parametrize("ids, error, message", BAD_IDS.values(), ids=BAD_IDS)
@pytest.mark.parametrize("verb", ["memorize", "initialize"])
def test_bad_texts(verb, ids, error, message):
    model, memory = attached()
    before = snapshot(model)
    with pytest.raises(error, match=message):
        memory.memorize(ids, progress=False) if verb == "memorize" else memory.initialize(ids)
    assert_same_host(model, before)
    assert memory.version == 0 and not memory.slots.any() and not memory.state.initialized


def test_a_text_without_data():
    _, memory = attached()
    with pytest.raises(ValueError, match="input_ids is on the meta device"):
        memory.memorize(torch.zeros(8, dtype=torch.int64, device="meta"))


def test_one_token_is_too_few_to_learn_from():
    _, memory = attached()
    with pytest.raises(ValueError, match="holds 1 token; expected at least 2"):
        memory.memorize([5], progress=False)
    memory.initialize([5])  # but enough to see which neurons fire


@pytest.mark.parametrize(
    "setting, error, message",
    [
        (dict(window=24, stride=25), ValueError, "stride is 25; expected an integer from 1 to 24"),
        (dict(window=65), ValueError, "window is 65; expected an integer from 2 to 64.*positions"),
        (dict(window=1), ValueError, "window is 1"),
        (dict(window=0), ValueError, "window is 0"),
        (dict(window=-5), ValueError, "window is -5"),
        (dict(window=24.0), TypeError, "window is 24.0"),
        (dict(window="24"), TypeError, "window"),
        (dict(window=True), TypeError, "window"),
        (dict(stride=0), ValueError, "stride is 0"),
        (dict(stride=-1), ValueError, "stride is -1"),
        (dict(stride=2.5), TypeError, "stride is 2.5"),
        (dict(learning_rate=-1e-3), ValueError, "learning_rate is -0.001; expected a finite number >= 0"),
        (dict(learning_rate=math.nan), ValueError, "learning_rate is nan"),
        (dict(learning_rate=math.inf), ValueError, "learning_rate is inf"),
        (dict(learning_rate="fast"), TypeError, "learning_rate is 'fast'"),
        (dict(epochs=0), ValueError, "epochs is 0"),
        (dict(epochs=-1), ValueError, "epochs is -1"),
        (dict(epochs=1.5), TypeError, "epochs is 1.5"),
        (dict(optimizer="adam"), ValueError, "optimizer is 'adam'; expected one of adamw, sgd, shampoo"),
        (dict(optimizer=["adamw"]), (ValueError, TypeError), "optimizer"),
        (dict(update="prayer"), ValueError, "update is 'prayer'; expected one of backprop, write"),
        (dict(update=locas.Write), TypeError, r"update is <class .*expected .*locas.Write\(\.\.\.\)"),
        (dict(update=None), TypeError, "update is None"),
        (dict(update=locas.Backprop(), epochs=2), ValueError, r"epochs is 2 .*write update=locas.Backprop\(epochs=2\)"),
        (
            dict(update="write", learning_rate=0.1),
            ValueError,
            r"learning_rate is 0.1.*Backprop\(learning_rate=0.1\)",
        ),
        (dict(update=locas.Write(), optimizer="sgd"), ValueError, "optimizer is 'sgd', but update is a Write"),
        (dict(epsilon=0.5), TypeError, r"epsilon is 0.5.*pass update=locas.Write\(epsilon=0.5\)"),
        (dict(capacity=9), TypeError, r"update=locas.Write\(capacity=9\)"),
        (dict(when_full="error"), TypeError, r"update=locas.Write\(when_full='error'\)"),
        (dict(compress_to=3), TypeError, r"update=locas.Write\(compress_to=3\)"),
        (dict(tokens=3), TypeError, r"update=locas.Write\(tokens=...\) with locas.TopLoss\(3\)"),
        (dict(strides=3), TypeError, "unexpected keyword argument 'strides'"),
        (dict(context_gradient=1), TypeError, "context_gradient is 1; expected True or False"),
        (dict(bos="yes"), TypeError, "bos is 'yes'; expected True or False"),
        (dict(progress=1), TypeError, "progress is 1; expected True or False"),
        (dict(title=3), TypeError, "title is 3; expected a string or None"),
        (dict(callback=3), TypeError, "callback"),
    ],
    ids=str,
)
def test_bad_arguments_of_memorize(setting, error, message):
    model, memory = attached()
    before = snapshot(model)
    with pytest.raises(error, match=message):
        memory.memorize(TEXT, **{"progress": False, **setting})
    assert_same_host(model, before)
    assert memory.version == 0 and not memory.state.initialized


def test_the_largest_window_is_the_hosts_positions():
    _, memory = attached()
    assert memory.memorize(random_ids(130), window=64, stride=64, progress=False).tokens == 129


def test_initialize_with_more_than_the_hosts_positions():
    _, memory = attached()
    with pytest.raises(ValueError, match="holds 65 tokens; expected at most 64"):
        memory.initialize(random_ids(65))
    memory.initialize(random_ids(64))


def test_activation_init_needs_a_token_for_every_slot():
    _, memory = attached(rank=9, init="activation")
    for run in (
        lambda: memory.memorize(TEXT, window=24, stride=8, progress=False),
        lambda: memory.memorize(TEXT[:6], progress=False),
        lambda: memory.initialize(TEXT[:8]),
    ):
        with pytest.raises(ValueError, match="rank is 9, but the (first )?chunk has . tokens"):
            run()
        assert memory.version == 0 and not memory.slots.any()
    memory.memorize(TEXT, window=24, stride=9, progress=False)
