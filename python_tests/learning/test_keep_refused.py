"""What context="keep" refuses: early, by name, with nothing changed."""

import pytest
import torch
import transformers
from support.checkpoints import rewrite
from support.helpers import TEXT, attached, tiny_model
from support.hosts import tiny
from support.online import memorize

import locas_ext as locas
from locas_ext.hosts.window_reading import ONE, Verdict


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: locas.Keep(refresh_every=0), ValueError, "refresh_every is 0; expected an integer >= 1"),
        (lambda: locas.Keep(refresh_every=1.5), TypeError, "refresh_every is 1.5; expected an integer"),
        (lambda: locas.Keep(sinks=-1), ValueError, "sinks is -1; expected an integer >= 0"),
        (lambda: locas.Keep(sinks=True), TypeError, "sinks is True"),
        (lambda: locas.Keep(4), TypeError, "positional"),
    ],
)
def test_a_keep_that_is_none(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    "settings, error, message",
    [
        (dict(context="kept"), ValueError, r"context is 'kept'; expected 'recompute', 'keep' or locas.Keep\(...\)"),
        (dict(context=None), TypeError, "context is None; expected 'recompute', 'keep'"),
        (dict(context={"sinks": 4}), TypeError, "context is {'sinks': 4}"),
        (dict(context="keep", context_gradient=True), ValueError, "context_gradient is True, but context is 'keep'"),
        (
            dict(context="keep", stride=20),
            ValueError,
            "sinks is 4, but before a chunk of 20 tokens a window of 24 has room for 3",
        ),
        (dict(context=locas.Keep(sinks=0), stride=24), ValueError, "sinks is 0, but before a chunk of 24 tokens"),
        (dict(context=locas.Keep(sinks=16)), ValueError, "sinks is 16.*room for 15 inputs"),
    ],
)
def test_settings_that_do_not_fit(settings, error, message):
    memory = attached()[1]
    with pytest.raises(error, match=message):
        memorize(memory, TEXT, **settings)
    assert memory.version == 0 and not memory.state.initialized and memory.tokens_seen == 0


def test_one_stride_less_fits():
    assert memorize(attached()[1], TEXT, stride=19, context="keep").tokens == 63
    assert memorize(attached()[1], TEXT, context=locas.Keep(sinks=15)).tokens == 63


@pytest.mark.parametrize("family", ["opt", "gpt2"])
def test_learned_positions(family):
    memory = locas.attach(tiny(family), locas.LocasConfig("mlp", rank=4))
    message = "context is 'keep', but .* does not turn the keys of layer 0 by rotary positions; learned ones end"
    for update in ("backprop", "write"):
        with pytest.raises(ValueError, match=message):
            memorize(memory, TEXT, learning_rate=None, context="keep", update=update)
    assert memory.version == 0 and not memory.state.initialized


class PositionsInTheEmbedding(transformers.LlamaForCausalLM):
    """Rotary, and learned positions beside."""

    def forward(self, input_ids=None, position_ids=None, past_key_values=None, **kwargs):
        before = 0 if past_key_values is None else past_key_values.get_seq_length()
        places = before + torch.arange(input_ids.shape[1])[None] if position_ids is None else position_ids
        table = torch.randn(64, self.config.hidden_size, generator=torch.Generator().manual_seed(0))
        embedded = self.model.embed_tokens(input_ids) + table[places]
        return super().forward(inputs_embeds=embedded, position_ids=position_ids, past_key_values=past_key_values, **kwargs)


def test_positions_beside_the_rotary_ones():
    model = tiny_model()
    model.__class__ = PositionsInTheEmbedding
    memory = locas.attach(model, locas.LocasConfig(rank=4))
    with pytest.raises(ValueError, match="context is 'keep', but the logits .* change with the place where a text begins"):
        memorize(memory, TEXT, context="keep")
    memorize(memory, TEXT[:20])


LONGROPE = dict(rope_type="longrope", rope_theta=1e4, short_factor=[1.0] * 4, long_factor=[4.0] * 4)
DYNAMIC = dict(rope_type="dynamic", rope_theta=1e4, factor=2.0)


@pytest.mark.parametrize(
    "settings, kind",
    [
        (dict(family="llama", rope_parameters=DYNAMIC, max_position_embeddings=40), "dynamic scaling"),
        (
            dict(family="llama", rope_parameters={**LONGROPE, "original_max_position_embeddings": 40, "factor": 2.0}),
            "longrope",
        ),
    ],
    ids=["dynamic", "longrope"],
)
def test_positions_that_turn_otherwise_in_a_longer_text(settings, kind):
    memory = locas.attach(tiny_model(**settings), locas.LocasConfig(rank=4))
    with pytest.raises(ValueError, match=f"rotary positions have {kind}.*more than 40 tokens, and the text has 41"):
        memorize(memory, TEXT[:42], context="keep")
    with pytest.raises(ValueError, match="the text has 41"):
        memorize(memory, TEXT[:41], context="keep", bos=True)
    assert memory.version == 0
    assert memorize(memory, TEXT[:40], context="keep").tokens == 39  # within the range all is well
    assert memory.feed(TEXT[40:41], progress=False).tokens == 40
    slots = memory.slots.clone()
    with pytest.raises(ValueError, match="the text has 41"):
        memory.feed(TEXT[41:42], progress=False)
    assert torch.equal(memory.slots, slots) and memory.tokens_seen == 41


def test_a_host_that_does_not_read_behind_a_cache_as_in_one_forward():
    memory = attached()[1]
    memory._attachment.host.reading.verdicts[0] = Verdict(ONE, "it was found to differ")
    with pytest.raises(ValueError, match="context is 'keep', but it was found to differ; expected context='recompute'"):
        memorize(memory, TEXT, context="keep")


# ---- resuming -------------------------------------------------------------------------------------------------
@pytest.fixture
def saved(tmp_path):
    memory = attached()[1]
    memorize(memory, TEXT[:40], context="keep")
    memory.save_pretrained(tmp_path, optimizer=True)
    return tmp_path


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(window=32), "window was 24, is 32"),
        (dict(context="recompute"), "context was {'sinks': 4, 'refresh_every': None}, is 'recompute'"),
        (dict(context=locas.Keep(sinks=3)), "context was .*, is {'sinks': 3, 'refresh_every': None}"),
        (dict(context=locas.Keep(refresh_every=5)), "context was .*, is {'sinks': 4, 'refresh_every': 5}"),
    ],
)
def test_a_run_is_resumed_with_its_own_settings(saved, changes, message):
    later = attached()[1]
    with pytest.raises(ValueError, match=message):
        memorize(later, TEXT, **{"context": "keep", **changes}, resume=saved)
    assert later.version == 0 and later.tokens_seen == 0


def test_a_run_that_recomputed_is_not_resumed_by_keeping(tmp_path):
    memory = attached()[1]
    memorize(memory, TEXT[:40])
    memory.save_pretrained(tmp_path, optimizer=True)
    with pytest.raises(ValueError, match="context was 'recompute', is {'sinks': 4"):
        memorize(attached()[1], TEXT, context="keep", resume=tmp_path)


# ---- files ----------------------------------------------------------------------------------------------------
def change_tensors(folder, change):
    def changed(tensors):
        change(tensors)
        return tensors

    rewrite(folder, change_tensors=changed)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda tensors: tensors.pop("kept_keys_1"), "it lacks kept_keys_1"),
        (lambda tensors: tensors.update(kept_keys_2=torch.ones(2, 4, 8)), "it holds unknown tensors: kept_keys_2"),
        (
            lambda tensors: tensors.update(kept_keys_0=torch.ones(2, 3, 8)),
            r"kept_keys_0 is .*; expected floating point \[heads, 22",
        ),
        (lambda tensors: tensors.update(kept_values_0=torch.ones(2, 22, 8, dtype=torch.int64)), "kept_values_0 is torch.int64"),
        (lambda tensors: tensors["kept_keys_0"].fill_(torch.nan), "kept_keys_0 holds numbers that are not finite"),
    ],
)
def test_rows_that_are_damaged(saved, change, message):
    change_tensors(saved, change)
    memory = attached()[1]
    with pytest.raises(locas.LocasError, match=message):
        memory.load(saved)
    assert memory.version == 0


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda stream: stream.pop("kept"), "stream.kept is there without settings.context, or this without it"),
        (lambda stream: stream["settings"].pop("context"), "stream.kept is there without settings.context"),
        (lambda stream: stream["kept"].update(seen=38), "stream.kept is of 38 inputs"),
        (lambda stream: stream["kept"].update(held=40), "holds 40; expected 39"),
        (lambda stream: stream["kept"].update(head=[1]), "has a head of 1 tokens"),
        (lambda stream: stream["kept"].update(rooms=[]), "stream.kept has a head"),
        (lambda stream: stream["kept"]["rooms"][0].update(latest=-1), "latest is -1"),
        (lambda stream: stream["settings"]["context"].update(refresh_every=0), "refresh_every is 0"),
        (lambda stream: stream["settings"]["context"].update(more=0), "'more' is unknown"),
    ],
)
def test_records_that_are_damaged(saved, change, message):
    rewrite(saved, lambda record: change(record["stream"]))
    memory = attached()[1]
    with pytest.raises(locas.LocasError, match=message):
        memory.load(saved)


def test_rooms_for_more_than_memory_take_none(saved):
    """A file may say anything of its window; rows are made only for one that fits the host."""
    rewrite(saved, lambda record: [room.update(latest=2**31 - 1) for room in record["stream"]["kept"]["rooms"]])
    change_tensors(saved, lambda tensors: tensors.update({n: torch.ones(2, 43, 8) for n in tensors if n.startswith("kept")}))
    memory = attached()[1]
    memory.load(saved)
    with pytest.raises(locas.LocasError, match="the kept context does not fit"):
        memory.feed(TEXT[40:], progress=False)


def test_rows_of_other_heads(saved):
    change_tensors(saved, lambda tensors: tensors.update(kept_keys_0=torch.ones(4, 22, 8)))
    memory = attached()[1]
    memory.load(saved)
    slots = memory.slots.clone()
    with pytest.raises(locas.LocasError, match=r"the kept context does not fit: kept_keys_0 is \[4, 22, 8\]"):
        memory.feed(TEXT[40:], progress=False)
    assert torch.equal(memory.slots, slots)
