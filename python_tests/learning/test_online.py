"""Online memorization: what is learned, from which forms of input, in which surroundings."""

import copy

import pytest
import torch
from support.helpers import (
    FAMILIES,
    TEXT,
    PlainMemory,
    assert_same_host,
    attached,
    double_host,
    learned,
    logits_of,
    plain_memorize,
    random_ids,
    relative_distance,
    snapshot,
    tiny_model,
    truncated_nll,
)
from support.online import memorize, papers

import locas_ext as locas
from locas_ext.hosts.registry import inspect_host
from locas_ext.learning.chunk import Window, WindowReader


# ---- learning -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "arguments",
    [
        dict(optimizer="sgd", learning_rate=0.5),
        dict(optimizer="sgd", learning_rate=0.5, context_gradient=True),
        dict(optimizer="sgd", learning_rate=0.5, epochs=3),
        dict(optimizer="adamw", learning_rate=1e-2),
        dict(optimizer="adamw", learning_rate=1e-2, epochs=2, context_gradient=True),
        dict(optimizer="sgd", learning_rate=0.5, bos=True),
    ],
    ids=lambda arguments: " ".join(f"{k}={v}" for k, v in arguments.items()),
)
def test_memorizing_is_the_protocol_written_down_in_plain_torch(family, arguments):
    """Scores and slots of a whole run against float64, torch.autograd and torch.optim."""
    model, memory = attached(family)
    ids = TEXT[:50]
    memory.initialize(ids[:8])
    names = ("optimizer", "learning_rate")
    plain = PlainMemory(tiny_model(family), memory.slots, memory.scale, **{name: arguments[name] for name in names})
    rest = {k: v for k, v in arguments.items() if k not in names}
    start = memory.slots.clone()
    report = memorize(memory, ids, **papers(**arguments))
    nlls = plain_memorize(plain, ids, 24, 8, **{**rest, "bos": 1 if rest.get("bos") else None})
    # AdamW divides a gradient by its own size: where that is rounding noise, so is the direction
    tight = arguments["optimizer"] == "sgd"
    assert [c.nll for c in report.chunks] == pytest.approx(nlls, rel=1e-5 if tight else 1e-3)
    moved, expected = memory.slots - start, plain.stacked() - start.double()
    assert expected.norm() > 0.05
    assert relative_distance(moved, expected) < (1e-4 if tight else 2e-2)


def test_a_fresh_run_is_one_over_a_memory_initialized_from_its_first_chunk():
    _, fresh = attached()
    _, ready = attached()
    ready.initialize(TEXT[:8])
    first, second = memorize(fresh, TEXT), memorize(ready, TEXT)
    assert first.chunks[0].nll == pytest.approx(second.chunks[0].nll, rel=1e-6)
    torch.testing.assert_close(fresh.slots, ready.slots, rtol=1e-3, atol=1e-4)


def test_context_gradient_is_the_gradient_through_the_whole_window():
    """One SGD step without the clip moves the slots by -lr times the autograd gradient of the window's mean loss."""
    for context_gradient in (True, False):
        _, memory = attached(clip=False)
        memory.initialize(TEXT[:24])
        with torch.no_grad():
            memory.slots[:, 2] = torch.randn_like(memory.slots[:, 2]) / 8
        ids, start, end = TEXT[:24], 16, 24
        plain = PlainMemory(tiny_model(), memory.slots, memory.scale)
        logits = plain.model(input_ids=ids[None, :-1]).logits[0, start - 1 :]
        loss = torch.nn.functional.cross_entropy(logits, ids[start:end])
        gradient = torch.stack(torch.autograd.grad(loss, plain.slots))

        steps = []

        def after_chunk(chunk):
            steps.append(memory.slots.clone())
            if chunk.end == start:
                with torch.no_grad():
                    memory.slots.copy_(before)

        before = memory.slots.clone()
        memorize(
            memory,
            ids,
            **papers(optimizer="sgd", learning_rate=0.5),
            context_gradient=context_gradient,
            callback=after_chunk,
        )
        distance = relative_distance((before - memory.slots) / 0.5, gradient)
        assert distance < 1e-4 if context_gradient else distance > 1e-2


def test_epochs_are_further_steps_on_the_same_chunk():
    once, thrice = (memorize(attached()[1], TEXT, epochs=epochs).chunks for epochs in (1, 3))
    assert once[0].nll == thrice[0].nll
    assert sum(c.nll for c in thrice) < sum(c.nll for c in once)


def test_a_learning_rate_of_zero_learns_nothing_but_counts():
    model, memory = attached()
    host = logits_of(model, random_ids(20))
    memorize(memory, TEXT, learning_rate=0)
    assert memory.version == 8 and not memory.slots[:, 2].any()
    torch.testing.assert_close(logits_of(model, random_ids(20)), host)


def test_runs_repeat_bit_for_bit():
    first, second = (learned()[1] for _ in range(2))
    assert torch.equal(first.slots, second.slots)


# ---- forms of the input ---------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "form",
    [
        lambda ids: ids.tolist(),
        lambda ids: tuple(ids.tolist()),
        lambda ids: ids[None],
        lambda ids: ids.to(torch.int32),
        lambda ids: ids.to(torch.uint8),
        lambda ids: ids.numpy(),
        lambda ids: [ids.tolist()],
        lambda ids: ids.repeat_interleave(2)[::2],
    ],
    ids=["list", "tuple", "[1, n]", "int32", "uint8", "numpy", "list of list", "strided"],
)
def test_every_form_of_input_ids_means_the_same(form):
    _, memory = attached()
    memorize(memory, form(TEXT))
    assert torch.equal(memory.slots, learned()[1].slots)


def test_the_text_is_left_alone():
    ids = TEXT.clone()
    memorize(attached()[1], ids)
    assert torch.equal(ids, TEXT)


def test_default_window_and_stride():
    _, memory = attached()
    report = memory.memorize(random_ids(100), progress=False)
    assert [(c.start, c.end) for c in report.chunks][:2] == [(0, 16), (16, 32)]  # a quarter of the 64 positions


# ---- surroundings ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("surrounding", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_memorize_works_in_any_grad_mode_and_leaves_it(surrounding):
    with surrounding():
        model, memory = attached()
        mode = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        if not mode[1]:
            memorize(memory, TEXT)
            assert mode == (torch.is_grad_enabled(), torch.is_inference_mode_enabled())
            assert torch.equal(memory.slots, learned()[1].slots)
    if mode[1]:  # the model's weights were made outside, as usual
        model, memory = attached()
        with torch.inference_mode():
            memorize(memory, TEXT)
            assert torch.is_inference_mode_enabled()
        assert torch.equal(memory.slots, learned()[1].slots)


def test_training_mode_dropout_and_use_cache_are_off_inside_and_back_outside():
    model, memory = attached(model_settings=dict(attention_dropout=0.5))
    model.config.use_cache = False
    model.train()
    model.model.layers[0].eval()
    before = snapshot(model)
    modes = []
    memorize(memory, TEXT, callback=lambda chunk: modes.append(any(m.training for m in model.modules())))
    assert_same_host(model, before)
    assert modes == [False] * 8 and torch.equal(memory.slots, learned()[1].slots)


def test_a_host_that_reports_hidden_states_and_attentions_is_left_whole():
    """Leaving a forward midway must not leave another library's bookkeeping behind."""
    model, memory = attached(model_settings=dict(attn_implementation="eager"))
    model.config.output_hidden_states = model.config.output_attentions = True
    logits_of(model, TEXT[:10])  # transformers installs its hooks at the first such forward, for good
    before = snapshot(model)
    memorize(memory, TEXT)
    assert_same_host(model, before)
    with torch.no_grad():
        out = model(input_ids=TEXT[None, :10])
    assert len(out.hidden_states) == 3 and len(out.attentions) == 2
    torch.testing.assert_close(memory.slots, learned()[1].slots, rtol=1e-3, atol=1e-4)


def test_other_peoples_hooks_are_called_and_kept():
    model, memory = attached()
    calls = []
    model.model.layers[1].register_forward_hook(lambda *_: calls.append(1))
    memorize(memory, TEXT)
    assert len(calls) >= 8
    torch.testing.assert_close(memory.slots, learned()[1].slots, rtol=1e-4, atol=1e-6)  # a hooked layer runs as it is


def test_memorizing_inside_disabled_is_refused():
    _, memory = attached()
    memory.initialize(TEXT[:8])
    with memory.disabled(), pytest.raises(ValueError, match="disabled"):
        memorize(memory, TEXT)
    assert memory.version == 0


def test_a_reset_from_the_callback_starts_anew_at_the_next_chunk():
    _, memory = attached()
    report = memorize(memory, TEXT, callback=lambda chunk: memory.reset() if chunk.end == 32 else None)
    plain = double_host(tiny_model())
    assert [c.memory_version for c in report.chunks] == [0, 1, 2, 3, 0, 1, 2, 3] and report.tokens == 63
    assert report.chunks[4].nll == pytest.approx(truncated_nll(plain, TEXT, 32, 40, 24).item(), rel=1e-5)


def test_progress_is_shown_on_standard_error_only(capsys):
    memorize(attached()[1], TEXT, progress=True)
    out, err = capsys.readouterr()
    assert out == "" and "64/64 tokens" in err and "/s perplexity" in err and "left" in err
    memorize(attached()[1], TEXT)
    assert capsys.readouterr() == ("", "")


def test_a_frozen_copy_of_the_report_survives_a_deep_copy():
    report = memorize(attached()[1], TEXT)
    assert copy.deepcopy(report).chunks == report.chunks
    with pytest.raises(AttributeError):
        report.chunks[0].nll = 0.0


def test_memorize_on_a_subset_of_layers_learns_only_there():
    model = tiny_model(num_hidden_layers=3)
    memory = locas.attach(model, locas.LocasConfig(rank=4, scale="host", layers=[1]))
    memory.initialize(TEXT[:8])
    plain = PlainMemory(
        tiny_model(num_hidden_layers=3), memory.slots, memory.scale, layers=[1], optimizer="sgd", learning_rate=0.5
    )
    report = memorize(memory, TEXT, **papers(optimizer="sgd", learning_rate=0.5))
    assert [c.nll for c in report.chunks] == pytest.approx(plain_memorize(plain, TEXT, 24, 8), rel=1e-5)
    assert relative_distance(memory.slots, plain.stacked()) < 1e-5


@pytest.mark.parametrize("settings", [dict(family="qwen3"), dict(family="mistral", sliding_window=4)], ids=str)
def test_a_forward_without_context_is_the_hosts_own_and_keeps_nothing(settings):
    model, ids, caches = tiny_model(**settings), random_ids(30), []
    handle = model.register_forward_hook(lambda module, args, y: caches.append(y.past_key_values))
    with torch.no_grad():
        logits = WindowReader(inspect_host(model)).logits(Window(ids[:0], ids[:-1], ids[1:]))
    handle.remove()
    assert torch.equal(logits, logits_of(model, ids[:-1]))
    assert caches[0].get_seq_length() == 0
