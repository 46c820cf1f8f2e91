"""What `Memory.status` says of each layer."""

from dataclasses import dataclass

from locas_ext.ops.backends import fused_backend
from locas_ext.patching.attachment import Attachment
from locas_ext.state.planes import GATE, KEY, VALUE


@dataclass(frozen=True, kw_only=True)
class LayerStatus:
    """One layer's memory: where it lies, how it is computed and why, and how full it is.

    Attributes:
        layer: the decoder layer's index
        device, dtype: where and in what the layer computes, such as "cuda:0" and "torch.bfloat16"
        backend_name: what computes it: "fused", "matmul" or "reference"
        kernels: the family of kernels that "fused" means on this device: "sm80" or "sm90" on a GPU, an instruction set such as
            "avx512" on a CPU; None where the layer runs none of them
        path: "whole" where host and memory run as one op, "sideway" where the memory is added beside the host's FFN
        reason: why this path
        slots_used, capacity: the slots that hold something, and those there is room for
        scale: tau
        gate_norm, key_norm, value_norm: mean length of the used rows of each kind, of a split host those of this process;
            Locas-MLP has no gate: None
        windows: in how many forwards a run reads its windows, and why

    >>> import locas_ext as locas
    >>> from locas_ext.hosts.tiny import tiny_host
    >>> status = locas.attach(tiny_host(), locas.LocasConfig(rank=4)).status()[0]
    >>> status.device, status.dtype, status.capacity
    ('cpu', 'torch.float32', 4)
    """

    layer: int
    device: str
    dtype: str
    backend_name: str
    kernels: str | None
    path: str
    reason: str
    slots_used: int
    capacity: int
    scale: float
    gate_norm: float | None
    key_norm: float
    value_norm: float
    windows: str

    @property
    def backend(self) -> str:
        """backend_name and path in one string, such as "fused, whole"."""
        return f"{self.backend_name}, {self.path}"


def layer_status(attachment: Attachment) -> list[LayerStatus]:
    """See `Memory.status`."""
    state = attachment.state
    state.sync()
    norms = state.tensors(optimizer=False)["slots"].norm(dim=-1).mean(-1).tolist()  # [L, planes]
    result = []
    for ffn, layer, scale, layer_norms in zip(attachment.ffns, state.layers, state.scales, norms, strict=True):
        path, reason = ffn.path()
        name, like = ffn.backend_name(), ffn.arena.compute
        result.append(
            LayerStatus(
                layer=layer,
                device=str(like.device),
                dtype=str(like.dtype),
                backend_name=name,
                kernels=fused_backend(like).family(like) if name.startswith("fused") else None,
                path=path,
                reason=reason,
                slots_used=state.used * state.processes,
                capacity=state.capacity * state.processes,
                scale=scale,
                gate_norm=None if state.grows else layer_norms[GATE],
                key_norm=layer_norms[KEY],
                value_norm=layer_norms[VALUE],
                windows=attachment.host.reading.describe(),
            )
        )
    return result
