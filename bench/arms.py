"""The FFNs that bench.ffn compares, each on the same host weights.

Host weights are frozen and x requires a gradient, as while memorizing: a peer's backward computes dx, those with a memory or an
adapter compute its gradient too.
"""

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP

from locas_ext import reference
from locas_ext.hosts.gated_ffn import GatedFFN
from locas_ext.ops.autograd import GluFfnFunction
from locas_ext.ops.backends import fused_backend, matmul
from locas_ext.ops.backends.cuda_families import FAMILIES, use_family
from locas_ext.patching.rehome import RehomedFFN, RehomedFunction, rehomed_forward, storage_users
from locas_ext.state.memory_state import MemoryState
from locas_ext.state.planes import PLANES

SCALE = 0.1


class Operands:
    """One host FFN, a memory on it, and activations: a set that calls rotate through."""

    def __init__(self, d: int, m: int, tokens: int, rank: int, dtype: torch.dtype, device: torch.device):
        self.config = Qwen3Config(hidden_size=d, intermediate_size=m)
        with device:
            self.mlp = Qwen3MLP(self.config).to(dtype).requires_grad_(False)
            for linear in (self.mlp.gate_proj, self.mlp.up_proj, self.mlp.down_proj):
                nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
            slots = F.normalize(torch.randn(1, 3, rank, d), dim=-1)
            self.x = torch.empty(tokens, d, dtype=dtype).requires_grad_()
            self.dy = torch.empty(tokens, d, dtype=dtype)
        self.state = MemoryState((0,), PLANES["glu"], rank, d, [SCALE], [device], dtype)
        self.state.set_slots(slots, version=1)
        self.arena = self.state.arenas[0]
        self.host = GatedFFN(self.mlp, "silu").weights()
        self.built: dict[Callable, tuple[Callable[[Tensor], Tensor], list[Tensor]]] = {}  # one for all modes
        self.renew()

    @torch.no_grad()
    def renew(self) -> None:
        """Fresh N(0, 1) activations and output gradients, in place."""
        self.x.normal_()
        self.dy.normal_()

    def bytes(self) -> int:
        """What one call reads and writes at least, without what is saved for the backward."""
        return sum(t.nbytes for t in (*self.host[:3], self.arena.compute, self.x, self.dy))

    @torch.no_grad()
    def exact(self, with_memory: bool, gradient: bool) -> list[Tensor]:
        """y, and with `gradient` dx and the slots' gradient, in float64."""
        x = self.x.detach().double().requires_grad_(gradient)
        slots = self.arena.compute[0].double().requires_grad_(gradient)
        weights = [weight.double() for weight in self.host[:3]]
        with torch.enable_grad():
            y = reference.glu_ffn(x, *weights, slots, SCALE if with_memory else 0.0)
        return [y.detach(), *(torch.autograd.grad(y, (x, slots), self.dy.double()) if gradient else ())]


@dataclass(frozen=True)
class Arm:
    """build(operands) -> (ffn, trained): ffn(x) -> y, and the tensors that get a gradient besides x.

    memory: whether the slots take part. in_place: whether their gradient is added to the arena's instead.
    """

    build: Callable[[Operands], tuple[Callable[[Tensor], Tensor], list[Tensor]]]
    memory: bool = True
    in_place: bool = False

    def make(self, operands: Operands, mode: str) -> Callable[[], list[Tensor]]:
        """-> a call that does the work of `mode` and returns y, and dx where there is a backward."""
        if self.build not in operands.built:
            operands.built[self.build] = self.build(operands)
        ffn, trained = operands.built[self.build]
        x, dy = operands.x, operands.dy

        def inference():
            with torch.no_grad():
                return [ffn(x)]

        def training():
            return [ffn(x).detach()]

        def forward_backward():
            y = ffn(x)
            return [y.detach(), torch.autograd.grad(y, [x, *trained], dy)[0]]

        return dict(zip(MODES, (inference, training, forward_backward), strict=False))[mode]


MODES = ("forward", "training forward", "forward + backward")


class BareGemms:
    """The host's three products and nothing else: what no FFN through cuBLAS can beat. Its outputs are no FFN's."""

    memory, in_place = False, False

    def make(self, operands: Operands, mode: str) -> Callable[[], list[Tensor]]:
        gate, up, down = (weight.detach() for weight in operands.host[:3])
        x, dy = operands.x.detach(), operands.dy
        hidden, y, dx = x.new_empty(len(x), len(gate)), torch.empty_like(x), torch.empty_like(x)

        def products():
            torch.mm(x, gate.T, out=hidden)
            torch.mm(x, up.T, out=hidden)
            torch.mm(hidden, down.T, out=y)
            if mode == "forward + backward":
                torch.mm(dy, down, out=hidden)
                torch.mm(hidden, gate, out=dx)
                torch.mm(hidden, up, out=dx)
            return []

        return products


# ---- peers ------------------------------------------------------------------------------------------------------
def eager(operands):
    return operands.mlp, []


def eager_sideway(operands):
    slots = nn.Parameter(operands.arena.compute[0].detach().clone())
    return lambda x: operands.mlp(x) + reference.sideway_glu(x, slots, SCALE), [slots]


def _ffn(x, gate, up, down):
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


def _ffn_and_sideway(x, gate, up, down, slots):
    return _ffn(x, gate, up, down) + SCALE * ((F.silu(x @ slots[0].T) * (x @ slots[1].T)) @ slots[2])


@functools.cache
def _compiled(function, mode: str):
    # The benchmark captures its own graphs.
    return torch.compile(function, dynamic=False, mode={"max-autotune": "max-autotune-no-cudagraphs"}.get(mode, mode))


def compiled(mode):
    def build(operands):
        return lambda x: _compiled(_ffn, mode)(x, *operands.host[:3]), []

    return build


def compiled_sideway(mode):
    def build(operands):
        slots = nn.Parameter(operands.arena.compute[0].detach().clone())
        return lambda x: _compiled(_ffn_and_sideway, mode)(x, *operands.host[:3], slots), [slots]

    return build


def _same_weights(operands, module: nn.Module) -> nn.Module:
    for name in ("gate_proj", "up_proj", "down_proj"):
        getattr(module, name).weight = getattr(operands.mlp, name).weight
    return module


def liger(operands):
    from liger_kernel.transformers import LigerSwiGLUMLP

    with torch.device("meta"):
        module = LigerSwiGLUMLP(operands.config)
    return _same_weights(operands, module), []


def lora(operands):
    from peft import LoraConfig, inject_adapter_in_model

    with torch.device("meta"):
        module = Qwen3MLP(operands.config)
    module = _same_weights(operands, module)
    config = LoraConfig(r=64, lora_alpha=64, target_modules=["gate_proj", "up_proj", "down_proj"])
    module = inject_adapter_in_model(config, nn.ModuleDict({"mlp": module}))["mlp"].eval()
    trained = [parameter for name, parameter in module.named_parameters() if "lora_" in name]
    for parameter in trained:
        nn.init.normal_(parameter, std=0.02)  # B starts at 0, where products run faster
    return module, trained


# ---- ours -------------------------------------------------------------------------------------------------------
def _ours(backend, family=None):
    """family: of the CUDA kernels; a backward right behind its forward runs the same one."""

    def build(operands):
        views, slots, grad = operands.arena.views[0], operands.arena.parameters[0], operands.arena.grads[0]

        def ffn(x):
            if family is not None:
                use_family(family)
            if torch.is_grad_enabled():
                return GluFfnFunction.apply(x, slots, views, operands.host, SCALE, 0, grad, backend)
            return backend.glu_ffn_forward(x, operands.host, views, SCALE, 0, save=False)[0]

        return ffn, []

    return build


def rehomed(operands):
    mlp = copy.deepcopy(operands.mlp)  # the others keep the weights as they are
    rehomed = RehomedFFN(GatedFFN(mlp, "silu"), operands.state, operands.arena, 0, mlp)
    rehomed.adopt(storage_users(mlp))
    rehomed.refresh()
    slots, grad = operands.arena.parameters[0], operands.arena.grads[0]

    def ffn(x):
        if torch.is_grad_enabled():
            return RehomedFunction.apply(x, slots, rehomed, None, 0, grad)
        return rehomed_forward(x, rehomed, None, 0, save=False)[0]

    return ffn, []


def _importable(name: str) -> bool:
    try:
        __import__(name)
    except ImportError:
        return False
    return True


def _families() -> list[str]:
    """The families of CUDA kernels that run on this machine's GPUs, the default one last."""
    found = []
    for name in FAMILIES:
        try:
            use_family(name)
            found.append(name)
        except ValueError:  # not on this GPU, or not in this build
            pass
    use_family(None)
    return found


def arms(operands: Operands, compile_mode: str | None = None) -> dict[str, Arm | BareGemms]:
    """The arms that can run on tensors like these, the reference arm first and once more last.

    compile_mode: of torch.compile; None: without its arms.
    """
    cuda = operands.x.is_cuda
    d, m = operands.mlp.hidden_size, operands.mlp.intermediate_size
    result = {"eager": Arm(eager, memory=False), "eager + sideway": Arm(eager_sideway)}
    if compile_mode is not None:
        result["compiled"] = Arm(compiled(compile_mode), memory=False)
        result["compiled + sideway"] = Arm(compiled_sideway(compile_mode))
    if cuda and _importable("liger_kernel.transformers"):
        result["Liger"] = Arm(liger, memory=False)
    if cuda and _importable("peft"):
        result["LoRA"] = Arm(lora, memory=False)
    if cuda:
        result["bare products"] = BareGemms()
    result["ours, matmul"] = Arm(_ours(matmul), in_place=True)
    result["ours, rehomed"] = Arm(rehomed, in_place=True)
    fused = fused_backend(operands.x)
    if fused.obstacle(operands.x, d, m) is None and cuda:
        result |= {f"ours, sm{name}": Arm(_ours(fused, name), in_place=True) for name in _families()}
    elif fused.obstacle(operands.x, d, m) is None:
        result["ours, fused"] = Arm(_ours(fused), in_place=True)
    result["eager again"] = Arm(eager, memory=False)
    return result
