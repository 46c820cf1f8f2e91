"""A saved run is taken up and ends as the uninterrupted one, bit for bit."""

import json

import pytest
import torch
from support.helpers import SETTINGS, TEXT, attached, logits_of, random_ids, tiny_model
from support.interrupting import Stop, stop_after

import locas_ext as locas


def interrupted(chunks, error=Stop, **changes):
    model, memory = attached()
    with pytest.raises(error):
        memory.memorize(TEXT, **{**SETTINGS, **changes}, callback=stop_after(chunks, error))
    return model, memory


@pytest.mark.parametrize("chunks", [1, 3, 7])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(optimizer="sgd", learning_rate=0.3),
        dict(learning_rate=None, update=locas.Backprop.paper()),
        dict(epochs=2),
        dict(context_gradient=True),
        dict(bos=True),
        dict(stride=7),
        dict(window=9, stride=1),
    ],
    ids=str,
)
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(tmp_path, chunks, changes):
    settings = {**SETTINGS, **changes}
    _, whole = attached()
    full = whole.memorize(TEXT[:60], **settings)

    _, memory = attached()
    with pytest.raises(Stop):
        memory.memorize(TEXT[:60], **settings, callback=stop_after(chunks))
    memory.save_pretrained(tmp_path / "m", optimizer=True)
    _, later = attached()
    report = later.memorize(TEXT[:60], **settings, resume=tmp_path / "m")
    assert report.chunks == full.chunks and (report.nll, report.tokens) == (full.nll, full.tokens)
    assert torch.equal(later.slots, whole.slots) and later.version == whole.version
    for name in ("exp_avg", "exp_avg_sq", "value_gram", "step"):
        a, b = later.state.whole(name), whole.state.whole(name)
        assert (a is None and b is None) or torch.equal(a, b)


def test_resuming_twice_and_saving_from_the_callback(tmp_path):
    _, whole = attached()
    full = whole.memorize(TEXT, **SETTINGS)
    _, memory = attached()

    def save_and_stop(chunk):
        memory.save_pretrained(tmp_path / "m", optimizer=True)
        if chunk.end in (16, 40):
            raise Stop

    with pytest.raises(Stop):
        memory.memorize(TEXT, **SETTINGS, callback=save_and_stop)
    _, memory = attached()
    with pytest.raises(Stop):
        memory.memorize(TEXT, **SETTINGS, callback=save_and_stop, resume=tmp_path / "m")
    _, memory = attached()
    seen = []
    report = memory.memorize(TEXT, **SETTINGS, resume=str(tmp_path / "m"), callback=seen.append)
    assert report.chunks == full.chunks and torch.equal(memory.slots, whole.slots)
    assert [chunk.start for chunk in seen] == [40, 48, 56]


def test_resuming_a_finished_run_changes_nothing(tmp_path):
    _, memory = attached()
    full = memory.memorize(TEXT, **SETTINGS)
    memory.save_pretrained(tmp_path / "m", optimizer=True)
    _, later = attached()
    report = later.memorize(TEXT, **SETTINGS, resume=tmp_path / "m")
    assert report.chunks == full.chunks and torch.equal(later.slots, memory.slots) and later.version == 8


def test_resume_in_the_middle_of_a_second_text(tmp_path):
    second = random_ids(64, seed=3)

    def first_read():
        _, memory = attached()
        memory.memorize(TEXT, **SETTINGS)
        return memory

    whole = first_read()
    full = whole.memorize(second, **SETTINGS)
    memory = first_read()
    with pytest.raises(Stop):
        memory.memorize(second, **SETTINGS, callback=stop_after(4))
    memory.save_pretrained(tmp_path / "m", optimizer=True)
    _, later = attached()
    assert later.memorize(second, **SETTINGS, resume=tmp_path / "m").chunks == full.chunks
    assert torch.equal(later.slots, whole.slots)


@pytest.mark.parametrize(
    "name, value",
    [
        ("window", 32),
        ("stride", 4),
        ("learning_rate", 2e-2),
        ("epochs", 2),
        ("optimizer", "sgd"),
        ("context_gradient", True),
        ("bos", True),
    ],
)
def test_resume_with_another_setting_names_it_and_changes_nothing(tmp_path, name, value):
    _, memory = interrupted(3)
    memory.save_pretrained(tmp_path / "m", optimizer=True)
    _, later = attached()
    later.memorize(TEXT[:8], **SETTINGS)
    slots = later.slots.clone()
    with pytest.raises(ValueError, match=f"{name} was .*, is {value!r}"):
        later.memorize(TEXT, **{**SETTINGS, name: value}, resume=tmp_path / "m")
    assert torch.equal(later.slots, slots) and later.version == 1


@pytest.mark.parametrize("name, value", [("rank", 5), ("scale", 0.5), ("init", "random"), ("clip", False), ("seed", 1)])
def test_resume_into_a_memory_of_another_config_names_it_and_changes_nothing(tmp_path, name, value):
    _, memory = interrupted(3)
    memory.save_pretrained(tmp_path / "m", optimizer=True)
    later = locas.attach(tiny_model(), locas.LocasConfig(**{"rank": 4, "scale": "host", name: value}))
    with pytest.raises(ValueError, match=f"other settings: {name} was .*, is {value!r}$"):
        later.memorize(TEXT, **SETTINGS, resume=tmp_path / "m")
    assert not later.slots.any() and later.version == 0
    assert attached(backend="matmul")[1].memorize(TEXT, **SETTINGS, resume=tmp_path / "m").tokens == 63


def test_resume_in_another_dtype_names_it_and_changes_nothing(tmp_path):
    _, memory = interrupted(3)
    memory.save_pretrained(tmp_path / "m", optimizer=True)
    later = locas.load(tiny_model(dtype=torch.bfloat16), tmp_path / "m")
    slots, version = later.slots.clone(), later.version
    with pytest.raises(locas.LocasError, match="other settings: dtype was 'float32', is 'bfloat16'$"):
        later.memorize(TEXT, **SETTINGS, resume=tmp_path / "m")
    assert torch.equal(later.slots, slots) and later.version == version
    later.model.float()
    assert later.memorize(TEXT, **SETTINGS, resume=tmp_path / "m").tokens == 63


def test_resume_over_another_text_is_refused(tmp_path):
    _, memory = interrupted(3)
    memory.save_pretrained(tmp_path / "m", optimizer=True)
    other, short = TEXT.clone(), TEXT[:20]
    other[5] += 1
    for text in (other, short):
        _, later = attached()
        with pytest.raises(ValueError, match="another text"):
            later.memorize(text, **SETTINGS, resume=tmp_path / "m")
        assert later.version == 0 and not later.slots.any()
    changed_later = TEXT.clone()
    changed_later[50] += 1  # not read yet when it was saved
    assert attached()[1].memorize(changed_later, **SETTINGS, resume=tmp_path / "m").tokens == 63


def test_resume_needs_the_optimizer_and_a_place(tmp_path):
    _, memory = interrupted(3)
    memory.save_pretrained(tmp_path / "m")
    with pytest.raises(locas.LocasError, match="optimizer=True"):
        attached()[1].memorize(TEXT, **SETTINGS, resume=tmp_path / "m")
    _, fresh = attached()
    fresh.initialize(TEXT[:8])
    fresh.save_pretrained(tmp_path / "fresh", optimizer=True)
    with pytest.raises(locas.LocasError, match="no place to resume from"):
        attached()[1].memorize(TEXT, **SETTINGS, resume=tmp_path / "fresh")
    with pytest.raises(FileNotFoundError):
        attached()[1].memorize(TEXT, **SETTINGS, resume=tmp_path / "nowhere")


def test_tokens_seen_is_recorded(tmp_path):
    _, memory = interrupted(3)
    memory.save_pretrained(tmp_path / "m")
    record = json.loads((tmp_path / "m" / "locas_config.json").read_text())
    assert (record["tokens_seen"], record["memory_version"], record["slots_used"]) == (24, 3, 4)


def test_an_interrupted_first_chunk_leaves_the_hosts_outputs():
    model, memory = attached()
    host = logits_of(model, random_ids(20))
    hook = model.lm_head.register_full_backward_pre_hook(lambda module, grad: (grad[0] * float("nan"),))
    with pytest.raises(locas.LocasError):
        memory.memorize(TEXT, **SETTINGS)
    hook.remove()
    assert torch.equal(logits_of(model, random_ids(20)), host)
