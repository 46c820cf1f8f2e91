"""All backends have one interface, and compute what the one in plain torch computes in float64."""

import inspect

import pytest
import torch

from locas_ext.ops.backends import cpu, cuda, matmul, reference
from locas_ext.ops.backends.base import Backend, FusedBackend
from locas_ext.ops.types import HostWeights, SlotViews

BACKENDS = {"matmul": matmul, "reference": reference}
if torch.float32 in cpu.DTYPES:
    BACKENDS["cpu"] = cpu
if cuda.BUILT and torch.cuda.is_available():
    BACKENDS["cuda"] = cuda
LOOSE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


def functions(protocol):
    return [name for name in vars(protocol) if inspect.isfunction(vars(protocol)[name]) and not name.startswith("_")]


@pytest.mark.parametrize("module", [matmul, cuda, cpu, reference])
def test_a_backend_takes_the_protocols_arguments_by_name(module):
    fused = functions(FusedBackend) if module in (cuda, cpu) else []
    for name in [*functions(Backend), *fused]:
        protocol = vars(FusedBackend if name in fused else Backend)[name]
        wanted, given = inspect.signature(protocol).parameters, inspect.signature(getattr(module, name)).parameters
        assert list(wanted)[1:] == list(given), name


def case(seed, dtype, device):
    """-> x, dy, host, slots of a random size."""
    sizes = torch.randint(1, 7, (4,), generator=torch.Generator().manual_seed(seed)).tolist()
    tokens, d, m, rank = sizes[0] * 3, 8 * sizes[1], 8 * sizes[2], sizes[3] + 1
    torch.manual_seed(seed)
    make = lambda *shape: (torch.randn(shape) / shape[-1] ** 0.5).to(device, dtype)
    host = HostWeights(make(m, d), make(m, d), make(d, m), make(m), make(m), make(d))
    return make(tokens, d) * d**0.5, make(tokens, d), host, make(3, rank, d)


def double(tensor):
    return tensor.double().cpu()


def run(module, x, dy, host, slots, needs_dx, sink):
    """Every forward and backward of a module, by name; the slots' gradient comes from `sink` where there is one."""
    views, alone = SlotViews.of(slots), SlotViews.of(slots[1:])
    grad = lambda planes: torch.zeros(slots[-planes:].shape, dtype=torch.float32, device=x.device) if sink else None
    y, saved = module.glu_ffn_forward(x, host, views, 0.5, 1, True, needs_dx)
    whole = grad(3)
    dx, d_slots = module.glu_ffn_backward(dy, x, saved, host, views, 0.5, 1, needs_dx, whole)
    results = {"y": y, "dx": dx, "d_slots": whole if sink else d_slots}
    y, saved = module.sideway_glu_forward(x, views, 0.5, 0)
    whole = grad(3)
    dx, d_slots = module.sideway_glu_backward(dy, x, saved, views, 0.5, 0, needs_dx, whole)
    results |= {"glu y": y, "glu dx": dx, "glu d_slots": whole if sink else d_slots}
    y, saved = module.sideway_mlp_forward(x, alone, 0.5, 2)
    whole = grad(2)
    dx, d_slots = module.sideway_mlp_backward(dy, x, saved, alone, 0.5, 2, needs_dx, True, whole)
    results |= {"mlp y": y, "mlp dx": dx, "mlp d_slots": whole if sink else d_slots}
    results["importance"] = module.neuron_importance(x, host, 3)
    return {name: result for name, result in results.items() if result is not None}


@pytest.mark.parametrize("needs_dx, sink", [(True, False), (True, True), (False, False)])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", BACKENDS)
def test_a_backend_computes_what_the_reference_does(name, seed, needs_dx, sink):
    module, device = BACKENDS[name], "cuda" if name == "cuda" else "cpu"
    dtype = torch.bfloat16 if name == "cuda" else torch.float32
    x, dy, host, slots = case(seed, dtype, device)
    ours = run(module, x, dy, host, slots, needs_dx, sink)
    exact = run(reference, double(x), double(dy), HostWeights(*map(double, host)), double(slots), needs_dx, sink=False)
    assert ours.keys() == exact.keys()
    tolerance = LOOSE[dtype]
    for result, value in ours.items():
        say = lambda message, result=result: f"{result}: {message}"
        torch.testing.assert_close(double(value), exact[result], rtol=tolerance, atol=tolerance, msg=say)


def test_saved_shapes_are_those_of_what_is_saved():
    for name, module in BACKENDS.items():
        device, dtype = ("cuda", torch.bfloat16) if name == "cuda" else ("cpu", torch.float32)
        x, _, host, slots = case(1, dtype, device)
        saved = module.glu_ffn_forward(x, host, SlotViews.of(slots), 0.5, 0, save=True)[1]
        assert [tuple(t.shape) for t in saved] == module.saved_shapes(len(x), len(host.gate), slots.shape[1])
        assert module.glu_ffn_forward(x, host, SlotViews.of(slots), 0.5, 0, save=False)[1] == ()
