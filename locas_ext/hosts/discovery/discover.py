"""Finds the FFN of each decoder layer in one recorded forward.

1. An FFN of plain projections that every token goes through, a shared expert too; of several in a layer the last to end.
2. Else a token-wise block with experts, or one whose formula is not known: the memory stands beside it.
3. Else the layer has no FFN.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from locas_ext.hosts.experts import ExpertBlock
from locas_ext.hosts.ffn import HostFFN, Place
from locas_ext.hosts.formula import Seen, class_name
from locas_ext.hosts.gated_ffn import FusedGatedFFN, GatedFFN
from locas_ext.hosts.probe.formula import hidden, products
from locas_ext.hosts.probe.recording import Recording, recorded_run
from locas_ext.hosts.probe.undisturbed import undisturbed
from locas_ext.hosts.sharding import gathered
from locas_ext.hosts.tried import tried
from locas_ext.hosts.two_layer_ffn import Conv1DFFN, TwoLayerFFN
from locas_ext.ops.activations import has_parameters

from .activations import function_of, nearest_with_kernels
from .blocks import check_gradient, token_wise_blocks
from .dense import Dense, Formula, dense_ffn
from .forward import (
    TOKENS,
    decoder_layers,
    hidden_size,
    input_of,
    is_linear,
    nearness,
    output_of,
    recorded,
    sizes,
    tolerance,
)

# How large the products become on which a formula is tried once more: clamps of models are at 7 to 10.
_REACH = 24.0


@dataclass(frozen=True)
class Discovered:
    """A host's FFNs.

    layers: the name of the list of decoder layers inside the model; depth: how many it holds
    names: by layer, the name of its FFN's module inside the layer; "" is the layer itself
    ffns: by layer; a layer without FFN, or with that of an earlier layer, is missing
    """

    layers: str
    depth: int
    hidden_size: int
    names: dict[int, str]
    ffns: dict[int, HostFFN]


def _holder(layer: nn.Module, names: tuple[str, ...], recording: Recording) -> str:
    """The name of the smallest module inside a layer that ran and holds all of these."""
    parts = [name.split(".")[:-1] for name in names]
    common = []
    for step in zip(*parts, strict=False):
        if len(set(step)) > 1:
            break
        common.append(step[0])
    while common and not recording.of(layer.get_submodule(".".join(common))):
        common.pop()
    return ".".join(common)


def _inside(name: str, holder: str) -> str:
    return name[len(holder) + 1 :] if holder else name


def _dense(layer: nn.Module, found: Dense, recording: Recording) -> tuple[str, HostFFN]:
    """The FFN that discovery found by its numbers."""
    formula = found.formula
    holder = _holder(layer, formula.names, recording)
    module: Any = layer.get_submodule(holder) if holder else layer
    names = tuple(_inside(name, holder) for name in formula.names)
    act = _inside(found.activated.module, holder) if found.activated.module else ""
    act_module = module.get_submodule(act) if act else None
    first, last = module.get_submodule(names[0]), module.get_submodule(names[-1])
    activation = found.activated.name or nearest_with_kernels(act_module, recording.of(first)[0].result)
    ffn: HostFFN
    if formula.kind == "two-layer":
        kind: Any = Conv1DFFN if isinstance(first, Conv1D) else TwoLayerFFN
        ffn = kind(module, activation, names)
    else:
        ffn = (formula.layout or GatedFFN)(module, activation, names)
        call = recording.of(module)[0]
        whole = _same(input_of(call), recording.of(first)[0].input) and _same(output_of(call), recording.of(last)[0].result)
        ffn.place = Place.MODULE if whole else Place.PROJECTIONS
    ffn.activation_name, ffn.modeling = act, type(layer).__module__
    ffn.seen = Seen.now(module, act_module)
    if isinstance(ffn, GatedFFN) and ffn.place is Place.MODULE and not _holds_far(ffn, recording):
        ffn.differs = "FFN computes something else on large numbers: it may clamp them"
    if ffn.is_gated and has_parameters(activation):
        ffn.differs = f"FFN has an activation, {activation}, that the fused kernels do not take"
    if found.activated.name is None:
        ffn.differs = f"FFN has an activation, {class_name(act_module)}, that has no kernel"
    return holder, ffn


def _holds_far(ffn: GatedFFN, recording: Recording) -> bool:
    """Whether the module computes the formula too where its neurons' products are larger than a short text makes them."""
    x = recording.of(ffn.module)[0].input
    reached = torch.stack([product.abs().max() for product in products(ffn, recording, x)]).min().float()
    far = x * (_REACH / reached.clamp_min(torch.finfo(torch.float32).tiny))
    last, made = ffn.projections()[-1], None
    with tried():
        made = recorded_run([ffn.module, *ffn.projections()], lambda: ffn.module(far))
    if made is None:  # a module that takes more than its input
        return True
    (call,), (out,) = made.of(ffn.module), made.of(last)
    expected = hidden(ffn, made, far)
    fits = _same(out.input, expected) and _same(call.result, out.result)
    return fits or not expected.isfinite().all()  # float16 does not reach everywhere


def _same(one: Any, other: Any) -> bool:
    if one is None or other is None or one.numel() != other.numel():
        return False
    one = one.reshape(other.shape)
    return torch.equal(one, other) or nearness(one.float(), other.float()) <= tolerance(other.dtype)


def _activation_in(block: nn.Module, like: torch.Tensor) -> str:
    """The function with kernels that a block's activation module computes; silu where it shows none."""
    for module in block.modules():
        if module is not block and not is_linear(module) and not list(module.parameters()):
            with tried():  # a router, a dropout, whatever is no activation
                if (name := function_of(module, like)) is not None:
                    return name
    return "silu"


def _by_shape(block: nn.Module, d: int, like: torch.Tensor) -> HostFFN | None:
    """The projections of a block whose formula is not known: by their shapes, a gate by its name."""
    inside = set[nn.Module]()
    linears = []
    for name, module in block.named_modules():
        if module not in inside and is_linear(module):
            inside.update(module.modules())
            linears.append((name, sizes(module)))
    for last, (m, out) in reversed(linears):
        if out != d or 2 * m < d:
            continue
        firsts = [name for name, size in linears if size == (d, m) and name != last]
        fused = [name for name, size in linears if size == (d, 2 * m)]
        activation = _activation_in(block, like)
        if len(firsts) >= 2:
            gate = next((name for name in firsts if "gate" in name or "w1" in name), firsts[0])
            up = next(name for name in firsts if name != gate)
            return GatedFFN(block, activation, (gate, up, last))
        if fused:
            return FusedGatedFFN(block, activation, (fused[0], last))
        if firsts:
            return TwoLayerFFN(block, activation, (firsts[0], last))
    return None


def _beside(layer: nn.Module, name: str, d: int, recording: Recording) -> HostFFN | None:
    """What stands for a block that a memory can only stand beside; None where nothing of its neurons is understood."""
    block = layer.get_submodule(name)
    like = recording.of(block)[0].result
    try:
        return ExpertBlock(block, _activation_in(block, like), d)
    except ValueError:
        pass
    ffn = _by_shape(block, d, like)
    if ffn is not None:
        ffn.place, ffn.differs = Place.MODULE, f"FFN is a {class_name(block)}, whose formula is not known"
        ffn.seen = Seen.now(block, None)
        ffn.activation_name = ""
    return ffn


def _of_layer(layer: nn.Module, recording: Recording, d: int, known: dict[tuple, Formula]) -> tuple[str, HostFFN] | None:
    """known: as in `dense_ffn`"""
    if (dense := dense_ffn(layer, recording, d, TOKENS, known)) is not None:
        return _dense(layer, dense, recording)
    for name in reversed(token_wise_blocks(layer, recording, d, TOKENS)):
        if (ffn := _beside(layer, name, d, recording)) is not None:
            return name, ffn
    return None


@contextmanager
def _one_thread() -> Iterator[None]:
    """Small tensors are compared on the CPU: to wake other threads takes longer than that, by far on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@torch.no_grad()
def discover(model: Any) -> Discovered:
    """Finds a host's FFNs, and leaves the host as it was. ValueError, which says what was found, where there are none."""
    on_cpu = any(parameter.is_cpu for parameter in model.parameters())  # where the host itself computes there
    with undisturbed(model), nullcontext() if on_cpu else _one_thread():
        recording = recorded(model)
        layers = decoder_layers(model, recording)
        d = None if layers is None else hidden_size(model, layers, recording)
        if layers is None or d is None:
            raise ValueError(f"{type(model).__name__}: no list of decoder layers took part in its forward")
        names: dict[int, str] = {}
        ffns: dict[int, HostFFN] = {}
        taken, known = set[nn.Module](), dict[tuple, Formula]()
        for index, layer in layers.at.items():
            with gathered(model, layer):
                if (found := _of_layer(layer, recording, d, known)) is None or found[1].module in taken:
                    continue
                if found[1].differs is not None and found[1].place is Place.MODULE:
                    check_gradient(index, found[0], recording.of(found[1].module)[0])
            names[index], ffns[index] = found
            taken.add(found[1].module)
            found[1].repeated = len(recording.of(found[1].projections()[-1])) > 1
    if not ffns:
        held = ", ".join(sorted({type(child).__name__ for layer in layers.at.values() for child in layer.children()}))
        raise ValueError(
            f"{type(model).__name__}: no FFN was found in its {layers.depth} layers ({layers.name}), which hold {held}; "
            "expected a module that takes each token's hidden state to another one, for a memory to stand beside"
        )
    return Discovered(layers.name, layers.depth, d, names, ffns)
