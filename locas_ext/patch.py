"""Binds the memory to a host: a new `forward` on each FFN instance, and back.

Neither classes nor the module tree change, so the host keeps its state dict, its save_pretrained and its config.
"""

import torch
from torch import Tensor

from . import fused, ops, reference
from .activations import activate, activation_index
from .arena import SlotArena
from .config import LocasConfig, paper_multiple
from .hosts import Host, HostFFN, inspect_host, projection_device, value_norm_mean
from .initialization import check_rank
from .kernels import sideway_forward
from .ops import GluFFNFunction, SidewayGluFunction
from .rehome import RehomedFFN, RehomedFunction, obstacle, rehomed_forward, storage_users
from .slots import MemoryState
from .stale_cache import StaleCacheGuard


class PatchedFFN:
    """One FFN with its memory; `forward` stands in for the module's own."""

    def __init__(self, attachment: "Attachment", ffn: HostFFN, arena: SlotArena, index: int):
        """index: the layer's place in its arena."""
        self.attachment, self.ffn, self.arena, self.index = attachment, ffn, arena, index
        self.state, self.backend = attachment.state, attachment.backend
        self.beside = "reference" if self.backend == "reference" else "auto"  # for the memory beside an FFN that is not plain
        self.activation = ffn.activation
        self.activation_index = activation_index(ffn.activation)
        self.home: RehomedFFN | None = None  # with attach(rehome=True)
        self.observer = None  # called with the FFN input [..., d] during initialization
        self.attached = False

    # ---- binding ---------------------------------------------------------------------------------------------
    def bind(self) -> None:
        module = self.ffn.module
        # accelerate keeps the real forward in _old_forward and calls it from its hook: bind beneath it.
        self.name = "_old_forward" if hasattr(module, "_hf_hook") else "forward"
        self.replaced = module.__dict__.get(self.name)
        self.original = getattr(module, self.name)
        self.bound = self.forward
        setattr(module, self.name, self.bound)
        self.attached = True

    def unbind(self) -> None:
        self.attached = False  # whoever wrapped our forward since and still holds it gets the original's result
        attributes = self.ffn.module.__dict__
        for name in ("forward", "_old_forward"):
            if attributes.get(name) != self.bound:  # equal, not identical: deepcopy makes a second method object
                continue
            if self.replaced is None:
                del attributes[name]
            else:
                attributes[name] = self.replaced

    # ---- the FFN ---------------------------------------------------------------------------------------------
    def forward(self, x: Tensor) -> Tensor:
        state, arena = self.state, self.arena
        if self.observer is not None:
            self.observer(x)
        if not self.attached or state.disabled:
            return self.original(x)
        if torch.compiler.is_compiling():
            return self._forward_compiled(x)
        index = self.index
        if not arena.is_current(index):
            state.sync()
        parameter = arena.parameters[index]
        gradients = torch.is_grad_enabled()
        learns = gradients and state.initialized and parameter.requires_grad
        # A memory that has learned nothing adds exactly 0: then the host computes alone, bit for bit.
        if not state.learned and not learns:
            return self.original(x)
        alone = not state.learned or self.ffn.obstacle() is not None
        device, dtype = x.device, x.dtype
        if self.backend == "reference" or dtype == torch.float64 or torch.is_autocast_enabled(device.type):
            return self._forward_plain(x, parameter, alone)
        views = arena.views[index]
        if views.value.dtype != dtype or views.value.device != device:
            self.attachment.follow(arena, device, dtype)
            views = arena.views[index]
        scale, activation = arena.scales[index], self.activation_index
        x2d = x.reshape(-1, x.shape[-1])
        rehomed = not alone and self.home is not None and self.home.ready()
        if not alone and not rehomed:
            host = self.ffn.weights()
            backend = ops.native_backend("patched FFN", x2d, host.gate, self.backend)
        if gradients and (learns or x.requires_grad):
            grad = arena.sink(index)
            if rehomed:
                y = RehomedFunction.apply(x2d, parameter, self.home, self.ffn.weights().down_bias, activation, grad)
            elif alone:
                y = SidewayGluFunction.apply(x2d, parameter, views, scale, activation, grad)
            else:
                y = GluFFNFunction.apply(x2d, parameter, views, host, scale, activation, grad, backend)
        elif rehomed:
            y = rehomed_forward(x2d, self.home, self.ffn.weights().down_bias, activation, save=False)[0]
        elif alone:
            y = sideway_forward(x2d, views, scale, activation)[0]
        else:
            y = backend.glu_ffn_forward(x2d, host, views, scale, activation, save=False)[0]
        y = y.view_as(x)
        return self.original(x) + y if alone else y

    def _forward_plain(self, x: Tensor, parameter: Tensor, alone: bool) -> Tensor:
        """The reference backend, and any backend under autocast: public ops with all their checks."""
        scale = self.arena.scales[self.index]
        backend = "reference" if x.dtype == torch.float64 else self.beside  # a host moved to float64 after attach
        if alone or torch.is_autocast_enabled(x.device.type):
            return self.original(x) + ops.sideway_glu(x, parameter, scale, self.activation, backend)
        gate, up, down, *biases = self.ffn.weights()
        return reference.glu_ffn(x, gate, up, down, parameter, scale, self.activation, *biases)

    def _forward_compiled(self, x: Tensor) -> Tensor:
        state, arena = self.state, self.arena
        parameter, scale = arena.parameters[self.index], arena.scales[self.index]
        if not (state.learned or (torch.is_grad_enabled() and state.initialized)):
            return self.original(x)
        if not state.learned or self.path()[0] == "sideway":
            return self.original(x) + ops.sideway_glu(x, parameter, scale, self.activation, self.beside)
        gate, up, down, *biases = self.ffn.weights()
        return ops.glu_ffn(x, gate, up, down, parameter, scale, self.activation, *biases, backend=self.backend)

    @torch.no_grad()
    def importance(self, x: Tensor) -> Tensor:
        """How strongly each host neuron fires on x [T, d]: [m] float32 (`ops.neuron_importance`)."""
        if self.ffn.obstacle() is not None:
            gate, up = self.ffn.pre_activations(x)
            return (activate(gate, self.activation) * up).abs().float().mean(0)
        gate, up, _, gate_bias, up_bias, _ = self.ffn.weights()
        return ops.neuron_importance(x, gate, up, self.activation, gate_bias, up_bias, backend=self.backend)

    def backend_name(self) -> str:
        """The backend, "auto" resolved for where the memory lies."""
        if self.backend != "auto":
            return self.backend
        if self.path()[0] == "sideway":
            return "matmul"
        compute = self.arena.compute
        host = self.attachment.host
        return ops.fused_backend(compute).choice(compute, host.hidden_size, host.intermediate_size)

    def runs_on_cuda_kernels(self, tokens: int) -> bool:
        """Whether so many tokens go through the fused CUDA kernels (fused.py)."""
        compute, host = self.arena.compute, self.attachment.host
        if not compute.is_cuda or self.home is not None or self.ffn.obstacle() is not None:
            return False
        return self.backend == "fused" or (
            self.backend == "auto" and fused.is_faster(compute, tokens, host.hidden_size, host.intermediate_size)
        )

    def path(self) -> tuple[str, str]:
        """("whole", why) where host and memory run as one op, ("sideway", why) where the memory is added beside the host."""
        obstacle = self.ffn.obstacle()
        if obstacle:
            return "sideway", obstacle
        if self.home is not None:
            return "whole", self.home.status()
        return "whole", "plain projections"


def _devices(host: Host) -> list[torch.device]:
    """Where each layer's FFN is computed. ValueError where weights are missing or one FFN's lie on several devices."""
    result = []
    for layer, ffn in enumerate(host.ffns):
        devices = {device for projection in ffn.projections() if (device := projection_device(projection))}
        if len(devices) > 1:
            names = " and ".join(sorted(str(device) for device in devices))
            raise ValueError(f"the FFN of layer {layer} lies on {names}; expected a whole layer on one device")
        result.append(devices.pop() if devices else host.input_device())
    return result


class Attachment:
    """A host, its memory's state and the patched FFNs: what the verbs (memorize, save, load, merge) work on."""

    def __init__(self, model, config: LocasConfig, rehome: bool = False):
        """Checks everything, then binds: a failure leaves the model as it was."""
        host = inspect_host(model)
        model = host.model
        if getattr(model, "_locas_memory", None) is not None:
            raise ValueError(
                "model already has a memory attached: use the one that locas.memory_of(model) returns, "
                "or call its detach() first"
            )
        layers = config.resolve_layers(len(host.ffns))
        check_rank(config, host.intermediate_size)
        self.host, self.config = host, config
        devices = _devices(host)
        ffns = [host.ffns[layer] for layer in layers]
        like = host.hidden_state_like()
        dtype = like.dtype
        backend = config.backend
        if dtype == torch.float64:
            if backend == "matmul":
                raise ValueError("backend 'matmul' takes float32, bfloat16 and float16 hosts; this one is float64")
            backend = "reference"
        if backend == "fused":
            like_ffn = like.to(devices[layers[0]])
            problem = ops.fused_backend(like_ffn).obstacle(like_ffn, host.hidden_size, host.intermediate_size)
            if problem is not None:
                raise ValueError(f"backend is 'fused', but {problem}")
        self.backend = "matmul" if rehome and backend == "auto" else backend
        if rehome and self.backend != "matmul":
            raise ValueError(
                f"rehome is True, but the backend is {self.backend!r} ({dtype} host); expected backend 'matmul' or "
                "'auto' and a float32, bfloat16 or float16 host"
            )
        scales = [self._scale(ffn, like) for ffn in ffns]
        self.state = MemoryState(
            layers, config.rank, host.hidden_size, scales, [devices[layer] for layer in layers], dtype
        )
        places = self.state.in_layer_order(lambda arena: [(arena, index) for index in range(len(arena.positions))])
        self.ffns = [PatchedFFN(self, ffn, *place) for ffn, place in zip(ffns, places)]
        self.stream = None  # online.Stream: where memorize() stands in its text

        self.cache_guard = StaleCacheGuard(model, self.state)
        self.required_grad = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        model.requires_grad_(False)
        for ffn in self.ffns:
            ffn.bind()
        self.cache_guard.bind()
        if rehome:
            try:
                self._rehome()
            except BaseException:
                self.detach()
                raise

    def _rehome(self) -> None:
        """Moves the host's FFN weights into the memory's buffers, layer by layer; ValueError where they cannot move."""
        users = storage_users(self.host.model)
        homes = [RehomedFFN(ffn.ffn, self.state, ffn.arena, ffn.index, self.host.model) for ffn in self.ffns]
        for home, layer in zip(homes, self.state.layers):
            if (problem := obstacle(home.ffn, users)) is not None:
                raise ValueError(f"rehome: layer {layer}: {problem}")
        for ffn, home in zip(self.ffns, homes):
            ffn.home = home  # before it moves in, so that detach() finds it
            home.move_in(users)

    def _scale(self, ffn: HostFFN, like: Tensor) -> float:
        if not isinstance(self.config.scale, str):
            return float(self.config.scale)
        mean = value_norm_mean(ffn.dense_down(like))
        multiple = paper_multiple(self.config.scale)
        return mean if multiple is None else multiple * mean / self.config.rank

    def follow(self, arena: SlotArena, device: torch.device, dtype: torch.dtype) -> None:
        """Takes an arena to where its layers were moved. ValueError if they no longer are together."""
        devices = {projection_device(projection) for ffn in self.ffns if ffn.arena is arena
                   for projection in ffn.ffn.projections()}
        if len(devices) > 1:
            names = " and ".join(sorted(str(device) for device in devices))
            raise ValueError(
                f"the host was spread over {names} after the memory was attached; "
                "save the memory, detach it, and load it into the spread host"
            )
        arena.place(device, dtype)

    def keeps_factors(self, tokens: int) -> bool:
        """Whether the backward over so many tokens can leave the slots' gradient to the update (fused.SlotFactors)."""
        state = self.state
        return (
            state.learned
            and tokens <= fused.MOST_FACTOR_TOKENS
            and state.hidden_size <= fused.MOST_FACTOR_WIDTH
            and all(len(arena.positions) <= fused.MOST_FACTOR_LAYERS for arena in state.arenas)
            and not torch.is_autocast_enabled("cuda")
            and all(ffn.runs_on_cuda_kernels(tokens) for ffn in self.ffns)
        )

    @property
    def attached(self) -> bool:
        return self.ffns[0].attached

    def detach(self) -> None:
        self.cache_guard.unbind()
        for ffn in self.ffns:
            ffn.unbind()
            if ffn.home is not None:
                ffn.home.move_out()
        for name, parameter in self.host.model.named_parameters():
            parameter.requires_grad_(self.required_grad.get(name, parameter.requires_grad))
