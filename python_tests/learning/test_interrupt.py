"""Runs that do not reach their end: exceptions, Ctrl-C, losses that are not finite; and taking up a saved run."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
import torch
from support.helpers import SETTINGS, TEXT, assert_same_host, attached, logits_of, random_ids, snapshot, tiny_model

import locas_ext as locas


class Stop(Exception):
    pass


def stop_after(chunks, error=Stop):
    """A callback that raises once `chunks` chunks are done."""
    seen = []

    def callback(chunk):
        seen.append(chunk)
        if len(seen) == chunks:
            raise error

    return callback


def interrupted(chunks, error=Stop, **changes):
    model, memory = attached()
    with pytest.raises(error):
        memory.memorize(TEXT, **{**SETTINGS, **changes}, callback=stop_after(chunks, error))
    return model, memory


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
    assert not memory.state.whole("grad").any() and memory.state.disabled == 0
    assert not any(arena.accumulates for arena in memory.state.arenas)
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
        assert not memory.slots.any() and not memory.state.initialized and memory.state.disabled == 0
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
    script = """
        import sys
        import torch
        sys.path.insert(0, sys.argv[1])
        torch.set_num_threads(1)
        from support.helpers import SETTINGS, attached, repeated_text
        memory = attached()[1]
        try:
            memory.memorize(repeated_text(16, 500), **SETTINGS, callback=lambda c: print(c.end, flush=True))
        except KeyboardInterrupt:
            memory.save_pretrained(sys.argv[2], optimizer=True)
            print("saved", memory.version, flush=True)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script), str(Path(__file__).parents[1]), str(tmp_path / "memory")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        while process.stdout.readline() not in ("40\n", ""):
            pass
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0, err
    version = int(out.split("saved")[1])
    assert 5 <= version < 1000
    memory = attached()[1]
    memory.load(tmp_path / "memory")
    text = TEXT.repeat(125)[: 8 * version]
    uninterrupted = attached()[1]
    uninterrupted.memorize(text, **SETTINGS)
    assert torch.equal(memory.slots, uninterrupted.slots)


# ---- resume ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("chunks", [1, 3, 7])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(optimizer="sgd", learning_rate=0.3),
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
    for name in ("exp_avg", "exp_avg_sq", "step"):
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
