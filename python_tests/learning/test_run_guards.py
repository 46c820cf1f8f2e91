"""What holds during a run, whatever a callback does: evaluation mode, a memory attached, gradients of the slots only."""

import inspect
import warnings

import pytest
import torch
from support.helpers import SETTINGS, TEXT, attached, tiny_model
from support.hosts import tiny
from support.writing import writable

import locas_ext as locas
from locas_ext.caller import caller_stacklevel


@pytest.mark.parametrize("update", ["backprop", "write"])
def test_a_callback_that_trains_the_model_does_not_turn_dropout_on(update):
    def run(callback):
        model, memory = writable(host=tiny("opt", dropout=0.5, attention_dropout=0.5))
        model.model.decoder.layers[0].train()
        report = memory.memorize(TEXT, **{**SETTINGS, "learning_rate": None}, update=update, callback=lambda _: callback(model))
        return report, memory, model

    report, memory, model = run(lambda model: model.train())
    expected, peer, _ = run(lambda model: None)
    assert report.chunks == expected.chunks and torch.equal(memory.slots, peer.slots)
    # every module is in the mode it was in before the run
    training = {name for name, module in model.named_modules() if module.training}
    layer = {name for name, _ in model.named_modules() if name.startswith("model.decoder.layers.0")}
    assert training == layer


@pytest.mark.parametrize("verb", ["memorize", "feed"])
def test_a_callback_that_detaches_ends_the_run(verb):
    model, memory = attached()
    if verb == "feed":
        memory.memorize(TEXT[:16], **SETTINGS)
    seen = []

    def detach(chunk):
        seen.append(chunk)
        if len(seen) == 2:
            memory.detach()

    with pytest.raises(ValueError, match=f"{verb}: this memory is no longer attached"):
        if verb == "feed":
            memory.feed(TEXT[16:], progress=False, callback=detach)
        else:
            memory.memorize(TEXT, **SETTINGS, callback=detach)
    assert len(seen) == 2 and not hasattr(model, "_locas_memory")
    again = locas.attach(model, memory.config)  # the model can have another
    assert again.memorize(TEXT, **SETTINGS).tokens == len(TEXT) - 1


@pytest.mark.parametrize("settings", [{}, dict(context_gradient=True), dict(epochs=2)], ids=str)
def test_only_slots_get_a_gradient(settings):
    model, memory = attached()
    peer = attached()[1]
    for parameter in model.parameters():  # as another library may do
        parameter.requires_grad_(True)
    memory.memorize(TEXT, **SETTINGS, **settings)
    assert all(parameter.grad is None for parameter in model.parameters())
    peer.memorize(TEXT, **SETTINGS, **settings)
    torch.testing.assert_close(memory.slots, peer.slots, rtol=1e-3, atol=1e-5)


# ---- whose line a warning is about ----------------------------------------------------------------------------
def test_warnings_point_at_the_callers_line(monkeypatch):
    lines = {}

    def here(name):
        lines[name] = inspect.currentframe().f_back.f_lineno

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        here("attach")
        _, memory = tiny_model(), locas.attach(tiny_model(), locas.LocasConfig("mlp", rank=4))  # gated hosts: a warning
        memory = writable(dtype=torch.bfloat16)[1]
        memory.write(TEXT[:20])
        here("compress")
        memory.compress(4)
    mine = [warning for warning in caught if warning.category is UserWarning]
    assert [(warning.filename, warning.lineno) for warning in mine] == [
        (__file__, lines["attach"] + 1),
        (__file__, lines["compress"] + 1),
    ]


def test_a_stacklevel_of_nobodys_call():
    assert caller_stacklevel() == 1  # this file is not the package's
