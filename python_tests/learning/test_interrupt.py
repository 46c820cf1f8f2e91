"""Runs that do not reach their end: exceptions, Ctrl-C, losses that are not finite."""

import multiprocessing
import os
import signal
import threading
import time
from contextlib import suppress

import pytest
import torch
from support.forked import forked
from support.helpers import SETTINGS, TEXT, assert_same_host, attached, snapshot
from support.interrupting import Stop, memorize_until_interrupted, stop_after

import locas_ext as locas
from locas_ext.state.scope import Scope, scope_of


def slots_after(chunks, **changes):
    _, memory = attached()
    memory.memorize(TEXT[: 8 * chunks], **{**SETTINGS, **changes})
    return memory.slots


# ---- what a callback raises -----------------------------------------------------------------------------------
@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt, SystemExit, StopIteration, GeneratorExit])
def test_what_a_callback_raises_ends_the_run_after_the_last_update(error):
    model, memory = attached()
    model.train()
    model.model.layers[1].eval()
    handler, before = signal.getsignal(signal.SIGINT), snapshot(model)
    with pytest.raises(error):
        memory.memorize(TEXT, **SETTINGS, callback=stop_after(3, error))
    assert memory.version == 3 and torch.equal(memory.slots, slots_after(3))
    assert_same_host(model, before)
    assert signal.getsignal(signal.SIGINT) is handler and torch.is_grad_enabled()
    assert not memory.state.whole("grad").any() and not memory.state.disabled
    assert scope_of(memory.state) == Scope()
    assert all(a.grad is b for a, b in zip(memory.parameters(), memory.state.arenas[0].grads, strict=False))
    # and it works on as if the rest of the text were new
    report = memory.memorize(TEXT[24:], **SETTINGS)
    assert report.chunks[0].memory_version == 3


def test_grad_mode_is_restored_after_an_exception():
    _, memory = attached()
    with torch.no_grad():
        with pytest.raises(Stop):
            memory.memorize(TEXT, **SETTINGS, callback=stop_after(1))
        assert not torch.is_grad_enabled()


def test_an_exception_inside_the_hosts_forward_changes_nothing():
    model, memory = attached()
    memory.memorize(TEXT[:24], **SETTINGS)
    slots, before = memory.slots.clone(), snapshot(model)
    calls = []

    def fail(module, args):
        calls.append(1)
        raise Stop

    hook = model.model.layers[1].self_attn.register_forward_pre_hook(fail)
    with pytest.raises(Stop):
        memory.memorize(TEXT, **SETTINGS)
    hook.remove()
    assert calls and memory.version == 3 and torch.equal(memory.slots, slots)
    assert_same_host(model, before)


def test_an_exception_while_initializing_leaves_an_uninitialized_memory():
    model, memory = attached()

    def fail(module, args):
        raise Stop

    hook = model.model.layers[1].register_forward_pre_hook(fail)
    for run in (lambda: memory.memorize(TEXT, **SETTINGS), lambda: memory.initialize(TEXT[:8])):
        with pytest.raises(Stop):
            run()
        assert not memory.slots.any() and not memory.state.initialized and not memory.state.disabled
    hook.remove()
    memory.memorize(TEXT, **SETTINGS)
    assert torch.equal(memory.slots, slots_after(8))


# ---- losses that are not finite -------------------------------------------------------------------------------
def poisoned(value, weight="model.embed_tokens.weight", token=60):
    """A host that computes nonsense as soon as `token` comes up, and a text in which that is in chunk 3."""
    model, memory = attached()
    with torch.no_grad():
        model.get_parameter(weight)[token] = value
    text = TEXT.clone()
    text[text == token] = 3
    clean = text.clone()
    text[26] = token
    return model, memory, text, clean


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("context_gradient", [False, True])
def test_a_loss_that_is_not_finite_stops_at_its_chunk_with_the_last_good_memory(value, context_gradient):
    model, memory, text, clean = poisoned(value)
    before = snapshot(model)
    with pytest.raises(locas.LocasError, match=r"loss is nan at chunk 3 \(tokens 24 to 31\).*version 3"):
        memory.memorize(text, **SETTINGS, context_gradient=context_gradient)
    assert memory.version == 3 and memory.slots.isfinite().all()
    assert all(
        state.isfinite().all()
        for state in (memory.state.whole("exp_avg"), memory.state.whole("exp_avg_sq"), memory.state.whole("grad"))
    )
    good = attached()[1]
    good.memorize(clean[:24], **SETTINGS, context_gradient=context_gradient)
    assert torch.equal(memory.slots, good.slots)
    for name, tensor in before["state"].items():
        torch.testing.assert_close(model.state_dict()[name], tensor, rtol=0, atol=0, equal_nan=True)
    memory.memorize(clean[24:], **SETTINGS)  # it can go on


@pytest.mark.parametrize("weight", ["lm_head.weight", "model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_a_broken_host_is_noticed_at_the_first_chunk(weight):
    model, memory = attached()
    with torch.no_grad():
        model.get_parameter(weight).view(-1)[0] = float("inf")
    with pytest.raises(locas.LocasError, match="not finite|loss is nan at chunk 0|loss is inf at chunk 0"):
        memory.memorize(TEXT, **SETTINGS)
    assert memory.version == 0 and memory.slots.isfinite().all() and not memory.slots[:, 2].any()


def test_a_gradient_that_is_not_finite_is_not_learned():
    """A finite loss whose backward overflows: float16 in the host's own norm, say; here a hook stands in."""
    model, memory = attached()
    memory.memorize(TEXT[:24], **SETTINGS)
    slots = memory.slots.clone()
    hook = model.lm_head.register_full_backward_pre_hook(lambda module, grad: (grad[0] * float("inf"),))
    with pytest.raises(locas.LocasError, match="gradient is not finite at chunk 0.*version 3"):
        memory.memorize(TEXT[24:], **SETTINGS)
    hook.remove()
    assert memory.version == 3 and torch.equal(memory.slots, slots) and not memory.state.whole("grad").any()


# ---- Ctrl-C ---------------------------------------------------------------------------------------------------
def test_ctrl_c_takes_effect_behind_the_running_chunk():
    _, memory = attached()
    handler = signal.getsignal(signal.SIGINT)

    def press(chunk):
        if chunk.end == 16:
            os.kill(os.getpid(), signal.SIGINT)
            for _ in range(3):
                time.sleep(0.01)  # the handler runs here and must not raise yet
            press.survived = True

    with pytest.raises(KeyboardInterrupt):
        memory.memorize(TEXT, **SETTINGS, callback=press)
    assert press.survived and torch.equal(memory.slots, slots_after(2))
    assert signal.getsignal(signal.SIGINT) is handler


def test_an_impatient_ctrl_c_waits_for_the_chunk_too(capfd):
    _, memory = attached()

    def press(chunk):
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
        press.survived = True

    press.survived = False
    with pytest.raises(KeyboardInterrupt):
        memory.memorize(TEXT, **SETTINGS, callback=press)
    assert press.survived and memory.version == 1
    assert capfd.readouterr().err.count("stopping after this chunk") == 1


def test_a_handler_of_the_callers_own_is_left_alone():
    _, memory = attached()
    pressed = []
    mine = lambda *_: pressed.append(1)
    before = signal.signal(signal.SIGINT, mine)
    try:
        memory.memorize(TEXT, **SETTINGS, callback=lambda chunk: os.kill(os.getpid(), signal.SIGINT))
        assert signal.getsignal(signal.SIGINT) is mine and memory.version == 8 and pressed
    finally:
        signal.signal(signal.SIGINT, before)


def test_memorize_works_in_a_thread():
    _, memory = attached()
    thread = threading.Thread(target=lambda: memory.memorize(TEXT, **SETTINGS))
    thread.start()
    thread.join()
    assert torch.equal(memory.slots, slots_after(8))


def test_sigint_to_a_process_saves_what_was_learned_and_the_run_resumes_to_the_bit(tmp_path):
    """As a user would: Ctrl-C in a terminal, then once more with resume."""
    told, tell = multiprocessing.Pipe(duplex=False)
    process = forked(memorize_until_interrupted, tmp_path / "memory", tell)
    process.start()
    tell.close()
    with suppress(EOFError):
        while True:
            version = told.recv()  # the ends of chunks, until it is interrupted
            if version == 40:
                os.kill(process.pid, signal.SIGINT)
    process.join()
    assert process.exitcode == 0 and 5 <= version < 1000
    memory = attached()[1]
    memory.load(tmp_path / "memory")
    text = TEXT.repeat(125)[: 8 * version]
    uninterrupted = attached()[1]
    uninterrupted.memorize(text, **SETTINGS)
    assert torch.equal(memory.slots, uninterrupted.slots)
