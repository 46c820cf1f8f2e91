"""A save runs load's checks on its own bytes: what load would refuse is not written, and the file on disk is as it was."""

import pytest
import torch
from support.checkpoints import files
from support.helpers import learned, tiny_model, tiny_opt

import locas_ext as locas


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30])
@pytest.mark.parametrize("name", ["slots", "exp_avg", "exp_avg_sq"])
def test_numbers_that_cannot_be_loaded(folder, saved, name, value):
    model, memory = learned()
    before = files(folder)
    with torch.no_grad():
        memory.state.whole(name)[1, 0, 2, 3] = value
    if name == "slots" or value != 1e30:  # a moment may be that large
        with pytest.raises(
            locas.LocasError, match=f"cannot save the memory: {name} holds .*, in layer 1.*nothing in .* was changed"
        ):
            memory.save_pretrained(folder, optimizer=True)
        assert files(folder) == before
        assert torch.equal(locas.load(tiny_model(), folder).slots, saved[1])
    if name != "slots":
        memory.save_pretrained(folder)  # the memory itself is whole
        assert torch.equal(locas.load(tiny_model(), folder).slots, memory.slots)


def test_the_layer_is_the_hosts(tmp_path):
    _, memory = learned(model_settings=dict(num_hidden_layers=3), layers=[0, 2])
    with torch.no_grad():
        memory.slots[1, 1, 0, 0] = float("nan")
    with pytest.raises(locas.LocasError, match="in layer 2"):
        memory.save_pretrained(tmp_path / "m")
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("field, value", [("step", -5), ("scale", float("nan")), ("scale", 1e30)])
def test_states_that_cannot_be_loaded(folder, field, value):
    _, memory = learned()
    before = files(folder)
    with torch.no_grad():
        getattr(memory.state.arenas[0], field).fill_(value)
    with pytest.raises(locas.LocasError, match=f"cannot save the memory: {field} holds"):
        memory.save_pretrained(folder, optimizer=True)
    assert files(folder) == before


def test_a_record_that_cannot_be_loaded(folder):
    _, memory = learned()
    before = files(folder)
    memory._attachment.stream.position = -1
    with pytest.raises(locas.LocasError, match="cannot save the memory: (tokens_seen|stream.position) is -1"):
        memory.save_pretrained(folder, optimizer=True)
    assert files(folder) == before


@pytest.mark.parametrize("optimizer", [False, True])
@pytest.mark.parametrize(
    "kind", ["attached", "initialized", "learned", "sgd", "written", "dropped", "compressed", "reset", "mlp"]
)
def test_every_memory_that_is_saved_can_be_loaded(tmp_path, kind, optimizer):
    grows = kind in ("written", "dropped", "compressed", "mlp")
    host = tiny_opt if grows else tiny_model
    memory = locas.attach(host(), locas.LocasConfig(rank=4, scale="host", variant="mlp" if grows else "glu"))
    text = torch.arange(3, 35)
    run = dict(window=16, stride=8, progress=False)
    if kind == "initialized":
        memory.initialize(text[:8])
    elif kind in ("learned", "reset", "mlp"):
        memory.memorize(text, learning_rate=1e-2, **run)
    elif kind == "sgd":
        memory.memorize(text, optimizer="sgd", learning_rate=1e-2, **run)
    elif kind == "written":
        memory.memorize(text, update=locas.Write(tokens=locas.TopLoss(2)), **run)
    elif kind == "dropped":
        memory.memorize(text, update=locas.Write(capacity=12, when_full="drop_oldest", tokens=locas.LossAbove(0.5)), **run)
    elif kind == "compressed":
        memory.write(text[:16])
        memory.compress(3)
    if kind == "reset":
        memory.reset()
    memory.save_pretrained(tmp_path / "m", optimizer=optimizer)
    loaded = locas.load(host(), tmp_path / "m")
    used = memory.status()[0].slots_used or 4
    assert torch.equal(loaded.slots[:, :, :used], memory.slots[:, :, :used]) and loaded.version == memory.version
    loaded.save_pretrained(tmp_path / "again", optimizer=optimizer)
    assert files(tmp_path / "again")["locas_memory.safetensors"] == files(tmp_path / "m")["locas_memory.safetensors"]
