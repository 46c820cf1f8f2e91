"""The fused CPU backend: sizes around its tiles and chunks, layouts, threads, and what it refuses."""

import pytest
import torch
from support.cases import Case, fused, fused_formula
from support.helpers import random_ids, tiny_model

import locas_ext as locas
from locas_ext import _C
from locas_ext.ops.backends import cpu, glu_ffn_backend, matmul
from locas_ext.ops.types import HostWeights, SlotViews

DTYPES = [
    pytest.param(dtype, id=str(dtype), marks=pytest.mark.skipif(dtype not in cpu.DTYPES, reason="needs AVX-512"))
    for dtype in (torch.float32, torch.bfloat16)
]
NATIVE = fused(0.37, "silu", backend="fused")
# tokens, d, m, r: tiles are 8 rows by 48 tokens, blocks 64 rows, k is cut at 128 and 512 words, chunks at 528 tokens
SHAPES = [
    (1, 2, 2, 1),
    (16, 48, 64, 8),
    (48, 128, 130, 9),
    (49, 130, 126, 7),
    (97, 66, 258, 65),
    (33, 1026, 36, 5),
    (20, 34, 2050, 130),
    (528, 18, 22, 3),
    (529, 62, 70, 11),
    (1100, 50, 34, 64),
]


def operands(tokens, d, m, r, dtype, seed=0):
    case = Case((tokens, d, m, r), dtype, seed)
    return case.x, HostWeights(*case.host), SlotViews.of(case.slots), case.dy


def run(x, host, views, dy, needs_dx=True):
    y, saved = cpu.glu_ffn_forward(x, host, views, 0.37, 0, save=True, needs_dx=needs_dx)
    return (y, *cpu.glu_ffn_backward(dy, x, saved, host, views, 0.37, 0, needs_dx, None))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_sizes_around_tiles_and_chunks(dtype, shape):
    Case(shape, dtype, seed=sum(shape), biases=shape[0] % 2 == 0).compare(NATIVE, fused_formula(0.37, "silu"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_result_does_not_depend_on_the_threads(dtype, two_threads):
    case = operands(200, 96, 200, 20, dtype)
    first = run(*case)
    torch.set_num_threads(1)
    for mine, other in zip(run(*case), first, strict=False):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_dx_only_the_memorys_activations_are_kept(dtype):
    x, host, views, dy = operands(50, 40, 80, 6, dtype)
    _, saved = cpu.glu_ffn_forward(x, host, views, 0.37, 0, save=True, needs_dx=False)
    assert saved[0].shape == (2, 64, 6)
    _, dx, d_slots = run(x, host, views, dy, needs_dx=False)
    assert dx is None and torch.equal(d_slots, run(x, host, views, dy)[2])


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gradient_is_added_in_place(dtype):
    x, host, views, dy = operands(30, 24, 34, 5, dtype)
    _, saved = cpu.glu_ffn_forward(x, host, views, 0.37, 0, save=True)
    grad = torch.full((3, 5, 24), 2.0)
    assert cpu.glu_ffn_backward(dy, x, saved, host, views, 0.37, 0, True, grad)[1] is None
    torch.testing.assert_close(grad, run(x, host, views, dy)[2] + 2.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_operands(dtype):
    """Rows of a wider matrix, a transposed dy, one element off any alignment, gate and up in one fused projection."""
    x, host, views, dy = operands(33, 26, 44, 5, dtype)
    expected = run(x, host, views, dy)
    wide = torch.randn(33, 40).to(dtype)
    wide[:, 7:33] = x
    gate_up = torch.cat([host.gate, host.up])
    down = torch.randn(26, 51).to(dtype)
    down[:, 1:45] = host.down
    host = HostWeights(gate_up[:44], gate_up[44:], down[:, 1:45])
    for mine, other in zip(run(wide[:, 7:33], host, views, dy.T.contiguous().T), expected, strict=False):
        assert torch.equal(mine, other)


def test_reading_and_learning_give_the_same_output():
    x, host, views, _ = operands(70, 32, 90, 8, torch.float32)
    if torch.float32 not in cpu.DTYPES:
        pytest.skip("needs AVX-512")
    read = cpu.glu_ffn_forward(x, host, views, 0.37, 0, save=False)[0]
    assert torch.equal(read, cpu.glu_ffn_forward(x, host, views, 0.37, 0, save=True)[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_auto_takes_it_from_two_tokens(dtype):
    weight = torch.zeros(16, 8, dtype=dtype)
    assert glu_ffn_backend("glu_ffn", torch.zeros(2, 8, dtype=dtype), weight, "auto") is cpu
    assert glu_ffn_backend("glu_ffn", torch.zeros(1, 8, dtype=dtype), weight, "auto") is matmul
    assert glu_ffn_backend("glu_ffn", torch.zeros(2, 8, dtype=dtype), weight, "matmul") is matmul


def test_a_memory_says_which_backend_it_uses():
    memory = locas.attach(tiny_model(), locas.LocasConfig(rank=4))
    expected = "fused from 2 tokens, else matmul" if cpu.DTYPES else "matmul"
    assert {entry.backend for entry in memory.status()} == {f"{expected}, whole"}


@pytest.mark.skipif(not cpu.DTYPES, reason="needs AVX-512")
def test_a_memory_learns_the_same_through_both_backends():
    slots = {}
    for backend in ("fused", "matmul"):
        memory = locas.attach(tiny_model(), locas.LocasConfig(rank=4, scale="host", backend=backend))
        memory.memorize(random_ids(60), window=24, stride=8, learning_rate=1e-2, progress=False)
        slots[backend] = memory.slots.clone()
    torch.testing.assert_close(slots["fused"], slots["matmul"], rtol=0, atol=1e-4)


@pytest.mark.skipif(torch.bfloat16 not in cpu.DTYPES, reason="needs AVX-512 BF16")
def test_odd_sizes_in_bfloat16_are_refused_or_left_to_matmul():
    x, weight = torch.zeros(4, 9, dtype=torch.bfloat16), torch.zeros(16, 9, dtype=torch.bfloat16)
    assert glu_ffn_backend("glu_ffn", x, weight, "auto") is matmul
    with pytest.raises(ValueError, match="even sizes in bfloat16; here hidden_size is 9 and intermediate_size 16"):
        glu_ffn_backend("glu_ffn", x, weight, "fused")
    assert cpu.choice(x, 9, 16) == "matmul"


def test_another_dtype_is_refused():
    x, weight = torch.zeros(4, 8, dtype=torch.float16), torch.zeros(16, 8, dtype=torch.float16)
    with pytest.raises(ValueError, match="glu_ffn: backend is 'fused', but on "):
        glu_ffn_backend("glu_ffn", x, weight, "fused")


@pytest.mark.skipif(not cpu.DTYPES, reason="needs AVX-512")
def test_the_binding_checks_its_arguments():
    x, host, views, dy = operands(4, 8, 16, 3, torch.float32)
    y, grad = torch.empty(4, 8), torch.zeros(3, 3, 8)
    forward = lambda x=x, gate=host.gate, saved=None: _C.cpu_glu_ffn_forward(x, gate, *host[1:], *views, y, saved, 0, 1.0)
    with pytest.raises(ValueError, match="cpu_glu_ffn_forward: x has dtype float16; expected float32"):
        forward(x=x.half())
    with pytest.raises(ValueError, match=r"cpu_glu_ffn_forward: up has shape \[16, 8\]; expected \[12, 8\]"):
        forward(gate=host.gate[:12])
    with pytest.raises(ValueError, match=r"saved has shape \[2, 16, 18\]; expected \[2, 16, 19 or 3\]"):
        forward(saved=torch.empty(2, 16, 18))
    small = torch.empty(2, 16, 3)
    with pytest.raises(ValueError, match=r"saved has shape \[2, 16, 3\]; expected the host's 16 neurons in it too"):
        _C.cpu_glu_ffn_backward(dy, x, small, *host[:3], *views, torch.empty(4, 8), grad, 0, 1.0)
    with pytest.raises(ValueError, match=r"slots_grad has shape \[2, 3, 8\]; expected \[3, 3, 8\]"):
        _C.cpu_glu_ffn_backward(dy, x, small, *host[:3], *views, None, grad[:2], 0, 1.0)
