"""The memorizing step replayed from a CUDA graph learns what the eager step learns.

Every test runs on the GPU where there is one, and on the CPU with a stand-in for the graph that does the captured work again
at each replay.
"""

import copy
import warnings

import pytest
import torch
from support.helpers import TEXT, logits_of, random_ids, tiny_model
from support.hosts import TWO_LAYER, tiny

import locas_ext as locas
from locas_ext import _C
from locas_ext.hosts import window_reading
from locas_ext.learning import captured, cuda_graph, graph_step

no_gpu = not torch.cuda.is_available() or _C.build_info()["cuda_architectures"] is None
IDS = random_ids(20, seed=5)
TEXT = torch.cat([TEXT, random_ids(39, seed=8)])  # 103 tokens: the last chunk is not full
SETTINGS = dict(window=24, stride=7, learning_rate=1e-2, progress=False)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=[pytest.mark.cuda, pytest.mark.skipif(no_gpu, reason="no GPU")])])
def device(request, monkeypatch):
    monkeypatch.delenv("LOCAS_CUDA_GRAPH", raising=False)
    if request.param == "cpu":
        monkeypatch.setattr(cuda_graph, "_is_capturable", lambda device: True)
        monkeypatch.setattr(captured, "rehearse", lambda work, device: work())
        monkeypatch.setattr(captured, "capture", lambda work, device: work)
    return request.param


@pytest.fixture
def captures(device, monkeypatch):
    """As many items as there were captures."""
    done, capture = [], captured.capture
    monkeypatch.setattr(captured, "capture", lambda *args: done.append(1) or capture(*args))
    return done


def attached(device, family="llama", rank=5, dtype=torch.float32, rehome=False, settings=None, **config):
    model = tiny_model(family, dtype=dtype, **(settings or {})).to(device)
    return model, locas.attach(model, locas.LocasConfig(rank=rank, scale="host", **config), rehome=rehome)


def eagerly(monkeypatch, memory, ids, **settings):
    with monkeypatch.context() as patch:
        patch.setenv("LOCAS_CUDA_GRAPH", "0")
        report = memory.memorize(ids, **settings)
    assert report.graph == locas.GraphReport(0, report.graph.updates, "LOCAS_CUDA_GRAPH is 0")
    return report


def assert_same_run(memory, report, other, other_report, dtype=torch.float32):
    # AdamW divides by the gradient's size: where a gradient is about 0, its sign is a matter of rounding.
    distance = (memory.slots - other.slots).norm() / other.slots.norm()
    assert distance < (1e-3 if dtype == torch.float32 else 5e-2), distance
    assert memory.version == other.version and report.tokens == other_report.tokens
    for chunk, peer in zip(report.chunks, other_report.chunks, strict=True):
        assert (chunk.start, chunk.end, chunk.memory_version) == (peer.start, peer.end, peer.memory_version)
        assert chunk.nll == pytest.approx(peer.nll, rel=1e-4 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"optimizer": "sgd", "learning_rate": 0.5},
        {"context_gradient": True},
        {"bos": True},
        {"epochs": 3},
        {"window": 9, "stride": 9},
        {"window": 9, "stride": 8, "bos": True},
        {"window": 31, "stride": 5},
        {"window": 8, "stride": 1},
        {"context": "keep"},
        {"context": locas.Keep(sinks=2, refresh_every=3), "epochs": 2, "bos": True},
        {"context": locas.Keep(sinks=0), "window": 31, "stride": 5},
    ],
    ids=str,
)
def test_a_run_with_a_graph_is_a_run_without(device, settings, monkeypatch):
    settings = {**SETTINGS, **settings}
    memory, plain = attached(device)[1], attached(device)[1]
    report = memory.memorize(TEXT, **settings)
    assert_same_run(memory, report, plain, eagerly(monkeypatch, plain, TEXT, **settings))
    window, stride = settings["window"] - settings.get("bos", False), settings["stride"]
    full = sum(start > 0 and start + stride >= window for start in range(0, len(TEXT) - stride + 1, stride))
    epochs = settings.get("epochs", 1)
    assert report.graph == locas.GraphReport(full * epochs, memory.version) and full > 5
    again = attached(device)[1]
    repeated = again.memorize(TEXT, **settings)
    assert torch.equal(again.slots, memory.slots) and [c.nll for c in repeated.chunks] == [c.nll for c in report.chunks]


@pytest.mark.parametrize("config", [{}, {"clip": 1.5, "row_length": "host"}], ids=str)
@pytest.mark.parametrize("optimizer, rate", [("adamw", 2e-2), ("sgd", 0.5)])
@pytest.mark.parametrize("rates", [{}, {"gate_learning_rate": 1e-2, "value_learning_rate": 5e-3}], ids=str)
def test_rates_that_fade_need_no_new_graph(device, captures, config, optimizer, rate, rates, monkeypatch):
    update = locas.Backprop(learning_rate=rate, optimizer=optimizer, decay_after=2, **rates)
    settings = dict(window=24, stride=7, update=update, progress=False)
    memory, plain = attached(device, **config)[1], attached(device, **config)[1]
    report = memory.memorize(TEXT, **settings)
    assert len(captures) == 1 and report.graph == locas.GraphReport(11, memory.version)
    assert_same_run(memory, report, plain, eagerly(monkeypatch, plain, TEXT, **settings))


@pytest.mark.parametrize("family, host", [("qwen2", {}), ("qwen3", {}), ("mistral", {"sliding_window": 9})])
@pytest.mark.parametrize("rehome", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_hosts_dtypes_and_rehomed_weights(device, family, host, dtype, rehome, monkeypatch):
    model, memory = attached(device, family, dtype=dtype, rehome=rehome, settings=host)
    plain_model, plain = attached(device, family, dtype=dtype, settings=host)
    report = memory.memorize(TEXT, **SETTINGS)
    assert_same_run(memory, report, plain, eagerly(monkeypatch, plain, TEXT, **SETTINGS), dtype)
    tolerance = 1e-3 if dtype == torch.float32 else 0.2
    ours, theirs = (logits_of(m, IDS.to(device)).float() for m in (model, plain_model))
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("family", TWO_LAYER)
def test_two_layer_hosts(device, family, monkeypatch):
    memory, plain = (locas.attach(tiny(family).to(device), locas.LocasConfig("mlp", rank=5, scale="host")) for _ in "ab")
    report = memory.memorize(TEXT, **SETTINGS)
    assert_same_run(memory, report, plain, eagerly(monkeypatch, plain, TEXT, **SETTINGS))
    assert report.graph == locas.GraphReport(11, memory.version)


WRITE = dict(window=24, stride=7, progress=False)


@pytest.mark.parametrize("tokens", ["all", locas.TopLoss(3)], ids=str)
@pytest.mark.parametrize("family", TWO_LAYER)
def test_a_full_memory_is_written_from_a_graph(device, family, tokens, monkeypatch):
    """Once the oldest slots give way everything stays in its place."""
    update = locas.Write(epsilon=0.05, tokens=tokens, capacity=14, when_full="drop_oldest")
    memory, plain = (locas.attach(tiny(family).to(device), locas.LocasConfig("mlp", rank=5, scale="host")) for _ in "ab")
    report = memory.memorize(TEXT, **WRITE, update=update)
    plain_report = eagerly(monkeypatch, plain, TEXT, **WRITE, update=update)
    assert_same_run(memory, report, plain, plain_report)
    assert report.graph == locas.GraphReport(11 if tokens == "all" else 9, 15)


@pytest.mark.parametrize(
    "update, why_not",
    [
        (dict(tokens=locas.LossAbove(0.1), capacity=14, when_full="drop_oldest"), "known only when they are scored"),
        (dict(when_full="error"), "did not keep one size"),
        (dict(capacity=21, when_full="compress", compress_to=7), "did not keep one size"),
    ],
    ids=str,
)
def test_a_memory_that_is_another_one_with_each_chunk_is_written_eagerly(device, update, why_not):
    memory = locas.attach(tiny("opt").to(device), locas.LocasConfig("mlp", rank=5, scale="host"))
    report = memory.memorize(TEXT, **WRITE, update=locas.Write(epsilon=0.05, **update))
    assert report.graph.replayed == 0 and report.graph.updates == 15 and why_not in report.graph.why_not


@pytest.mark.parametrize("part", ["rehearse", "capture"])
def test_a_write_that_cannot_be_captured_goes_on(device, part, monkeypatch):
    real = getattr(captured, part)

    def fails(work, device):
        real(work, device)
        raise RuntimeError("no graphs today")

    monkeypatch.setattr(captured, part, fails)
    update = locas.Write(epsilon=0.05, capacity=14, when_full="drop_oldest")
    memory, plain = (locas.attach(tiny("opt").to(device), locas.LocasConfig("mlp", rank=5, scale="host")) for _ in "ab")
    with pytest.warns(UserWarning, match="without a CUDA graph.*no graphs today"):
        report = memory.memorize(TEXT, **WRITE, update=update)
    assert_same_run(memory, report, plain, eagerly(monkeypatch, plain, TEXT, **WRITE, update=update))


def test_a_memory_that_grows_on_the_way(device, captures, monkeypatch):
    """Slots written from a callback: the memory is another one, in another place, so the step is captured anew."""

    def run(memory, memorize):
        def callback(chunk):
            if chunk.end == 56:
                memory.write(IDS, epsilon=0.5, tokens=locas.TopLoss(7))

        report = memorize(callback)
        assert memory.status()[0].slots_used == 12 and memory.status()[0].capacity == 12
        return report

    memory, plain = (locas.attach(tiny("opt").to(device), locas.LocasConfig("mlp", rank=5, scale="host")) for _ in "ab")
    report = run(memory, lambda callback: memory.memorize(TEXT, **SETTINGS, callback=callback))
    assert len(captures) == 2 and report.graph == locas.GraphReport(11, 15)
    plain_report = run(plain, lambda callback: eagerly(monkeypatch, plain, TEXT, **SETTINGS, callback=callback))
    assert_same_run(memory, report, plain, plain_report)


def test_a_callback_that_looks_and_changes(device, monkeypatch):
    """A forward between the chunks; and the memory, its optimizer's states and the host's weights put elsewhere."""

    def run(memory, memorize):
        model = memory.model
        seen = []

        def callback(chunk):
            seen.append(logits_of(model, IDS.to(device)))
            if chunk.end == 35:
                callback.taken = memory.snapshot()
            if chunk.end == 56:
                memory.restore(callback.taken)
            if chunk.end == 63:
                with torch.no_grad():
                    memory.slots.mul_(0.5)
            if chunk.end == 70:
                other_scale = memory.snapshot()
                other_scale.tensors["scale"].mul_(-0.5)
                memory.restore(other_scale)
            if chunk.end == 77:
                model.model.layers[0].mlp.up_proj.weight.data = model.model.layers[0].mlp.up_proj.weight * 0.5
            if chunk.end == 84:
                memory.reset()

        return memorize(memory, TEXT, **SETTINGS, callback=callback), seen

    for rehome in (False, True):
        memory, plain = attached(device, rehome=rehome)[1], attached(device)[1]
        report, seen = run(memory, lambda m, *a, **k: m.memorize(*a, **k))
        plain_report, plain_seen = run(plain, lambda *a, **k: eagerly(monkeypatch, *a, **k))
        assert_same_run(memory, report, plain, plain_report)
        for ours, theirs in zip(seen, plain_seen, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_windows_that_need_one_forward(device, monkeypatch):
    needed = window_reading.Verdict(window_reading.ONE, "it was found to differ")
    monkeypatch.setattr(window_reading, "cheapest", lambda *_, **__: needed)
    memory, plain = attached(device)[1], attached(device)[1]
    report = memory.memorize(TEXT, **SETTINGS)
    expected = plain.memorize(TEXT, **SETTINGS, context_gradient=True)
    assert report.one_forward == ["it was found to differ"] and not expected.one_forward
    assert [chunk.nll for chunk in report.chunks] == pytest.approx([chunk.nll for chunk in expected.chunks], rel=1e-3)


def test_a_swapped_module_is_captured_anew(device, captures, monkeypatch):
    def run(memory, memorize):
        def callback(chunk):
            if chunk.end == 56:
                attention = memory.model.model.layers[1].self_attn
                attention.q_proj = copy.deepcopy(attention.q_proj)
                attention.q_proj.weight.mul_(0.5)

        return memorize(memory, TEXT, **SETTINGS, callback=torch.no_grad()(callback))

    memory, plain = (attached(device)[1] for _ in "ab")
    report = run(memory, locas.Memory.memorize)
    assert len(captures) == 2
    assert_same_run(memory, report, plain, run(plain, lambda *a, **k: eagerly(monkeypatch, *a, **k)))


@pytest.mark.parametrize("epochs", [1, 2])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_loss_that_is_not_finite_leaves_the_last_good_memory(device, optimizer, epochs):
    settings = {**SETTINGS, "optimizer": optimizer, "epochs": epochs}
    model, memory = attached(device)
    with torch.no_grad():
        model.model.embed_tokens.weight[60] = float("nan")
    clean = torch.where(TEXT == 60, 59, TEXT)
    poisoned = clean.clone()
    poisoned[50] = 60  # in chunk 7, a full window
    with pytest.raises(locas.LocasError, match=rf"loss is nan at chunk 7 \(tokens 49 to 55\).*version {7 * epochs}"):
        memory.memorize(poisoned, **settings)
    good = attached(device)[1]
    good.memorize(clean[:49], **settings)
    assert memory.version == good.version == 7 * epochs
    for name, tensor in good.state.tensors().items():
        assert torch.equal(memory.state.tensors()[name], tensor), name
    assert not memory.state.whole("grad").any()
    memory.memorize(clean[49:], **settings)  # it can go on
    good.memorize(clean[49:], **settings)
    assert torch.equal(memory.slots, good.slots)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_gradient_that_is_not_finite_is_not_learned(device, optimizer, monkeypatch):
    model, memory = attached(device)
    factor, gradient = torch.ones((), device=device), graph_step.gradient

    def overflowing(attachment, *arguments):
        loss, arena = gradient(attachment, *arguments), attachment.state.arenas[0]
        for tensor in [arena.grad] if arena.factors is None else [factors.tensors[0] for factors in arena.factors]:
            tensor.mul_(factor)
        return loss

    monkeypatch.setattr(graph_step, "gradient", overflowing)
    kept = []

    def callback(chunk):
        if chunk.end == 63:
            kept.append({name: tensor.clone() for name, tensor in memory.state.tensors().items()})
            factor.fill_(float("inf"))

    with pytest.raises(locas.LocasError, match=r"gradient is not finite at chunk 9 \(tokens 63 to 69\).*version 9"):
        memory.memorize(TEXT, **{**SETTINGS, "optimizer": optimizer}, callback=callback)
    assert memory.version == 9 and not memory.state.whole("grad").any()
    for name, tensor in kept[0].items():
        assert torch.equal(memory.state.tensors()[name], tensor), name


@pytest.mark.parametrize("context", ["recompute", "keep", locas.Keep(refresh_every=2)], ids=str)
@pytest.mark.parametrize("rehome", [False, True])
def test_a_resumed_run_is_bitwise_one_that_was_never_interrupted(device, rehome, context, tmp_path):
    settings = {**SETTINGS, "context": context}
    whole = attached(device, rehome=rehome)[1]
    whole_report = whole.memorize(TEXT, **settings)
    for stop in (14, 42):  # before and behind the first full window
        _, memory = attached(device, rehome=rehome)

        def interrupt(chunk):
            if chunk.end == stop:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            memory.memorize(TEXT, **settings, callback=interrupt)
        memory.save_pretrained(tmp_path / str(stop), optimizer=True)
        _, later = attached(device, rehome=rehome)
        report = later.memorize(TEXT, **settings, resume=tmp_path / str(stop))
        assert torch.equal(later.slots, whole.slots)
        assert [chunk.nll for chunk in report.chunks] == [chunk.nll for chunk in whole_report.chunks]


@pytest.mark.parametrize("part", ["rehearse", "capture"])
@pytest.mark.parametrize("rehome", [False, True])
def test_a_capture_that_fails_warns_once_and_loses_nothing(device, part, rehome, monkeypatch):
    memory, plain = attached(device, rehome=rehome)[1], attached(device, rehome=rehome)[1]
    real = getattr(captured, part)

    def fails(work, device):
        real(work, device)
        raise RuntimeError("no graphs today")

    monkeypatch.setattr(captured, part, fails)
    with pytest.warns(UserWarning, match="without a CUDA graph.*no graphs today") as warned:
        report = memory.memorize(TEXT, **SETTINGS)
    assert len(warned) == 1
    assert report.graph.replayed == 0 and "no graphs today" in report.graph.why_not
    assert_same_run(memory, report, plain, eagerly(monkeypatch, plain, TEXT, **SETTINGS))


@pytest.mark.cuda
@pytest.mark.skipif(no_gpu, reason="no GPU")
def test_a_host_that_waits_for_the_device_runs_eagerly():
    model, memory = attached("cuda")
    attention = model.model.layers[0].self_attn
    forward = attention.forward

    def waits(hidden_states, *args, **kwargs):
        hidden_states.sum().item()
        return forward(hidden_states, *args, **kwargs)

    attention.forward = waits
    with pytest.warns(UserWarning, match="without a CUDA graph.*test_cuda_graph.py:.* waits for the device"):
        report = memory.memorize(TEXT, **SETTINGS)
    assert report.graph.replayed == 0 and "waits for the device" in report.graph.why_not
    assert torch.randn(3, device="cuda").isfinite().all()  # the generator still works
    attention.forward = forward
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert memory.memorize(TEXT, **SETTINGS).graph == locas.GraphReport(11, 15)


def test_hosts_that_are_not_captured_say_why(device):
    model, memory = attached(device)
    handle = model.model.layers[1].register_forward_hook(lambda *_: None)
    assert memory.memorize(TEXT, **SETTINGS).graph == locas.GraphReport(0, 15, "model.layers.1 has hooks")
    handle.remove()
    with torch.autocast(device, dtype=torch.bfloat16):
        assert memory.memorize(TEXT, **SETTINGS).graph.why_not == "autocast is on"
    _, reference = attached(device, backend="reference")
    assert reference.memorize(TEXT, **SETTINGS).graph.why_not == "the reference backend waits for the device"
    twin = locas.memory_of(copy.deepcopy(model))
    assert twin.memorize(TEXT, **SETTINGS).graph == locas.GraphReport(11, 15)


def test_on_the_cpu_nothing_is_captured():
    _, memory = attached("cpu")
    assert memory.memorize(TEXT, **SETTINGS).graph == locas.GraphReport(0, 15, "the host is on cpu")


def test_a_step_that_no_window_fits_reports_none(device):
    _, memory = attached(device)
    assert memory.memorize(TEXT[:20], **SETTINGS).graph == locas.GraphReport(0, 3)
