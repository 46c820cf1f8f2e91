"""FFNs of two projections without a gate."""

from collections.abc import Callable

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .ffn import Packed, Place, ProjectedFFN, Projection, as_parameters
from .projections import dense_weight


class TwoLayerFFN(ProjectedFFN):
    """An FFN of two projections, act(x W_in^T + b_in) W_out^T + b_out (OPT, GPT-NeoX, Phi)."""

    place = Place.PROJECTIONS
    layout = "two-layer"

    def __init__(self, module: nn.Module, activation: str, names: tuple[str, str]):
        """module: the one that holds both projections: the FFN, or for OPT the decoder layer."""
        self.names = names
        super().__init__(module, activation)

    def hidden(self, x: Tensor) -> Tensor:
        return self.activate(self.projections()[0](x))

    def input_rows(self, like: Tensor) -> tuple[Tensor]:
        return (dense_weight(self.projections()[0], like),)

    def resized(self, rows: Callable, columns: Callable) -> Packed:
        first, last = self.projections()
        named: list[tuple[Projection, str, Tensor | None]] = [
            (first, "weight", rows(first.weight, 0)),
            (last, "weight", columns(last.weight)),
        ]
        if first.bias is not None:
            named.append((first, "bias", rows(first.bias, None)))
        return as_parameters(named)


class Conv1DFFN(TwoLayerFFN):
    """The same with GPT-2's Conv1D, which holds its weight as [in, out]."""

    plain = Conv1D

    def resized(self, rows: Callable, columns: Callable) -> Packed:
        first, last = self.projections()
        return as_parameters(
            [
                (first, "weight", rows(first.weight.T, 0).T.contiguous()),
                (first, "bias", rows(first.bias, None)),
                (last, "weight", columns(last.weight.T).T.contiguous()),
            ]
        )
