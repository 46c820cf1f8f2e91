"""What a backend is: a module with these functions. All take [T, d] matrices that were checked, and none knows autograd."""

from typing import Protocol

from torch import Tensor

from locas_ext.ops.types import HostWeights, InputProjections, Saved, SlotViews


class Backend(Protocol):
    """The operations of the memory, each as a forward and a backward.

    Arguments:
        x, dy: [T, d], the input and the gradient of the output
        slots: one layer's slots in x's dtype
        activation: its index (activations.py)
        save, needs_dx, needs_slots: what the backward will need; a forward keeps no more than that
        saved: what the forward returned for the backward, of a layout of the backend's own
        slots_grad: float32 [planes, r, d], to which the slots' gradient is added; None: it is returned

    A forward returns y [T, d] and what it saved. A backward returns dx [T, d] and the slots' gradient [planes, r, d], each
    None where it was not needed or was added elsewhere.
    """

    NAME: str  # how the registered operators call it

    def saved_shapes(self, tokens: int, m: int, rank: int) -> list[tuple[int, ...]]:
        """The shapes of the up to three tensors that glu_ffn_forward saves."""

    def glu_ffn_forward(
        self, x: Tensor, host: HostWeights, slots: SlotViews, scale: float, activation: int, save: bool, needs_dx: bool = True
    ) -> tuple[Tensor, Saved]: ...

    def glu_ffn_backward(
        self,
        dy: Tensor,
        x: Tensor,
        saved: Saved,
        host: HostWeights,
        slots: SlotViews,
        scale: float,
        activation: int,
        needs_dx: bool,
        slots_grad: Tensor | None,
    ) -> tuple[Tensor | None, Tensor | None]: ...

    def sideway_glu_forward(self, x: Tensor, slots: SlotViews, scale: float, activation: int) -> tuple[Tensor, Saved]: ...

    def sideway_glu_backward(
        self,
        dy: Tensor,
        x: Tensor,
        saved: Saved,
        slots: SlotViews,
        scale: float,
        activation: int,
        needs_dx: bool,
        slots_grad: Tensor | None,
    ) -> tuple[Tensor | None, Tensor | None]: ...

    def sideway_mlp_forward(self, x: Tensor, slots: SlotViews, scale: float, activation: int) -> tuple[Tensor, Saved]: ...

    def sideway_mlp_backward(
        self,
        dy: Tensor,
        x: Tensor,
        saved: Saved,
        slots: SlotViews,
        scale: float,
        activation: int,
        needs_dx: bool,
        needs_slots: bool,
        slots_grad: Tensor | None,
    ) -> tuple[Tensor | None, Tensor | None]: ...

    def neuron_importance(self, x: Tensor, host: HostWeights | InputProjections, activation: int) -> Tensor:
        """Mean over the tokens of |act(gate) * up|: [m] float32."""


class FusedBackend(Backend, Protocol):
    """A backend that takes only some tensors and sizes, and is not always the faster one."""

    def obstacle(self, like: Tensor, d: int, m: int) -> str | None:
        """Why the kernels cannot take an FFN of these sizes on tensors like this one, or None."""

    def is_faster(self, like: Tensor, tokens: int, d: int, m: int) -> bool:
        """What backend "auto" goes by for inputs like this tensor: whether the kernels take them and were faster."""

    def choice(self, like: Tensor, d: int, m: int) -> str:
        """What backend "auto" comes to for tensors like this one, in words."""

    def family(self, like: Tensor) -> str:
        """Which build of these kernels runs on tensors like this one, such as "sm90" or "avx512"."""
