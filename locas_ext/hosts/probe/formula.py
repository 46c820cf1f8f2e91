"""Whether an FFN computes what its class in hosts/ffn.py says: the numbers of one recorded forward tell."""

import torch
from torch import Tensor

from locas_ext.hosts.ffn import HostFFN, Place
from locas_ext.hosts.gated_ffn import FusedGatedFFN, GatedFFN
from locas_ext.ops.activations import activate

from .agreement import rounding
from .recording import Recording

# Roundings allowed where both sides do the same products and differ in elementwise steps only.
_ROUNDINGS = 8
# Roundings allowed where the FFN does its products in its own way.
_PRODUCT_ROUNDINGS = 64
# How far the activation is looked at beyond what the recorded tokens reach.
_REACH = 24.0


class DidNotRun(Exception):
    """An FFN took no part in the host's forward, so a memory in it would never be read."""


def formula(ffn: HostFFN) -> str:
    """The formula in words."""
    first, last = ffn.names[0], ffn.names[-1]
    if isinstance(ffn, FusedGatedFFN):
        return f"{last}({ffn.activation}(gate) * up) with gate and up from {first}"
    if isinstance(ffn, GatedFFN):
        return f"{last}({ffn.activation}({first}) * {ffn.names[1]})"
    return f"{last}({ffn.activation}({first}))"


def products(ffn: HostFFN, recording: Recording, x: Tensor) -> list[Tensor]:
    """What the first projections make of x, which the FFN takes in: gate and up, or the one of a two-layer FFN."""
    firsts = ffn.projections()[:-1]
    calls = [call for module in firsts for call in recording.of(module)[:1]]
    if len(calls) == len(firsts) and all(c.input.device == x.device and torch.equal(c.input, x) for c in calls):
        made = [call.result for call in calls]
    else:
        made = [module(x) for module in firsts]
    return list(ffn.split(made[0], -1)) if isinstance(ffn, FusedGatedFFN) else made


def hidden(ffn: HostFFN, recording: Recording, x: Tensor) -> Tensor:
    """What the memory takes the output projection's input for, where the FFN takes in x."""
    first, *up = products(ffn, recording, x)
    activated = activate(first, ffn.activation)
    return activated * up[0] if up else activated


def _same(ours: Tensor, theirs: Tensor, roundings: int) -> bool:
    """Up to so many roundings of the largest number. NaN on either side is a difference."""
    if ours.numel() != theirs.numel():
        return False
    bound = roundings * rounding(theirs) * theirs.abs().max().float()
    return bool((ours.reshape(theirs.shape).float() - theirs.float()).abs().max() <= bound)


def _same_activation(ours: Tensor, theirs: Tensor, x: Tensor) -> bool:
    """Up to some roundings of each number that went in, or came out where that is larger."""
    bound = (
        _ROUNDINGS * rounding(theirs) * torch.maximum(x.float().abs(), theirs.float().abs()) + torch.finfo(theirs.dtype).tiny
    )
    return bool(((ours.float() - theirs.float()).abs() <= bound).all())


def _activation_is_another(ffn: HostFFN, recording: Recording, hidden: Tensor) -> bool:
    """Whether the module that is the activation on the recorded numbers is another function on larger ones."""
    grid = torch.linspace(-_REACH, _REACH, hidden.numel(), dtype=torch.float32, device=hidden.device)
    grid = grid.to(hidden.dtype).view(hidden.shape)
    for module in ffn.module.modules():
        for call in recording.of(module)[:1]:
            result = call.output
            if not isinstance(result, Tensor) or not call.input.shape == result.shape == hidden.shape:
                continue
            if not _same_activation(activate(call.input, ffn.activation), result, call.input):
                continue
            return not _same_activation(activate(grid, ffn.activation), module(grid), grid)
    return False


def difference(ffn: HostFFN, recording: Recording) -> str | None:
    """What a recorded forward shows an FFN to do other than its formula, in words that continue "layer 3's ...", or None.

    DidNotRun if the FFN took no part in the forward.
    """
    first, last = ffn.projections()[0], ffn.projections()[-1]
    for module in [ffn.module] if ffn.place is Place.MODULE else [first, last]:
        if not recording.of(module):
            raise DidNotRun("did not run in the host's forward, so a memory there would never be read")
    if ffn.differs is not None:  # known before
        return ffn.differs
    call, outs = recording.of(ffn.module if ffn.place is Place.MODULE else first)[0], recording.of(last)
    other = f"FFN computes something else than {formula(ffn)}"
    if not outs:  # it makes its products from the weights, beside the modules
        return None if _same(last(hidden(ffn, recording, call.input)), call.result, _PRODUCT_ROUNDINGS) else other
    taken_in = outs[0].input
    if not _same(hidden(ffn, recording, call.input.to(taken_in.device)), taken_in, _ROUNDINGS) or _activation_is_another(
        ffn, recording, taken_in
    ):
        return other
    if ffn.place is Place.MODULE and not _same(outs[0].result, call.result, _ROUNDINGS):
        return other
    return None
