"""Ctrl-C while something changes: the change is whole, then KeyboardInterrupt; nobody is left out."""

import os
import signal
import threading

import pytest
import torch
from support.helpers import SETTINGS, TEXT, assert_same_host, attached, learned, logits_of, snapshot

import locas_ext as locas
from locas_ext.hosts.gated_ffn import GatedFFN
from locas_ext.patching.decoder_watch import DecoderWatch
from locas_ext.patching.rehome import RehomedFFN
from locas_ext.signals import interrupt, noting, uninterrupted
from locas_ext.state.memory_state import MemoryState


def press(signum=signal.SIGINT):
    os.kill(os.getpid(), signum)
    for _ in range(3):  # the handler runs here
        pass


def pressed_before(monkeypatch, owner, name):
    """From now on Ctrl-C is pressed before each call of a method."""
    works = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args, **named: press() or works(*args, **named))


@pytest.mark.parametrize("verb", ["load", "restore", "reset", "initialize"])
def test_a_verb_changes_all_or_nothing(verb, monkeypatch, tmp_path):
    def run(memory):
        return {
            "load": lambda: memory.load(tmp_path),
            "restore": lambda: memory.restore(other.snapshot()),
            "reset": memory.reset,
            "initialize": lambda: memory.initialize(TEXT[:20]),
        }[verb]()

    _, other = learned()
    other.memorize(TEXT[:24], **SETTINGS)
    other.save_pretrained(tmp_path, optimizer=True)
    (_, want), (_, memory) = learned(), learned()
    run(want)
    pressed_before(monkeypatch, MemoryState, "set_used")  # in the middle: the slots are there, the version is not
    with pytest.raises(KeyboardInterrupt):
        run(memory)
    monkeypatch.undo()
    assert (memory.version, memory.tokens_seen, len(memory.texts)) == (want.version, want.tokens_seen, len(want.texts))
    tensors = want.state.tensors()
    assert memory.state.tensors().keys() == tensors.keys()
    assert all(torch.equal(memory.state.tensors()[name], tensor) for name, tensor in tensors.items())
    assert memory.state.exclusion.holder is None and signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_long_text_to_initialize_from_need_not_be_waited_for():
    """Before anything changes Ctrl-C ends the forward that it comes in; the model is as it was."""
    model, memory = attached()
    model.train()
    ran = []
    layers = model.model.layers
    pressing = layers[0].register_forward_pre_hook(lambda *_: press())
    layers[-1].register_forward_hook(lambda *_: ran.append(1))
    with pytest.raises(KeyboardInterrupt):
        memory.initialize(TEXT[:20])
    assert not ran and not memory.state.initialized and all(module.training for module in model.modules())
    pressing.remove()
    memory.initialize(TEXT[:20])
    assert memory.state.initialized and memory.state.exclusion.holder is None


@pytest.mark.parametrize("verb", ["merge", "unmerge", "rehome"])
def test_copies_of_a_hosts_layers_end_between_two(verb, monkeypatch):
    """Ctrl-C while the first layer is copied: the second one is not, and all is as it was."""
    model, memory = learned()
    if verb == "unmerge":
        memory.merge_and_unload()
    if verb == "rehome":
        memory.detach()
    before, logits = snapshot(model), logits_of(model, TEXT)
    owner, name = (RehomedFFN, "adopt") if verb == "rehome" else (GatedFFN, "resized")
    works, copied = getattr(owner, name), []

    def pressed(*args):
        copied.append(1)
        press()
        return works(*args)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(owner, name, pressed)
        {
            "merge": memory.merge_and_unload,
            "unmerge": lambda: locas.unmerge(model),
            "rehome": lambda: locas.attach(model, locas.LocasConfig(rank=4), rehome=True),
        }[verb]()
    assert len(copied) == 1 and hasattr(model, "_locas_memory") == (verb == "merge")
    assert_same_host(model, before)
    assert torch.equal(logits_of(model, TEXT), logits) and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if verb == "merge":
        assert memory.state.exclusion.holder is None and memory.merge_and_unload() is model


def test_attaching_leaves_the_model_as_it_was(monkeypatch):
    model, memory = attached()
    memory.detach()
    before, host = snapshot(model), logits_of(model, TEXT)
    pressed_before(monkeypatch, DecoderWatch, "bind")
    with pytest.raises(KeyboardInterrupt):
        locas.attach(model, locas.LocasConfig(rank=4))
    assert_same_host(model, before)
    assert torch.equal(logits_of(model, TEXT), host)


@pytest.mark.parametrize("verb", ["detach", "merge_and_unload"])
def test_ending_it_is_done(verb, monkeypatch):
    model, memory = learned()
    pressed_before(monkeypatch, DecoderWatch, "unbind")
    with pytest.raises(KeyboardInterrupt):
        getattr(memory, verb)()
    assert not hasattr(model, "_locas_memory") and all(p.requires_grad for p in model.parameters())
    assert all("forward" not in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("signum, said", [(signal.SIGINT, ()), (signal.SIGTERM, (signal.SIGTERM,))])
def test_what_was_noted_is_raised_as_the_handler_would_have(signum, said):
    """A conversation goes on after Ctrl-C, and ends after the other signals: `args` tells them apart."""
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt) as raised, uninterrupted():
            press(signum)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert raised.value.args == said


def test_an_error_inside_is_the_one_that_is_seen():
    with pytest.raises(LookupError), uninterrupted():
        press()
        raise LookupError


def test_other_threads_and_handlers_are_left_alone():
    done = []

    def work():
        with uninterrupted():
            done.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [signal.default_int_handler]
    mine = signal.signal(signal.SIGINT, lambda *_: done.append("mine"))
    try:
        with noting() as check:
            press()
        check()
        assert done[-1] == "mine"
    finally:
        signal.signal(signal.SIGINT, mine)


def test_nobody_need_listen():
    """A closed standard error is no reason to stop in the middle."""
    kept = os.dup(2)
    try:
        os.close(2)
        with noting(b"stopping") as check:
            press()
    finally:
        os.dup2(kept, 2)
        os.close(kept)
    with pytest.raises(KeyboardInterrupt):
        check()
