"""Which family of CUDA kernels runs, how one is asked for, and the table by which "auto" chooses.

The table of GPUs itself is tested by csrc/simt/tests/families_test.cpp.
"""

import importlib.util
import os
import random
import subprocess
import sys

import pytest
import torch
from support.fused import on_gpu

import locas_ext as locas
from locas_ext import _C, ops
from locas_ext.hosts.tiny import tiny_host
from locas_ext.ops.backends import cpu, cuda_families
from locas_ext.ops.backends.cuda_families import FAMILIES, FASTER, Faster, use_family


# ---- LOCAS_CUDA_FAMILY -------------------------------------------------------------------------------------------
def imported_with(value):
    command = [sys.executable, "-c", "from locas_ext.ops.backends import cuda_families"]
    environment = {**os.environ, "LOCAS_CUDA_FAMILY": value, "PYTHONPATH": ":".join(sys.path)}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.mark.parametrize("value", ["70", "sm80"])
def test_an_unknown_family_is_refused_when_the_kernels_are_imported(value):
    assert imported_with(value).stderr.endswith(f"ValueError: LOCAS_CUDA_FAMILY is {value!r}; expected 80 or 90\n")


def test_a_refused_family_changes_nothing():
    before = _C.cuda_families()
    with pytest.raises(ValueError, match=r"^LOCAS_CUDA_FAMILY is '100'; expected 80 or 90$"):
        use_family("100")
    assert _C.cuda_families() == before == cuda_families.families()


def test_an_empty_variable_asks_for_none():
    assert imported_with("").returncode == 0


def test_an_import_leaves_the_driver_alone_until_a_gpu_matters(monkeypatch):
    """A child forked later could not use CUDA, and CUDA_VISIBLE_DEVICES would come too late."""
    asked = []
    monkeypatch.setattr(_C, "use_cuda_family", asked.append)
    monkeypatch.setattr(_C, "cuda_families", lambda: ["sm80"])
    monkeypatch.setenv("LOCAS_CUDA_FAMILY", "80")
    name = cuda_families.__name__
    spec = importlib.util.spec_from_file_location(name, cuda_families.__file__)
    anew = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(anew)
    assert asked == []
    assert anew.family(torch.ones(1)) == anew.family(torch.ones(1)) == "sm80" and asked == [80]


def test_the_first_question_may_come_from_a_compiled_graph(monkeypatch):
    monkeypatch.setattr(cuda_families, "_of_device", [])
    monkeypatch.setattr(_C, "use_cuda_family", lambda family: None)
    monkeypatch.setattr(_C, "cuda_families", lambda: ["sm90"])

    @torch.compile(fullgraph=True, backend="eager")
    def doubled_on_hopper(x):
        return 2 * x if cuda_families.family(x) == "sm90" else x

    assert doubled_on_hopper(torch.ones(4)).sum() == 8


# ---- few tokens ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("d", [512, 1536])
@pytest.mark.parametrize("tokens", [pytest.param(tokens, marks=on_gpu) for tokens in (1, 8, 12, 30)])
def test_few_tokens_replayed_and_on_two_streams_give_the_same_bits(tokens, d):
    """Cooperative kernels, whose blocks wait for each other, among them: each shape's forward or backward or both."""
    draw = lambda *size: torch.randn(*size, device="cuda", dtype=torch.bfloat16) / d**0.5
    m = 3 * d + 8
    x, *weights = draw(tokens, d), draw(m, d), draw(m, d), draw(d, m), draw(3, 20, d)

    def passes():
        leaf = x.clone().requires_grad_()
        y = ops.glu_ffn(leaf, *weights, 0.5, backend="fused")
        return y.detach(), *torch.autograd.grad(y, leaf, x)

    once = passes()
    graph, streams = torch.cuda.CUDAGraph(), (torch.cuda.Stream(), torch.cuda.Stream())
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        replayed = [passes() for _ in range(3)]
    for _ in range(20):
        graph.replay()
        torch.cuda.synchronize()
        several = []
        for stream in streams * 2:
            with torch.cuda.stream(stream):
                several.append(passes())
        torch.cuda.synchronize()
        assert all(torch.equal(ours, first) for both in (*replayed, *several) for ours, first in zip(both, once, strict=True))


# ---- what "auto" goes by -----------------------------------------------------------------------------------------
def test_every_family_has_a_table_in_order():
    assert set(FASTER) == {f"sm{name}" for name in FAMILIES}
    for faster in FASTER.values():
        assert faster.source and list(faster.tokens) == sorted(faster.tokens)
        for ranges in faster.tokens.values():
            ends = [end for both in ranges for end in both if end is not None]
            assert ends == sorted(ends) and all(last is not None for _, last in ranges[:-1])


def test_the_table_is_read_by_the_next_hidden_size():
    widths = sorted(random.sample(range(8, 5000), 3))
    faster_at = {width: sorted(random.sample(range(1, 30), random.randint(0, 10))) for width in widths}
    faster = Faster("drawn", {width: tuple((n, n) for n in tokens) for width, tokens in faster_at.items()})
    for _ in range(100):
        d, tokens = random.randint(1, 6000), random.randint(1, 30)
        wider = [width for width in widths if width >= d]
        assert faster.holds(tokens, d) == (tokens in faster_at[wider[0] if wider else widths[-1]]), (d, tokens, faster)


@pytest.mark.parametrize(
    "ranges, words, taken",
    [
        (((1, 64),), "fused up to 64 tokens, else matmul", [1, 64]),
        (((1, 128), (2048, None)), "fused up to 128 and from 2048 tokens, else matmul", [1, 128, 2048, 10**6]),
        (((16, 32),), "fused 16 to 32 tokens, else matmul", [16, 32]),
        (((1, None),), "fused", [1, 10**6]),
        ((), "matmul", []),
    ],
)
def test_ranges_hold_their_ends_and_have_words(ranges, words, taken):
    faster = Faster("given", {1024: ranges})
    assert faster.words(1024) == words
    edges = {1, 10**6} | {end + step for both in ranges for end in both if end for step in (-1, 0, 1)}
    inside = {tokens for tokens in edges if any(a <= tokens <= (b or tokens) for a, b in ranges)}
    assert {tokens for tokens in edges if faster.holds(tokens, 1024)} == inside and set(taken) <= inside


def test_the_table_is_read_inside_a_compiled_graph():
    table = Faster("a test", {1024: ((1, 128),)})

    @torch.compile(fullgraph=True, backend="eager")
    def doubled_where_faster(x):
        return 2 * x if table.holds(x.shape[0], 1024) else x

    assert doubled_where_faster(torch.ones(128)).sum() == 256 and doubled_where_faster(torch.ones(129)).sum() == 129


# ---- what names the family ---------------------------------------------------------------------------------------
def test_status_names_the_kernels_where_a_layer_runs_them():
    for backend in ("auto", "matmul", "reference"):
        (layer, *_) = locas.attach(tiny_host(), locas.LocasConfig(rank=4, backend=backend)).status()
        fused = backend == "auto" and torch.float32 in cpu.DTYPES
        assert layer.kernels == (_C.build_info()["cpu_isa"] if fused else None)


@pytest.mark.parametrize("name", [pytest.param(name, marks=on_gpu) for name in (None, *FAMILIES)])
def test_each_family_computes_the_same_ffn(name):
    is_hopper = torch.cuda.get_device_capability() == (9, 0) and "90a" in _C.build_info()["cuda_architectures"]
    if name == "90" and not is_hopper:
        with pytest.raises(ValueError, match=r"LOCAS_CUDA_FAMILY is 90, whose kernels run on compute capability 9\.0 only"):
            use_family(name)
        return
    try:
        use_family(name)
        assert _C.cuda_families()[0] == f"sm{name or (90 if is_hopper else 80)}"
        for tokens in (1, 20, 50, 200):
            d, m = 64, 200
            x = torch.randn(tokens, d, device="cuda", dtype=torch.bfloat16)
            weights = [torch.randn(*size, device="cuda", dtype=torch.bfloat16) / 8 for size in ((m, d), (m, d), (d, m))]
            slots = torch.randn(3, 5, d, device="cuda", dtype=torch.bfloat16) / 8
            y = ops.glu_ffn(x, *weights, slots, 0.5, backend="fused")
            exact = locas.reference.glu_ffn(x.double(), *(w.double() for w in weights), slots.double(), 0.5)
            torch.testing.assert_close(y.double(), exact, rtol=3e-2, atol=3e-2 * exact.abs().max().item())
        host = tiny_host().cuda().bfloat16()
        (layer, *_) = locas.attach(host, locas.LocasConfig(rank=4, backend="fused")).status()
        assert layer.kernels == _C.cuda_families()[0]
    finally:
        use_family(os.environ.get("LOCAS_CUDA_FAMILY") or None)


@pytest.mark.parametrize("tokens", [pytest.param(tokens, marks=on_gpu) for tokens in (3, 100, 300)])
def test_rows_that_overlap_are_computed(tokens):
    """No tensor map describes them, so the family of Hopper leaves them to the other one."""
    x = torch.randn(1, 64, device="cuda", dtype=torch.bfloat16).expand(tokens, 64)
    weights = [torch.randn(*size, device="cuda", dtype=torch.bfloat16) / 8 for size in ((200, 64), (200, 64), (64, 200))]
    slots = torch.randn(3, 5, 64, device="cuda", dtype=torch.bfloat16) / 8
    ours, plain = (ops.glu_ffn(rows, *weights, slots, 0.5, backend="fused") for rows in (x, x.contiguous()))
    torch.testing.assert_close(ours, plain, rtol=2e-2, atol=2e-2)
