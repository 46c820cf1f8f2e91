"""What `Memory.status` says of each layer."""

from dataclasses import dataclass

from locas_ext.patching.attachment import Attachment
from locas_ext.state.memory_state import GATE, KEY, VALUE


@dataclass(frozen=True)
class LayerStatus:
    """One layer's memory: where it lies, how it is computed and why, how full it is, mean norms of the rows used.

    gate_norm is None for Locas-MLP, which has no gate. windows says in how many forwards a run reads its windows, and why.
    """

    layer: int
    device: str
    dtype: str
    backend: str
    reason: str
    slots_used: int
    capacity: int
    scale: float
    gate_norm: float | None
    key_norm: float
    value_norm: float
    windows: str


def layer_status(attachment: Attachment) -> list[LayerStatus]:
    """See `Memory.status`."""
    state = attachment.state
    state.sync()
    norms = state.tensors(optimizer=False)["slots"].norm(dim=-1).mean(-1).tolist()  # [L, planes]
    result = []
    for ffn, layer, scale, layer_norms in zip(attachment.ffns, state.layers, state.scales, norms, strict=True):
        path, reason = ffn.path()
        place = ffn.arena.compute
        result.append(
            LayerStatus(
                layer,
                str(place.device),
                str(place.dtype),
                f"{ffn.backend_name()}, {path}",
                reason,
                state.used,
                state.capacity,
                scale,
                None if state.grows else layer_norms[GATE],
                layer_norms[KEY],
                layer_norms[VALUE],
                attachment.host.reading.describe(),
            )
        )
    return result
