"""The neurons of a block of experts, however their weights lie: stacked in parameters, or in a list of modules."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

# Words in the names of what gives a neuron's output, and of what gates it.
_LAST, _GATE = ("down", "output", "w2", "fc2", "wo"), ("gate", "w1")


class PooledRows:
    """The rows [E * m, d] of all experts, of which only those asked for are copied."""

    def __init__(self, rows: Sequence[Tensor]):
        """rows: per expert [m, d]"""
        self.rows, self.device = rows, rows[0].device
        self.shape = torch.Size((len(rows) * rows[0].shape[0], rows[0].shape[1]))

    def __getitem__(self, index: Tensor) -> Tensor:
        m = self.rows[0].shape[0]
        return torch.stack([self.rows[place // m][place % m] for place in index.tolist()])


class ExpertWeights(NamedTuple):
    """Views of what experts hold: the module that has them, and per expert gate (None: no gate), up and value rows [m, d]."""

    owner: nn.Module
    gate: Sequence[Tensor] | None
    up: Sequence[Tensor]
    value: Sequence[Tensor]


def _stacked(module: nn.Module, d: int, depth: int) -> dict[str, list[Tensor]]:
    """By name, per expert a matrix: of parameters [E, ., .] that lie so deep inside a module, or of three [E * m, d]."""
    own = {name: p for name, p in module.named_parameters() if name.count(".") == depth and p.is_floating_point()}
    deep = {name: p for name, p in own.items() if p.dim() == 3 and d in p.shape[1:]}
    if len(deep) >= 2 and len({p.shape[0] for p in deep.values()}) == 1:
        return {name: list(p.detach().unbind(0)) for name, p in deep.items()}
    flat = {name: p for name, p in own.items() if p.dim() == 2 and p.shape[1] == d}
    if depth == 0 and len(flat) == 3 and len({p.shape for p in flat.values()}) == 1:
        return {name: [p.detach()] for name, p in flat.items()}
    return {}


def _listed(module: nn.Module, d: int) -> dict[str, list[Tensor]]:
    """By name, per expert a linear layer's weight, of a list of modules that are alike."""
    if not isinstance(module, nn.ModuleList | nn.ModuleDict) or len(module) < 2:
        return {}
    result: dict[str, list[Tensor]] = {}
    for expert in module._modules.values():
        for name, child in [] if expert is None else expert.named_modules():
            if type(child) is nn.Linear and d in child.weight.shape:
                result.setdefault(name, []).append(child.weight.detach())
    whole = {name: weights for name, weights in result.items() if len(weights) == len(module)}
    return whole if len(whole) >= 2 and all(len({w.shape for w in weights}) == 1 for weights in whole.values()) else {}


def _rows_first(matrices: list[Tensor], d: int, transposed: bool) -> list[Tensor]:
    """[rows, d] each: of a square one it is a linear layer's [out, in] unless the module says otherwise."""
    rows, columns = matrices[0].shape
    turn = transposed if rows == columns else columns != d
    return [matrix.T for matrix in matrices] if turn else matrices


def _roles(module: nn.Module, matrices: dict[str, list[Tensor]], d: int) -> ExpertWeights | None:
    last = [name for name in matrices if any(word in name for word in _LAST)]
    if len(last) != 1:
        return None
    transposed = bool(getattr(module, "is_transposed", False))
    value = matrices[last[0]]
    rows, columns = value[0].shape
    if (not transposed) if rows == columns else rows == d:
        value = [matrix.T for matrix in value]
    m = value[0].shape[0]
    firsts = {name: _rows_first(weights, d, transposed) for name, weights in matrices.items() if name != last[0]}
    if len(firsts) == 2:
        gate_name = next((name for name in firsts if any(word in name for word in _GATE)), next(iter(firsts)))
        gate = firsts.pop(gate_name)
        return ExpertWeights(module, gate, next(iter(firsts.values())), value)
    (both,) = firsts.values() if len(firsts) == 1 else ([],)
    if both and both[0].shape[0] == 2 * m:
        halves = getattr(module, "is_concatenated", True)
        pairs = [matrix.chunk(2) if halves else (matrix[::2], matrix[1::2]) for matrix in both]
        return ExpertWeights(module, [gate for gate, _ in pairs], [up for _, up in pairs], value)
    return ExpertWeights(module, None, both, value) if both and both[0].shape[0] == m else None


def expert_weights(block: nn.Module, d: int) -> ExpertWeights | None:
    """The neurons of the experts in a block, d wide; None where their weights are not understood."""
    for depth in (0, 1):  # the module that has them is told the routing, the one around it is not
        for module in block.modules():
            for matrices in (_stacked(module, d, depth), _listed(module, d) if depth == 0 else {}):
                if matrices and (found := _roles(module, matrices, d)) is not None:
                    return found
    return None
