"""The fused CUDA kernels (K1-K4, D1, D2) through the public ops; on the SIMT runner they are tested without a GPU."""

import pytest
import torch
from support.fused import DTYPES, on_gpu

import locas_ext as locas
from locas_ext import _C, ops, reference
from locas_ext.ops.backends import cuda
from locas_ext.ops.types import HostWeights, SlotViews

ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
# tokens, d, m, rank: every tile and every decode width, sizes that fill none of them.
SHAPES = [
    (1, 64, 128, 5),
    (7, 264, 520, 16),
    (8, 1024, 3072, 64),
    (13, 136, 200, 1),
    (16, 2048, 6144, 64),
    (31, 72, 1000, 33),
    (64, 1024, 3072, 64),
    (65, 256, 768, 64),
    (100, 1032, 264, 130),
    (257, 512, 1544, 40),
    (512, 1024, 3072, 64),
    (1000, 2048, 6144, 64),
    (2048, 1024, 3072, 512),
]


class Case:
    """One FFN with memory on the GPU and the same numbers in float64."""

    def __init__(self, tokens, d, m, rank, dtype, biases=False, activation="silu"):
        make = lambda *shape, fan_in=1: (torch.randn(*shape, device="cuda") / fan_in**0.5).to(dtype)
        self.x, self.dy = make(tokens, d), make(tokens, d)
        weights = make(m, d, fan_in=d), make(m, d, fan_in=d), make(d, m, fan_in=m)
        self.host = [*weights, *((make(m), make(m), make(d)) if biases else (None, None, None))]
        self.slots = make(3, rank, d, fan_in=d)
        self.scale, self.activation = 0.7, activation

    def run(self, backend, dtype=None, needs_dx=True):
        cast = lambda t: None if t is None else t.detach().to(dtype or t.dtype)
        x, slots = cast(self.x).requires_grad_(needs_dx), cast(self.slots).requires_grad_()
        gate, up, down, *biases = (cast(t) for t in self.host)
        y = ops.glu_ffn(x, gate, up, down, slots, self.scale, self.activation, *biases, backend=backend)
        y.backward(cast(self.dy))
        return {"y": y.detach(), "slots.grad": slots.grad, **({"dx": x.grad} if needs_dx else {})}


def assert_as_good_as_torch(ours, peer, exact, dtype):
    for name, value in ours.items():
        error = (value.double() - exact[name]).abs().max().item()
        peer_error = (peer[name].double() - exact[name]).abs().max().item()
        allowed = 2 * peer_error + ROUNDING[dtype] * exact[name].abs().max().item()
        assert error <= allowed, f"{name}: error {error:.3g}, torch at the same dtype has {peer_error:.3g}"


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
class TestOnGpu:
    pytestmark = on_gpu

    def test_forward_and_backward(self, shape, dtype):
        case = Case(*shape, dtype, biases=shape[0] % 2 == 0)
        ours = case.run("fused")
        assert_as_good_as_torch(ours, case.run("reference"), case.run("reference", torch.float64), dtype)
        again = case.run("fused")
        for name, value in ours.items():
            assert torch.equal(value, again[name]), f"{name} does not repeat bit for bit"

    def test_only_the_slots_need_a_gradient(self, shape, dtype):
        case = Case(*shape, dtype)
        without = case.run("fused", needs_dx=False)  # for few tokens, by other kernels than with dx
        assert torch.equal(case.run("fused")["y"], without["y"])
        assert_as_good_as_torch(without, case.run("reference"), case.run("reference", torch.float64), dtype)

    def test_inference_is_training_bit_for_bit(self, shape, dtype):
        case = Case(*shape, dtype)
        with torch.no_grad():
            y = ops.glu_ffn(case.x, *case.host[:3], case.slots, case.scale, backend="fused")
        assert torch.equal(y, case.run("fused")["y"])


@pytest.mark.parametrize("activation", ["silu", "gelu_pytorch_tanh", "gelu", "relu", "relu2", "quick_gelu"])
@pytest.mark.parametrize("tokens", [5, 300])
class TestActivations:
    pytestmark = on_gpu

    def test_activations(self, activation, tokens):
        case = Case(tokens, 256, 768, 24, torch.bfloat16, biases=True, activation=activation)
        exact = case.run("reference", torch.float64)
        assert_as_good_as_torch(case.run("fused"), case.run("reference"), exact, torch.bfloat16)


class TestPlumbing:
    pytestmark = on_gpu

    def test_importance(self):
        for tokens in (1, 50, 700):
            case = Case(tokens, 256, 776, 8, torch.bfloat16, biases=True)
            arguments = (case.x, *case.host[:2], "silu", *case.host[3:5])
            ours = ops.neuron_importance(*arguments, backend="fused")
            doubles = [a if a is None or isinstance(a, str) else a.double() for a in arguments]
            exact, peer = reference.neuron_importance(*doubles), reference.neuron_importance(*arguments)
            assert_as_good_as_torch({"importance": ours}, {"importance": peer}, {"importance": exact}, torch.bfloat16)
            assert torch.equal(ours, ops.neuron_importance(*arguments, backend="fused"))

    @pytest.mark.parametrize("tokens", [3, 200])
    def test_gradients_add_up_in_the_arena(self, tokens):
        case = Case(tokens, 256, 768, 24, torch.bfloat16)
        host, views = HostWeights(*case.host), SlotViews.of(case.slots)
        _, saved = cuda.glu_ffn_forward(case.x, host, views, 0.7, 0, save=True)
        arguments = (case.dy, case.x, saved, host, views, 0.7, 0, True)
        _, once = cuda.glu_ffn_backward(*arguments, None)
        arena = torch.full((3, 24, 256), 2.0, device="cuda")
        _, none = cuda.glu_ffn_backward(*arguments, arena)
        assert none is None and torch.equal(arena, once + 2.0)

    @pytest.mark.parametrize("tokens", [4, 300])
    def test_strided_and_misaligned_inputs(self, tokens):
        case = Case(tokens, 256, 768, 24, torch.bfloat16)
        plain = ops.glu_ffn(case.x, *case.host[:3], case.slots, 0.7, backend="fused")
        wide = torch.cat([case.x, case.x], dim=1)[:, :256]
        shifted = torch.empty(tokens * 256 + 1, dtype=torch.bfloat16, device="cuda")[1:].view(tokens, 256).copy_(case.x)
        turned = case.x.t().contiguous().t()
        for x in (wide, shifted, turned, case.x.view(1, tokens, 1, 256)):
            y = ops.glu_ffn(x, *case.host[:3], case.slots, 0.7, backend="fused")
            assert torch.equal(y.view(tokens, 256), plain)

    def test_no_tokens(self):
        case = Case(0, 256, 768, 24, torch.bfloat16)
        result = case.run("fused")
        assert result["y"].shape == (0, 256) and not result["slots.grad"].any()

    @pytest.mark.parametrize("tokens", [6, 300])
    def test_graph_capture_and_two_streams(self, tokens):
        case = Case(tokens, 512, 1536, 64, torch.bfloat16)
        run = lambda: ops.glu_ffn(case.x, *case.host[:3], case.slots, 0.7, backend="fused")
        with torch.no_grad():
            expected = run()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                captured = run()
            captured.fill_(float("nan"))
            graph.replay()
            streams = [torch.cuda.Stream() for _ in range(2)]
            results = []
            torch.cuda.synchronize()
            for _ in range(4):
                for stream in streams:
                    with torch.cuda.stream(stream):
                        results.append(run())
            torch.cuda.synchronize()
        assert torch.equal(captured, expected) and all(torch.equal(y, expected) for y in results)

    @pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
    def test_second_device(self):
        case = Case(70, 256, 768, 24, torch.bfloat16)
        there = [t.to("cuda:1") for t in (case.x, *case.host[:3], case.slots)]
        ours = ops.glu_ffn(*there, 0.7, backend="fused")
        assert ours.device == torch.device("cuda:1") and torch.cuda.current_device() == 0
        assert torch.equal(ours.to("cuda:0"), ops.glu_ffn(case.x, *case.host[:3], case.slots, 0.7, backend="fused"))

    def test_compiled(self):
        case = Case(40, 256, 768, 24, torch.bfloat16)
        function = lambda x, slots: ops.glu_ffn(x, *case.host[:3], slots, 0.7, backend="fused")
        compiled = torch.compile(function, fullgraph=True)
        results = []
        for f in (function, compiled):
            x, slots = case.x.clone().requires_grad_(), case.slots.clone().requires_grad_()
            y = f(x, slots)
            y.backward(case.dy)
            results.append((y.detach(), x.grad, slots.grad))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=False))

    def test_two_thousand_steps_follow_the_reference(self):
        """The same toy task learned by both: the losses stay together to the end."""
        torch.manual_seed(1)
        case = Case(32, 64, 192, 16, torch.bfloat16)
        goal = ops.glu_ffn(case.x, *case.host[:3], case.slots * 2, case.scale, backend="reference").float()
        losses = {}
        for backend in ("fused", "reference"):
            slots = case.slots.float().clone()
            slots[2] = 0
            states = torch.zeros_like(slots), torch.zeros_like(slots)
            for step in range(1, 2001):
                copy = slots.to(torch.bfloat16).requires_grad_()
                y = ops.glu_ffn(case.x, *case.host[:3], copy, case.scale, backend=backend)
                loss = (y.float() - goal).square().mean()
                loss.backward()
                ops.update_slots_(slots, copy.grad.float(), *states, step, 1e-3)
            losses[backend] = loss.item()
            assert torch.isfinite(slots).all() and slots.norm(dim=-1).max() <= 1 + 1e-5
        first = (ops.glu_ffn(case.x, *case.host[:3], case.slots * 0, case.scale).float() - goal).square().mean().item()
        assert losses["fused"] < first / 2 and losses["fused"] == pytest.approx(losses["reference"], rel=0.1)

    def test_a_memory_learns_through_it(self):
        from support.helpers import SETTINGS, TEXT, attached  # the small hosts of the other tests

        results = {}
        for backend in ("fused", "matmul"):
            torch.manual_seed(0)
            model, memory = attached("llama")
            memory.detach()
            model = model.to("cuda", torch.bfloat16)
            memory = locas.attach(model, locas.LocasConfig(rank=8, backend=backend))
            report = memory.memorize(TEXT, **SETTINGS)
            results[backend] = report.perplexity
            assert all(entry.backend == f"{backend}, whole" for entry in memory.status())
        assert results["fused"] == pytest.approx(results["matmul"], rel=0.02)


def test_the_memory_alone_is_refused():
    with pytest.raises(ValueError, match="sideway_glu: backend is 'fused', which computes host and memory in one"):
        ops.sideway_glu(torch.zeros(2, 8), torch.zeros(3, 4, 8), 1.0, backend="fused")


def test_a_float16_host_on_the_cpu_is_refused_at_attach():
    from support.helpers import attached

    model, memory = attached("llama")
    memory.detach()
    model.half()
    before = dict(model.named_parameters())
    with pytest.raises(ValueError, match="backend is 'fused', but on "):
        locas.attach(model, locas.LocasConfig(rank=4, backend="fused"))
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    locas.attach(model, locas.LocasConfig(rank=4)).detach()


def test_the_binding_checks_its_arguments():
    x, hidden = torch.zeros(2, 8, dtype=torch.bfloat16), torch.zeros(2, 24).bfloat16()
    gate, down, slots = torch.zeros(16, 8).bfloat16(), torch.zeros(8, 16).bfloat16(), torch.zeros(3, 4, 8).bfloat16()
    call = lambda x=x, gate=gate, hidden=hidden: _C.glu_ffn_forward(
        x, gate, gate, down, None, None, None, *SlotViews.of(slots), hidden, None, None, torch.zeros_like(x), None, 0, 1.0, 0
    )
    with pytest.raises(ValueError, match="glu_ffn_forward: x has dtype float32; expected bfloat16 or float16"):
        call(x=x.float())
    with pytest.raises(ValueError, match=r"glu_ffn_forward: gate has shape \[12, 8\]; expected \[m, d\], multiples of 8"):
        call(gate=gate[:12])
    with pytest.raises(ValueError, match=r"glu_ffn_forward: hidden has shape \[2, 16\]; expected \[2, 24\]"):
        call(hidden=torch.zeros(2, 16).bfloat16())
    with pytest.raises(ValueError, match=r"glu_ffn_forward: gate has strides \[1, 16\]; expected a contiguous last dimension"):
        call(gate=torch.zeros(8, 16).bfloat16().t())
