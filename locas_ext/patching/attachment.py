"""Binds the memory to a host: a new `forward` on each FFN instance, and back.

Neither classes nor the module tree change, so the host keeps its state dict, its save_pretrained and its config.
"""

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from locas_ext.caller import caller_stacklevel
from locas_ext.checks import LEAST_FLOAT32
from locas_ext.config import MOST_SCALE, LocasConfig, check_rank, paper_multiple
from locas_ext.hosts.ffn import HostFFN
from locas_ext.hosts.probe.probe import probe
from locas_ext.hosts.projections import projection_device
from locas_ext.hosts.registry import Host, inspect_host
from locas_ext.hosts.sharding import fsdp_obstacle, gathered
from locas_ext.hosts.wrappers import unwrapped
from locas_ext.ops.backends import fused_backend, slot_updates
from locas_ext.ops.ranks import Ranks
from locas_ext.state.arena import SlotArena
from locas_ext.state.memory_state import MemoryState
from locas_ext.state.planes import PLANES
from locas_ext.state.stream import Stream, TextRecord

from .base import Binding
from .cache_guard import StaleCacheGuard
from .compiled import number_of
from .decoder_watch import DecoderWatch
from .freeze import HostFreeze
from .glu import PatchedGluFFN
from .mlp import PatchedMlpFFN
from .rehome import RehomedFFN, obstacle, storage_users


def _layers(host: Host, config: LocasConfig) -> tuple[int, ...]:
    """The layers that get a memory, ascending. ValueError for one that has no FFN."""
    layers = tuple(host.ffns) if config.layers is None else config.resolve_layers(host.depth)
    for layer in layers:
        if layer not in host.ffns:
            raise ValueError(
                f"layers names layer {layer}, which has no FFN of its own in {type(host.model).__name__}; "
                f"those that have one are {', '.join(map(str, host.ffns))}"
            )
    return layers


def _check_split(host: Host, config: LocasConfig, rehome: bool) -> None:
    """ValueError for what a host that is split among processes cannot have."""
    if host.ranks is None:
        return
    size, name = host.ranks.size, type(host.model).__name__
    if config.variant == "mlp":
        raise ValueError(
            f"variant is 'mlp', but {name} is split among {size} processes (tp_plan), which only a gated memory can be too; "
            "use variant='glu', or load the model without tp_plan"
        )
    if config.rank % size:
        raise ValueError(
            f"rank is {config.rank}, but {name} is split among {size} processes (tp_plan), of which each takes an equal part "
            f"of the slots; expected a multiple of {size}"
        )
    if rehome:
        raise ValueError(
            f"rehome is True, but the weights of {name} are split among {size} processes (tp_plan) and cannot move; use "
            "rehome=False, or load the model without tp_plan"
        )


def _check_variant(host: Host, layers: tuple[int, ...], config: LocasConfig) -> None:
    """ValueError for a variant that an FFN has no place for; a warning for one that the paper found weak."""
    model_type = host.config.model_type
    plain = [layer for layer in layers if not host.ffns[layer].is_gated]
    if config.variant == "glu" and plain:
        where = "" if len(plain) == len(layers) else f" of layer {plain[0]}"
        raise ValueError(
            f"variant is 'glu', but the FFN{where} of {model_type} has two layers and no gate projection for a gated memory to "
            "stand beside; use LocasConfig(variant='mlp')"
        )
    if config.variant == "mlp" and not plain:
        warnings.warn(
            f"variant is 'mlp', but the FFN of {model_type} is gated: the paper found Locas-MLP weak beside such FFNs, "
            "and it cannot be merged into them; variant='glu' is the one for this host",
            stacklevel=caller_stacklevel(),
        )


def _resolve_backend(host: Host, layers: tuple[int, ...], config: LocasConfig, like: Tensor, rehome: bool) -> str:
    """The backend that the FFNs run; ValueError for one that cannot, like: a tensor as the first FFN's weights."""
    backend = config.backend
    if like.dtype == torch.float64:
        if backend == "matmul":
            raise ValueError("backend 'matmul' takes float32, bfloat16 and float16 hosts; this one is float64")
        backend = "reference"
    if backend == "fused":
        if config.variant == "mlp":
            raise ValueError(
                "backend is 'fused', which computes a gated FFN and its memory in one; variant 'mlp' runs beside the "
                "host's FFN: expected backend 'auto', 'matmul' or 'reference'"
            )
        for layer in layers:
            width = host.ffns[layer].width_here or host.intermediate_size
            if (problem := fused_backend(like).obstacle(like, host.hidden_size, width)) is not None:
                raise ValueError(f"backend is 'fused', but {problem}")
    if not rehome:
        return backend
    if config.variant == "mlp":
        raise ValueError("rehome is True, but the variant is 'mlp'; only the weights of gated FFNs move")
    if (problem := fsdp_obstacle(host.model)) is not None:
        raise ValueError(f"rehome is True, but {problem}, so they stay where it keeps them; expected rehome=False")
    if backend not in ("auto", "matmul"):
        raise ValueError(
            f"rehome is True, but the backend is {backend!r} ({like.dtype} host); expected backend 'matmul' or "
            "'auto' and a float32, bfloat16 or float16 host"
        )
    return "matmul"


def _devices(host: Host) -> dict[int, torch.device]:
    """Where each layer's FFN is computed. ValueError where weights are missing or one FFN's lie on several devices."""
    result = {}
    for layer, ffn in host.ffns.items():
        devices = {device for projection in ffn.projections() if (device := projection_device(projection))}
        if len(devices) > 1:
            names = " and ".join(sorted(str(device) for device in devices))
            raise ValueError(f"the FFN of layer {layer} lies on {names}; expected a whole layer on one device")
        result[layer] = devices.pop() if devices else host.input_device()
    return result


def _patched(
    config: LocasConfig, binding: Binding, ffn: HostFFN, arena: SlotArena, index: int
) -> PatchedGluFFN | PatchedMlpFFN:
    if config.variant == "mlp":
        return PatchedMlpFFN(binding, ffn, arena, index)
    assert ffn.is_gated, "_check_variant refuses the others"
    return PatchedGluFFN(binding, ffn, arena, index)


class Attachment:
    """A host, its memory's state and the patched FFNs: what the verbs (memorize, save, load, merge) work on."""

    def __init__(self, model, config: LocasConfig, rehome: bool = False):
        """Checks everything and changes nothing; `bind` does."""
        if getattr(unwrapped(model), "_locas_memory", None) is not None:
            raise ValueError(
                "model already has a memory attached: use the one that locas.memory_of(model) returns, "
                "or call its detach() first"
            )
        host = inspect_host(model)
        layers = _layers(host, config)
        _check_split(host, config, rehome)
        _check_variant(host, layers, config)
        for layer in layers:
            check_rank(config, host.ffns[layer].width or host.intermediate_size)
        self.host, self.config = host, config
        devices = _devices(host)
        ffns = [host.ffns[layer] for layer in layers]
        like = host.hidden_state_like()
        self.backend = _resolve_backend(host, layers, config, like.to(devices[layers[0]]), rehome)
        self.probe = probe(host)
        scales = [self._scale(ffn, like) for ffn in ffns]
        self.state = MemoryState(
            layers,
            PLANES[config.variant],
            config.rank,
            host.hidden_size,
            scales,
            [devices[layer] for layer in layers],
            like.dtype,
            host.ranks,
        )
        if not isinstance(config.clip, bool):
            self.state.clip_at([self._longest(ffn, like, scale) for ffn, scale in zip(ffns, scales, strict=True)])
        places = self.state.in_layer_order(lambda arena: [(arena, index) for index in range(len(arena.positions))])
        binding = Binding(self.state, self.backend, host, number_of(self.state))
        self.ffns = [_patched(config, binding, ffn, *place) for ffn, place in zip(ffns, places, strict=True)]
        for ffn, layer in zip(self.ffns, layers, strict=True):
            if ffn.is_taken():
                raise ValueError(
                    f"the FFN of layer {layer} is another model's too, and the memory attached to that one stands in it; "
                    "detach that memory first"
                )
        self.stream: Stream | None = None  # where memorize() stands in its text
        self.texts: list[TextRecord] = []  # those learned from, oldest first
        self.ranks: Ranks | None = None  # the processes of the latest run, which learned it in step
        self.rehomes = rehome

    def bind(self, check_interrupt: Callable[[], None]) -> None:
        """Freezes the host and puts the memory's forwards in place. A failure leaves the model as it was.

        check_interrupt: called between layers that take long; what it raises is a failure
        """
        model = self.host.model
        self.cache_guard = StaleCacheGuard(model, self.state)
        self.watch = DecoderWatch(self.host, self.state, self.ffns)
        self.freeze = HostFreeze(model)
        try:
            self.freeze.hold()
            for ffn in self.ffns:
                ffn.bind()
            self.watch.bind()
            self.cache_guard.bind()
            if self.rehomes:
                self._rehome(check_interrupt)
        except BaseException:
            self.detach()
            raise

    def hook_ids(self) -> set[int]:
        """The ids of the hooks that the memory itself has put on the host."""
        return {handle.id for handle in self.watch.handles}

    def exclusive(self, verb: str) -> AbstractContextManager[None]:
        """The right to change the memory, for the time of a verb; see `MemoryState.exclusive`."""
        return self.state.exclusive(verb)

    def _rehome(self, check_interrupt: Callable[[], None]) -> None:
        """Moves the host's FFN weights into the memory's buffers, layer by layer; ValueError where they cannot move."""
        users = storage_users(self.host.model)
        ffns = [ffn for ffn in self.ffns if isinstance(ffn, PatchedGluFFN)]  # all: _resolve_backend refuses the others
        for ffn, layer in zip(ffns, self.state.layers, strict=True):
            if (problem := ffn.obstacle() or obstacle(ffn.gated(), users)) is not None:
                raise ValueError(f"rehome: layer {layer}: {problem}")
        rehomed_ffns = [RehomedFFN(ffn.gated(), self.state, ffn.arena, ffn.index, self.host.model) for ffn in ffns]
        for ffn, rehomed in zip(ffns, rehomed_ffns, strict=True):
            check_interrupt()
            ffn.rehomed = rehomed  # before its weights move, so that detach() finds it
            rehomed.adopt(users)

    def _scale(self, ffn: HostFFN, like: Tensor) -> float:
        if not isinstance(self.config.scale, str):
            return float(self.config.scale)
        with gathered(self.host.model, ffn.module):
            mean = ffn.mean_value_norm(like)
        multiple = paper_multiple(self.config.scale)
        scale = mean if multiple is None else multiple * mean / self.config.rank
        if not LEAST_FLOAT32 <= scale <= MOST_SCALE:
            raise ValueError(
                f"scale is {self.config.scale!r}, which is {scale:g} where the value rows of the host's FFN have a mean length "
                f"of {mean:g}; expected a scale up to {MOST_SCALE:g} other than 0: use a number, such as scale=0.5"
            )
        return scale

    def _longest(self, ffn: HostFFN, like: Tensor, scale: float) -> list[float]:
        """How long the rows of each plane may grow."""
        with gathered(self.host.model, ffn.module):
            lengths = [*ffn.mean_row_norms(like), ffn.mean_value_norm(like) / abs(scale)][-self.state.planes :]
        return [self.config.clip * length for length in lengths]

    def keeps_factors(self, tokens: int) -> bool:
        """Whether the backward over so many tokens can leave the slots' gradient to the update (ops/types.py, SlotFactors)."""
        state = self.state
        return (
            state.learned
            and not (self.config.clip and any(arena.clips_by_row for arena in state.arenas))  # which needs the gradient
            and tokens <= slot_updates.MOST_FACTOR_TOKENS
            and state.hidden_size <= slot_updates.MOST_FACTOR_WIDTH
            and all(len(arena.positions) <= slot_updates.MOST_FACTOR_LAYERS for arena in state.arenas)
            and not torch.is_autocast_enabled("cuda")
            and all(ffn.runs_on_cuda_kernels(tokens) for ffn in self.ffns)
        )

    @property
    def attached(self) -> bool:
        return self.ffns[0].attached

    def detach(self) -> None:
        """Takes everything away again. RuntimeError while another thread changes the memory."""
        with self.exclusive("detach"):
            self.cache_guard.unbind()
            self.watch.unbind()
            for ffn in self.ffns:
                ffn.unbind()
                if ffn.rehomed is not None:
                    ffn.rehomed.release()
            self.freeze.release()
